"""Shards behind a URL: the same samples as from disk, whatever the server does; and what ends a run, and how."""

import logging
import os
import re
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from servers import Server, serving

from prelude.data import fetching, index_file, node_cache, remote_shards, waiting
from prelude.data.batch import View, ViewPlan
from prelude.data.errors import RunStopped, Stopped, UserError
from prelude.data.fetching import num_threads
from prelude.data.loader import build_loader, one_pass
from prelude.data.order import Shuffle
from prelude.data.remote_index import write_for
from prelude.data.shards import ShardIndex
from prelude.launch import prelude
from prelude.launch.exit_codes import door

PLAN = ViewPlan((View((6, 6)),))


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """Patience and cache are the test's own, and pauses are short."""
    for name, value in vars(waiting.Patience(timeout_seconds=60)).items():
        monkeypatch.setattr(waiting.patience, name, value)
    for name, value in vars(remote_shards.CacheSetting()).items():
        monkeypatch.setattr(remote_shards._setting, name, value)
    monkeypatch.setattr(remote_shards, "FIRST_PAUSE_SECONDS", 0.01)
    return remote_shards._setting


@pytest.fixture
def shards(write_shards):
    return write_shards([11, 20, 7, 12])


@pytest.fixture
def server(shards):
    files = {os.path.basename(path): open(path, "rb").read() for path in shards}  # noqa: SIM115
    with serving(Server(files=files)) as running:
        yield running


def urls(server):
    return f"{server.url}/{{000..003}}.tar"


def build(shards, **changes):
    return build_loader(shards, PLAN, **dict(seed=5, micro_batch=5, label="cls") | changes)


def taken(loader, steps):
    found = [next(loader) for _ in range(steps)]
    loader.close()
    return found


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        for name in ("seeds", "sample_ids", "positions", "labels", "boxes", "flips"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert torch.equal(a.views[0], b.views[0])


def cached(cache):
    return sorted((cache / "shards").glob("*.tar"))


def emptied(server, cache, num_workers):
    """A loader whose shards are no longer in the cache."""
    loader = build(urls(server), label="", num_workers=num_workers)
    for path in cached(cache):
        path.unlink()
    return loader


# ---- the same as from disk


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_same_batches_as_from_disk(num_workers, server, shards):
    remote, local = build(urls(server), num_workers=num_workers), build(shards)
    assert remote.state_dict() == local.state_dict() and remote.index.fingerprint == local.index.fingerprint
    assert_same(taken(remote, 25), taken(local, 25))  # more than two epochs
    assert set(server.asked.values()) <= {1, 2}  # beside the shard itself, a look at a few labels


def test_local_and_remote_shards_in_one_set(server, shards):
    mixed = [shards[0], f"{server.url}/001.tar", *shards[2:]]
    assert_same(taken(build(mixed), 12), taken(build(shards), 12))


def test_evaluation_reads_them_too(server, shards):
    for index in (ShardIndex(urls(server), "cls"), ShardIndex(shards, "cls")):
        labels = [batch.labels for batch in one_pass(index, PLAN, batch_size=7, label="cls", num_workers=1)]
        assert torch.cat(labels).tolist() == list(range(50))


def test_an_index_file_spares_the_pass(server, shards, tmp_path):
    (path,) = write_for(shards, str(tmp_path / "index"))
    assert os.path.basename(path) == "shards.index.npz"
    server.files["shards.index.npz"] = open(path, "rb").read()  # noqa: SIM115
    remote, local = ShardIndex(urls(server), "cls"), ShardIndex(shards, "cls")
    assert server.asked == {"shards.index.npz": 1}
    assert remote.fingerprint == local.fingerprint and remote.label_fingerprint() == local.label_fingerprint()
    assert np.array_equal(remote.images, local.images) and np.array_equal(remote.labels, local.labels)
    assert not (ShardIndex(urls(server), "json").labels[:] >= 0).any()
    assert server.asked == {"shards.index.npz": 1}


def test_an_index_file_of_other_shards_is_not_believed(server, shards, tmp_path, caplog):
    (path,) = write_for(shards, str(tmp_path / "index"))
    server.files["shards.index.npz"] = open(path, "rb").read()  # noqa: SIM115
    server.files["001.tar"] = server.files["000.tar"]
    with caplog.at_level(logging.WARNING):
        index = ShardIndex(urls(server))
    assert index.counts.tolist() == [11, 11, 7, 12] and server.asked["001.tar"] == 1 and not server.asked["000.tar"]
    assert "001.tar is not as the index file" in caplog.text


@pytest.mark.parametrize("content", [b"no index", b"PK\3\4 and nothing"])
def test_a_spoilt_index_file_is_told_and_left(content, server, caplog):
    server.files["shards.index.npz"] = content
    with caplog.at_level(logging.WARNING):
        assert ShardIndex(urls(server)).num_samples == 50
    assert "shards.index.npz is not used" in caplog.text


def test_a_shard_that_differs_from_the_index_files_checksum_ends_the_run(server, shards, tmp_path):
    (path,) = write_for(shards, str(tmp_path / "index"))
    server.files["shards.index.npz"] = open(path, "rb").read()  # noqa: SIM115
    server.files["002.tar"] = server.files["002.tar"][:-1] + b"\1"  # as long as before
    with pytest.raises(RunStopped, match="002.tar cannot be fetched: its sha256 is .* and not .*, twice"):
        taken(build(urls(server), label=""), 12)


# ---- what a server may do


@pytest.mark.parametrize(
    "faults",
    [["500"], ["503", "429", "500"], ["hangs-up"], ["damaged"], ["longer"], ["hangs-up", "500", "damaged", "hangs-up"]],
    ids="+".join,
)
def test_what_passes_changes_nothing(faults, server, shards):
    server.faults["001.tar"] = list(faults)
    assert_same(taken(build(urls(server)), 12), taken(build(shards), 12))
    assert not server.faults["001.tar"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_transfer_goes_on_where_it_broke_off_if_the_server_can(ranges, server, shards):
    server.ranges, server.faults["001.tar"], server.pause = ranges, ["hangs-up"], 0.05
    index = ShardIndex(urls(server))
    resumed = [int(part.removeprefix("bytes=").rstrip("-")) for part in server.parts]
    assert (len(resumed) == 1 and 0 < resumed[0] <= len(server.files["001.tar"]) // 2) if ranges else not resumed
    assert index.fingerprint == ShardIndex(shards).fingerprint


def test_without_a_checksum_a_transfer_begins_again(server):
    server.checksums, server.faults["001.tar"] = False, ["hangs-up"]
    assert ShardIndex(urls(server)).num_samples == 50
    assert not server.parts


@pytest.mark.parametrize("status, words, asked", [("404", "404 Not Found", 2), ("403", "403 Forbidden", 2)])
def test_a_refusal_ends_the_start_at_once(status, words, asked, server):
    with pytest.raises(RunStopped, match=f"{server.url}/{status}.tar cannot be fetched: {words}; correct the URL"):
        build(f"{server.url}/{status}.tar")
    assert server.asked[f"{status}.tar"] == 1  # after its HEAD


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    "faults, words",
    [
        (["404"], "002.tar cannot be fetched: 404 Not Found; "),
        (["503"] * 60, "002.tar cannot be fetched, after [0-9]+ attempts: 503 Service Unavailable; "),
        (
            ["shorter"] * 60,
            "002.tar cannot be fetched, after 6 attempts: 9999 bytes are sent where 10000 were promised; ",
        ),
        (["damaged"] * 60, "002.tar cannot be fetched: its md5 is .* and not .*, twice; "),
    ],
    ids=["404", "503", "shorter", "damaged"],
)
def test_what_does_not_pass_ends_the_run_in_a_sentence(faults, words, num_workers, server, cache):
    loader = emptied(server, cache, num_workers)
    server.faults["002.tar"], waiting.patience.timeout_seconds = list(faults), 4
    size = len(server.files["002.tar"])
    words = words.replace("9999", str(size - 1)).replace("10000", str(size))
    with pytest.raises(RunStopped, match=f"^{server.url}/{words}"):
        for _ in range(12):
            next(loader)
    loader.close()
    assert {path.stat().st_size for path in cached(cache)} <= set(map(len, server.files.values()))


@pytest.mark.parametrize("fault, num_workers", [("silent", 0), ("silent", 1), ("stalls", 0)])
def test_a_server_that_stalls_is_named_and_given_up(fault, num_workers, server, cache):
    loader = emptied(server, cache, num_workers)
    server.faults["002.tar"], waiting.patience.timeout_seconds = [fault] * 60, 2
    with pytest.raises(RunStopped, match="for 2 seconds while waiting for the next batch.*002.tar"):
        for _ in range(12):
            next(loader)
    loader.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stop_is_obeyed_while_a_server_stalls(num_workers, server, cache):
    loader, asked = emptied(server, cache, num_workers), threading.Event()
    server.faults["002.tar"], waiting.patience.should_stop = ["stalls"] * 60, asked.is_set
    threading.Timer(1.0, asked.set).start()
    with pytest.raises(Stopped, match="while waiting for the next batch"):
        for _ in range(12):
            next(loader)
    loader.close()


def test_a_slow_server_is_no_stalled_one(server, cache):
    """A worker's batch takes longer than the patience, and its bytes come all the while."""
    loader = emptied(server, cache, 1)
    server.pause, waiting.patience.timeout_seconds = 0.3, 1.0
    assert len(taken(loader, 2)) == 2


# ---- the cache


def test_a_damaged_file_of_the_cache_is_fetched_again(server, shards, cache, caplog):
    expected = taken(build(shards), 12)
    assert_same(taken(build(urls(server)), 12), expected)
    before = Counter(server.asked)
    flipped, cut, gone, touched = cached(cache)
    with open(flipped, "r+b") as file:
        file.seek(1500)
        byte = file.read(1)
        file.seek(1500)
        file.write(bytes([byte[0] ^ 1]))
    os.truncate(cut, 3000)
    gone.unlink()
    os.utime(touched)
    with caplog.at_level(logging.WARNING):
        assert_same(taken(build(urls(server)), 12), expected)
    again = server.asked - before
    assert sum(1 for count in again.values() if count >= 1) >= 3
    assert caplog.text.count("is damaged, and is fetched again") == 2


def test_a_small_cache_stays_small_and_changes_nothing(server, shards, cache, settings):
    largest = max(map(len, server.files.values()))
    settings.gib = 2.2 * largest / 2**30
    order = Shuffle(streams=1, span=20, window=20)
    remote, local = build(urls(server), shuffle=order, num_workers=2), build(shards, shuffle=order)
    for _ in range(25):
        assert_same([next(remote)], [next(local)])
        assert sum(sizes_in(cache / "shards").values()) <= 2.2 * largest
    remote.close()


@pytest.mark.parametrize("ranks", [1, 3, 8, 16])
@pytest.mark.parametrize("num_workers", [1, 2, 3, 4, 5, 9])
def test_a_node_fetches_eight_shards_at_once_whatever_its_ranks_and_workers(ranks, num_workers, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    of_rank = sum(num_threads(worker, num_workers) for worker in range(num_workers))
    assert of_rank == {1: 8, 3: 2, 8: 1, 16: 1}[ranks]


def sizes_in(folder: Path) -> dict[str, int]:
    """Of one moment, though others come and go while they are looked at."""
    while True:
        looks = []
        for _ in range(2):
            with suppress(FileNotFoundError):
                looks.append({path.name: path.stat().st_size for path in folder.glob("*.[tp]ar*")})
        if len(looks) == 2 and looks[0] == looks[1]:
            return looks[0]


def test_an_order_that_the_cache_cannot_hold_is_refused_with_one_that_it_can(write_shards, settings, monkeypatch):
    monkeypatch.setattr(fetching, "_PLANNING", np.inf)
    for module, name in ((fetching, "_PLAN_SECONDS"), (node_cache, "_TOUCH_SECONDS")):
        monkeypatch.setattr(module, name, 0)  # shards here are read in less than what these let pass
    paths = write_shards([10] * 16, folder="many")
    files = {os.path.basename(path): open(path, "rb").read() for path in paths}  # noqa: SIM115
    settings.gib = 6 * len(files["000.tar"]) / 2**30
    with serving(Server(files=files)) as server:
        shards = f"{server.url}/{{000..015}}.tar"
        with pytest.raises(
            UserError, match="would have them fetched again and again; write .* larger data.cache_gib"
        ) as e:
            build(shards, label="")
        names = ("span", "window", "streams")
        order = {name: int(re.search(rf"data.shuffle.{name}=(\d+)", str(e.value))[1]) for name in names}
        loader, before = build(shards, label="", shuffle=Shuffle(**order)), Counter(server.asked)
        assert sorted(i for b in taken(loader, 32) for i in b.sample_ids.tolist()) == list(range(160))
        assert sum((server.asked - before).values()) <= 32  # of 160 reads, with what the next epoch begins with


def test_a_shard_larger_than_the_cache_is_refused(server, settings):
    settings.gib = 1000 / 2**30
    with pytest.raises(UserError, match="more than all of data.cache_gib"):
        build(urls(server))


def test_a_cache_that_cannot_be_written_is_refused(server, settings, tmp_path):
    (tmp_path / "file").write_text("")
    settings.folder = str(tmp_path / "file" / "cache")
    with pytest.raises(UserError, match="data.cache_dir=.* cannot be written or locked .Not a directory"):
        build(urls(server))


def test_a_full_disk_ends_the_run_and_leaves_nothing_half(server, cache, monkeypatch):
    real = os.pwrite

    def full(fd, content, offset):
        if offset + len(content) > 5000:
            raise OSError(28, "No space left on device")
        return real(fd, content, offset)

    monkeypatch.setattr(node_cache.os, "pwrite", full)
    with pytest.raises(RunStopped, match="cannot be kept in data.cache_dir=.* .No space left on device.; make room"):
        build(urls(server))
    assert not cached(cache)


def test_a_disk_smaller_than_the_limit_has_room_made(server, shards, cache, monkeypatch):
    real = os.pwrite

    def size(path):
        try:
            return path.stat().st_size
        except FileNotFoundError:  # another thread has just made room
            return 0

    def full(fd, content, offset):
        if sum(map(size, cached(cache))) > 40000:
            raise OSError(28, "No space left on device")
        return real(fd, content, offset)

    monkeypatch.setattr(node_cache.os, "pwrite", full)
    assert_same(
        taken(build(urls(server), shuffle=Shuffle(1, 20, 20)), 20), taken(build(shards, shuffle=Shuffle(1, 20, 20)), 20)
    )


def test_room_that_another_process_has_just_made_is_used(tmp_path, monkeypatch):
    real, refusals = os.pwrite, [True]

    def full_once(fd, content, offset):
        if refusals and refusals.pop():
            raise OSError(28, "No space left on device")
        return real(fd, content, offset)

    monkeypatch.setattr(node_cache.os, "pwrite", full_once)
    with open(tmp_path / "file", "wb") as file:
        writer = node_cache.Writer(file.fileno(), 4, lambda: False, str(tmp_path))
        writer.write(b"here")
        refusals += [True, True]
        with pytest.raises(RunStopped, match="make room there"):
            writer.write(b"gone")
    assert (tmp_path / "file").read_bytes() == b"here"


# ---- URLs


def test_a_signature_is_no_part_of_what_a_shard_is(server):
    signed = [f"{server.url}/{n:03}.tar?X-Amz-Signature={s}&X-Amz-Expires=9" for n in range(4) for s in ("a",)]
    again = [url.replace("Signature=a", "Signature=b") for url in signed]
    assert ShardIndex(signed).fingerprint == ShardIndex(urls(server)).fingerprint
    before = Counter(server.asked)
    ShardIndex(again)
    assert server.asked == before


def test_a_number_of_samples_has_no_effect_and_says_so(server):
    with pytest.raises(UserError, match="data.num_samples=9 has no effect"):
        build(urls(server), num_samples=9)


def test_wildcards_of_a_server_are_refused(server):
    with pytest.raises(UserError, match="cannot be listed by its server; write numbers in braces"):
        build(f"{server.url}/*.tar")


def test_a_library_that_is_missing_is_named(monkeypatch):
    def lacks(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.filesystem", lacks)
    for url, extra in (("s3://b/x.tar", "s3"), ("gs://b/x.tar", "gcs"), ("hf://datasets/a/b/x.tar", "hf")):
        with pytest.raises(UserError, match=rf"{url} needs .* pip install 'prelude-ssl\[{extra}\]'"):
            build(url)


def test_doors_take_urls(server, shards, tmp_path, capsys):
    """`shards info | verify | peek | index` of shards behind a URL tell what they tell of local ones."""

    def told(*words):
        assert door(lambda: prelude.main(["shards", *words])) == 0
        return capsys.readouterr().out

    remote, cache = urls(server), ["--cache-dir", str(tmp_path / "here"), "--cache-gib", "1"]
    assert told("info", remote, *cache) == told("info", *shards)
    assert told("verify", remote, *cache, "--workers", "1") == told("verify", *shards, "--workers", "1")
    told("peek", remote, *cache, "--to", str(tmp_path / "peek.png"), "--count", "2")
    told("index", remote, *cache, "--to", str(tmp_path / "index"))
    assert index_file.read((tmp_path / "index" / "shards.index.npz").read_bytes())["001.tar"].sha256
    assert len(list((tmp_path / "here").glob("*.tar"))) == 4
    with pytest.raises(SystemExit):
        told("info", remote, "--cache-gib", "0")
    assert "argument --cache-gib: '0' cannot be; write a number above 0" in capsys.readouterr().err
