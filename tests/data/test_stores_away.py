"""A store that is away is asked again for as long as the run waits for anything, and as late as it says."""

import contextlib
import hashlib
import os
import resource
import socket
import time
from email.utils import formatdate
from pathlib import Path

import pytest
from servers import Server, serving

from prelude.data import remote_shards, waiting
from prelude.data.errors import RunStopped
from prelude.data.host import NoMoreFiles
from prelude.data.node_cache import NodeCache
from prelude.data.stores import Described, Failed, Wrong, describe


class Clock:
    """Time that passes by pauses alone."""

    def __init__(self):
        self.now, self.pauses = 0.0, []

    def monotonic(self) -> float:
        return self.now

    def pause(self, seconds: float, _) -> None:
        self.now += seconds
        self.pauses.append(seconds)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for name, value in vars(waiting.Patience(timeout_seconds=300)).items():
        monkeypatch.setattr(waiting.patience, name, value)
    monkeypatch.setattr(remote_shards, "_pause", clock.pause)
    monkeypatch.setattr(remote_shards.time, "monotonic", clock.monotonic)
    return clock


def away_until(clock, end: float, pause: float = 0.0):
    def answer():
        if clock.now < end:
            raise Failed("503 Service Unavailable", pause)
        return b"here"

    return answer


def test_a_store_may_be_away_for_minutes(clock):
    assert remote_shards._tried(away_until(clock, 250), "u") == b"here"
    assert 250 <= clock.now < 270 and max(clock.pauses) <= 15


def test_a_host_that_nobody_knows_is_a_mistake_that_ends_soon(clock, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(Wrong, match="Name or service not known"):
        describe("http://a-name-without-a-host/a.tar")
    with pytest.raises(RunStopped, match="cannot be fetched, after 6 attempts: .*Name or service not known"):
        remote_shards._tried(lambda: describe("http://a-name-without-a-host/a.tar"), "u")
    assert clock.now < 16


def test_one_that_stays_away_ends_the_run_before_the_wait_does(clock):
    with pytest.raises(RunStopped, match="u cannot be fetched, after [0-9]+ attempts: 503 Service Unavailable; look"):
        remote_shards._tried(away_until(clock, 1e9), "u")
    assert 270 < clock.now < 300


@pytest.mark.parametrize("asked, first", [(40.0, 40.0), (1e6, 270.0)])
def test_a_store_is_not_asked_before_it_says(asked, first, clock):
    assert remote_shards._tried(away_until(clock, 40, asked), "u") == b"here"
    assert clock.pauses == [first]


def test_a_wait_says_why_it_lasts(clock, monkeypatch):
    told = []

    def pause(*_):
        clock.now += 9
        told.append(remote_shards._why_again("u"))

    monkeypatch.setattr(remote_shards, "_pause", pause)
    remote_shards._tried(away_until(clock, 10), "u")
    assert set(told) == {" (503 Service Unavailable)"} and remote_shards._why_again("u") == ""


def test_a_server_that_refuses_ranges_is_asked_for_the_whole(write_shards):
    with open(write_shards([12])[0], "rb") as file:
        content = file.read()
    with serving(Server(files={"000.tar": content}, refused_ranges=True, pause=0.05)) as server:
        (shard,) = remote_shards.remote_shards([f"{server.url}/000.tar"])
        assert shard.peek(700, 50) == content[700:750] and server.asked["000.tar"] == 2
        for path in Path(shard.cache.folder).glob("*.tar"):
            path.unlink()
        server.faults["000.tar"] = ["hangs-up"]
        assert shard.read(0, len(content)) == content and server.asked["000.tar"] == 5
        assert not server.parts


@pytest.mark.parametrize("asked", ["7", "date", "soon"])
def test_retry_after_is_read(asked, write_shards):
    after = formatdate(time.time() + 7, usegmt=True) if asked == "date" else asked
    with serving(Server(default=b"x", refusing={"Retry-After": after})) as server:
        with pytest.raises(Failed, match="^503 Service Unavailable$") as failed:
            describe(f"{server.url}/503.tar")
    assert (4 < failed.value.pause <= 7) if asked != "soon" else failed.value.pause == 0


class Scripted:
    """A store of one shard, every fetch of which takes minutes and goes as told: "" for well, "away", "damaged", or the
    share after which it breaks off."""

    content = bytes(range(256)) * 40

    def __init__(self, clock, monkeypatch, checksums: dict[str, str]):
        self.clock, self.ways, self.fetches = clock, [], 0
        said = Described(len(self.content), checksums, f"{time.time_ns()}")
        monkeypatch.setattr(remote_shards.stores, "describe", lambda _: said)
        monkeypatch.setattr(remote_shards.stores, "stream", self.stream)
        (self.shard,) = remote_shards.remote_shards(["http://h/000.tar"])

    def stream(self, _, size: int, start: int):
        self.fetches += 1
        way = self.ways.pop(0) if self.ways else ""
        if way == "away":
            raise Failed("503 Service Unavailable")
        body = bytes([self.fetches]) * size if way == "damaged" else self.content
        end = int(size * float(way)) if way.startswith("0.") else size
        for at in range(start, end, 1280):
            self.clock.now += 100
            yield at, body[at : min(at + 1280, end)], {}
        if end < size:
            raise Failed("it broke off")


MD5 = {"md5": hashlib.md5(Scripted.content).hexdigest()}
OF_KMS = {"etag": "0" * 32}


@pytest.mark.parametrize(
    "checksums, ways, fetches",
    [
        (MD5, ["damaged"], 2),
        (MD5, ["damaged"] * 5, 6),
        (MD5, ["away"] * 7 + ["damaged", "away"], 10),
        (MD5, ["0.2", "damaged", *(f"0.{n}" for n in range(1, 10))], 12),
        (OF_KMS, [], 2),
        ({}, ["0.5", "0.4", "0.5", "0.1", "0.5"], 6),
        ({}, ["0.5", *["away"] * 9, "0.4"], 12),
    ],
)
def test_what_takes_minutes_is_tried_as_often_as_what_is_quick(checksums, ways, fetches, clock, monkeypatch):
    store = Scripted(clock, monkeypatch, checksums)
    store.ways = ways
    assert store.shard.read(0, 10**6) == store.content and store.fetches == fetches


@pytest.mark.parametrize("checksums, way", [(MD5, "damaged"), ({}, "0.5")])
def test_what_gets_nowhere_is_tried_six_times(checksums, way, clock, monkeypatch):
    store = Scripted(clock, monkeypatch, checksums)
    store.ways = [way] * 100
    with pytest.raises(RunStopped, match="cannot be fetched, after 6 attempts"):
        store.shard.read(0, 1)


def test_a_fetch_ahead_is_soon_left_to_the_reader(clock, monkeypatch):
    store = Scripted(clock, monkeypatch, MD5)
    store.ways = ["away"] * 100
    with pytest.raises(RunStopped, match="after 6 attempts: 503"):
        store.shard.bring_ahead(lambda: False)
    assert clock.now < 20
    with pytest.raises(RunStopped, match="503"):
        store.shard.read(0, 1)
    assert clock.now > 270


def test_a_store_is_not_blamed_for_a_want_of_descriptors():
    with serving(Server(default=b"x" * 10_000)) as server:
        describe(f"{server.url}/a.tar")  # what it needs once is open
        with no_descriptor(), pytest.raises(NoMoreFiles, match="files open that it may"):
            describe(f"{server.url}/a.tar")


def test_nor_is_the_disk_of_the_cache(tmp_path):
    with contextlib.ExitStack() as stack:

        def bring(writer):
            writer.write(bytes(1000))
            stack.enter_context(no_descriptor())

        with pytest.raises(NoMoreFiles, match="files open that it may"):
            NodeCache(str(tmp_path), 10**6).open("a" * 32, 1000, bring)


@contextlib.contextmanager
def no_descriptor():
    """None is free meanwhile."""
    before, first = resource.getrlimit(resource.RLIMIT_NOFILE), os.open(os.devnull, os.O_RDONLY)
    os.close(first)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
