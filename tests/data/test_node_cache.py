"""The folder that processes of a node share: one brings a file, others wait for it, and a death harms nobody."""

import os
import threading
import time

import pytest

from prelude.data import node_cache
from prelude.data.errors import RunStopped
from prelude.data.node_cache import NodeCache

SIZE = 200_000
BRINGS = """
import os, sys, time
from prelude.data.node_cache import NodeCache
folder, log, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])

def bring(writer):
    with open(log, "a") as file:
        file.write("brought\\n")
    for n in range(20):
        writer.write(bytes([n]) * 10_000)
        time.sleep(seconds / 20)

cache = NodeCache(folder, 10**6)
print("began", flush=True)
fd = cache.open("shard", 200_000, bring)
content = os.pread(fd, 10**6, 0)
print(content == b"".join(bytes([n]) * 10_000 for n in range(20)), flush=True)
"""


def bring(letter=b"x", calls=None):
    def into(writer):
        if calls is not None:
            calls.append(letter)
        writer.write(letter * (writer.size // 2))
        writer.write(letter * (writer.size - writer.at))

    return into


def fetched(cache, name, letter=b"x", calls=None):
    fd = cache.open(name, 1000, bring(letter, calls))
    try:
        return os.pread(fd, 2000, 0)
    finally:
        os.close(fd)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "shards").mkdir()
    return tmp_path / "shards"


def test_processes_that_want_one_file_have_it_brought_once(folder, tmp_path, run_python):
    processes = [run_python(BRINGS, folder, tmp_path / "log", 1.0) for _ in range(3)]
    assert [process.communicate(timeout=100)[0] for process in processes] == ["began\nTrue\n"] * 3
    assert (tmp_path / "log").read_text() == "brought\n"


def test_a_process_that_is_killed_in_the_middle_leaves_nothing_to_be_read(folder, tmp_path, run_python):
    killed = run_python(BRINGS, folder, tmp_path / "log", 1000)
    until = time.monotonic() + 100
    while not (folder / "shard.partial").exists() or (folder / "shard.partial").stat().st_size < SIZE:
        assert time.monotonic() < until
        time.sleep(0.02)
    waits = run_python(BRINGS, folder, tmp_path / "log", 0)
    assert waits.stdout.readline() == "began\n"
    killed.kill()
    assert waits.communicate(timeout=100)[0] == "True\n"
    assert (tmp_path / "log").read_text() == "brought\n" * 2
    assert sorted(path.name for path in folder.iterdir()) == ["lock", "shard.json", "shard.tar"]


def test_the_longest_unused_make_room(folder):
    cache, calls = NodeCache(str(folder), 3000), []
    for name in "abc":
        fetched(cache, name, calls=calls)
    cache.touched.clear()
    fetched(cache, "a", calls=calls)
    fetched(cache, "d", calls=calls)
    assert {path.stem for path in folder.glob("*.tar")} == {"a", "c", "d"} and len(calls) == 4


def test_a_clock_that_was_wrong_keeps_nothing_for_ever(folder):
    cache = NodeCache(str(folder), 3000)
    for name in "abc":
        fetched(cache, name)
    os.utime(folder / "b.json", (4e9, 4e9))
    fetched(cache, "d")
    assert {path.stem for path in folder.glob("*.tar")} == {"a", "c", "d"}


def test_what_a_dead_process_left_takes_no_room(folder):
    cache = NodeCache(str(folder), 3000)
    (folder / "dead.partial").write_bytes(bytes(2900))
    fetched(cache, "a")
    assert not (folder / "dead.partial").exists()


def test_a_record_that_is_lost_or_spoilt_means_another_transfer(folder):
    calls = []
    fetched(NodeCache(str(folder), 3000), "a", calls=calls)
    (folder / "a.json").write_text("spoilt")
    assert fetched(NodeCache(str(folder), 3000), "a", b"y", calls) == b"y" * 1000
    (folder / "a.json").unlink()
    assert fetched(NodeCache(str(folder), 3000), "a", b"z", calls) == b"z" * 1000
    assert calls == [b"x", b"y", b"z"]


def test_a_copied_cache_is_verified_and_not_fetched(folder, tmp_path):
    fetched(NodeCache(str(folder), 3000), "a")
    os.rename(folder, tmp_path / "moved")
    os.utime(tmp_path / "moved" / "a.tar")
    assert fetched(NodeCache(str(tmp_path / "moved"), 3000), "a", b"y") == b"x" * 1000


def test_a_transfer_that_fails_leaves_no_file(folder):
    cache = NodeCache(str(folder), 3000)

    def fails(writer):
        writer.write(b"half")
        raise RunStopped("gone")

    with pytest.raises(RunStopped, match="gone"):
        cache.open("a", 1000, fails)
    assert [path.name for path in folder.iterdir()] == ["lock"]
    assert fetched(cache, "a") == b"x" * 1000


def test_a_file_that_is_just_given_its_name_is_counted(folder, monkeypatch):
    """Counted by one who saw it while it was being written, and not by the name that it had a moment later."""
    cache, other = NodeCache(str(folder), 3000), NodeCache(str(folder), 3000)
    fetched(cache, "a"), fetched(cache, "b")
    seen, is_left = threading.Event(), node_cache._is_left

    def brings_last(writer):
        bring()(writer)
        assert seen.wait(100)

    def looks_slowly(path):
        if threading.current_thread() is not keeper:
            seen.set()
            keeper.join(0.3)  # it gives the file its name now, unless it has to wait
        return is_left(path)

    monkeypatch.setattr(node_cache, "_is_left", looks_slowly)
    keeper = threading.Thread(target=lambda: os.close(cache.open("c", 1000, brings_last)))
    keeper.start()
    until = time.monotonic() + 100
    while not (folder / "c.partial").exists() or not (folder / "c.partial").stat().st_size:
        assert time.monotonic() < until
        time.sleep(0.01)
    fetched(other, "d")
    keeper.join()
    assert sum(path.stat().st_size for path in folder.glob("*.tar")) <= 3000


def test_a_file_that_is_not_noted_yet_is_not_taken_for_a_damaged_one(folder, monkeypatch, caplog):
    cache, other, calls = NodeCache(str(folder), 3000), NodeCache(str(folder), 3000), []
    named, note = threading.Event(), cache._note

    def notes_slowly(*args):
        named.set()
        time.sleep(0.3)
        note(*args)

    monkeypatch.setattr(cache, "_note", notes_slowly)
    keeper = threading.Thread(target=fetched, args=(cache, "a", b"x", calls))
    keeper.start()
    assert named.wait(100)
    assert fetched(other, "a", b"y", calls) == b"x" * 1000
    keeper.join()
    assert calls == [b"x"] and not caplog.messages
