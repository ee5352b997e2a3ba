"""The folder that processes of a node share: one brings a file, others wait for it, and a death harms nobody."""

import os
import threading
import time

import pytest

from prelude.data import node_cache
from prelude.data.errors import RunStopped
from prelude.data.node_cache import NodeCache

A, B, C, D, SHARD = (digit * 32 for digit in "abcd5")
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
fd = cache.open("5" * 32, 200_000, bring)
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
    while not (folder / f"{SHARD}.partial").exists() or (folder / f"{SHARD}.partial").stat().st_size < SIZE:
        assert time.monotonic() < until
        time.sleep(0.02)
    waits = run_python(BRINGS, folder, tmp_path / "log", 0)
    assert waits.stdout.readline() == "began\n"
    killed.kill()
    assert waits.communicate(timeout=100)[0] == "True\n"
    assert (tmp_path / "log").read_text() == "brought\n" * 2
    assert {path.name for path in folder.iterdir()} == {"lock", f"{SHARD}.json", f"{SHARD}.tar"}


def test_the_longest_unused_make_room(folder):
    cache, calls = NodeCache(str(folder), 3000), []
    for name in (A, B, C):
        fetched(cache, name, calls=calls)
    cache.touched.clear()
    fetched(cache, A, calls=calls)
    fetched(cache, D, calls=calls)
    assert {path.stem for path in folder.glob("*.tar")} == {A, C, D} and len(calls) == 4


def test_a_clock_that_was_wrong_keeps_nothing_for_ever(folder):
    cache = NodeCache(str(folder), 3000)
    for name in (A, B, C):
        fetched(cache, name)
    os.utime(folder / f"{B}.json", (4e9, 4e9))
    fetched(cache, D)
    assert {path.stem for path in folder.glob("*.tar")} == {A, C, D}


def test_what_a_dead_process_left_takes_no_room(folder):
    cache = NodeCache(str(folder), 3000)
    (folder / f"{D}.partial").write_bytes(bytes(2900))
    fetched(cache, A)
    assert not (folder / f"{D}.partial").exists()


def test_what_a_user_keeps_in_the_folder_is_neither_counted_nor_removed(folder, monkeypatch):
    def full(fd, content, offset):
        raise OSError(28, "No space left on device")

    own = {"train-000000.tar": bytes(2900), "train-000001.tar.partial": b"a draft", f"{A}.tar.partial": b"another"}
    for name, content in own.items():
        (folder / name).write_bytes(content)
    cache = NodeCache(str(folder), 3000)
    for name in (A, B, C, D):
        fetched(cache, name)
    assert {path.name for path in folder.glob("*.tar")} == {f"{name}.tar" for name in ("train-000000", B, C, D)}
    monkeypatch.setattr(node_cache.os, "pwrite", full)
    with pytest.raises(RunStopped, match="make room there"):  # once all that is the cache's own has made room
        fetched(cache, A)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"} == own


def test_a_record_that_is_lost_or_spoilt_means_another_transfer(folder):
    calls = []
    fetched(NodeCache(str(folder), 3000), A, calls=calls)
    (folder / f"{A}.json").write_text("spoilt")
    assert fetched(NodeCache(str(folder), 3000), A, b"y", calls) == b"y" * 1000
    (folder / f"{A}.json").unlink()
    assert fetched(NodeCache(str(folder), 3000), A, b"z", calls) == b"z" * 1000
    assert calls == [b"x", b"y", b"z"]


def test_a_copied_cache_is_verified_and_not_fetched(folder, tmp_path):
    fetched(NodeCache(str(folder), 3000), A)
    os.rename(folder, tmp_path / "moved")
    os.utime(tmp_path / "moved" / f"{A}.tar")
    assert fetched(NodeCache(str(tmp_path / "moved"), 3000), A, b"y") == b"x" * 1000


def test_a_transfer_that_fails_leaves_no_file(folder):
    cache = NodeCache(str(folder), 3000)

    def fails(writer):
        writer.write(b"half")
        raise RunStopped("gone")

    with pytest.raises(RunStopped, match="gone"):
        cache.open(A, 1000, fails)
    assert [path.name for path in folder.iterdir()] == ["lock"]
    assert fetched(cache, A) == b"x" * 1000


def test_a_file_that_is_just_given_its_name_is_counted(folder, monkeypatch):
    """Counted by one who saw it while it was being written, and not by the name that it had a moment later."""
    cache, other = NodeCache(str(folder), 3000), NodeCache(str(folder), 3000)
    fetched(cache, A), fetched(cache, B)
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
    keeper = threading.Thread(target=lambda: os.close(cache.open(C, 1000, brings_last)))
    keeper.start()
    until = time.monotonic() + 100
    while not (folder / f"{C}.partial").exists() or not (folder / f"{C}.partial").stat().st_size:
        assert time.monotonic() < until
        time.sleep(0.01)
    fetched(other, D)
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
    keeper = threading.Thread(target=fetched, args=(cache, A, b"x", calls))
    keeper.start()
    assert named.wait(100)
    assert fetched(other, A, b"y", calls) == b"x" * 1000
    keeper.join()
    assert calls == [b"x"] and not caplog.messages
