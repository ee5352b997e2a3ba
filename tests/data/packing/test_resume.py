"""A packing that is killed, disturbed or repeated ends with the bytes of one that was left alone."""

import errno
import fcntl
import hashlib
import multiprocessing
import os
import signal
import subprocess
import time

import numpy as np
import pytest
from forked import alone
from packed_shards import read_shards

from prelude.data import index_file
from prelude.data.errors import RunStopped, UserError
from prelude.data.packing import pack as packing_of
from prelude.data.packing import writer as writing
from prelude.data.packing.pack import Packing, pack
from prelude.data.packing.source import SourceOptions
from prelude.data.tar_index import index_tar

SETTINGS = {"per_shard": 8, "val_share": 0.2, "short_side": 10}


@pytest.fixture
def photos(write_files, picture):
    return write_files("photos", {f"{'ab'[n % 2]}/{n}.png": picture(n, height=40, width=50) for n in range(160)})


@pytest.fixture
def start():
    """start(source, folder, workers) -> a process that packs. Forked: another interpreter takes seconds to import."""
    started = []

    def run(source, folder, workers: int):
        packing = Packing(to=str(folder), workers=workers, **SETTINGS)

        def packs():
            alone()
            pack(str(source), SourceOptions(), packing)

        process = multiprocessing.get_context("fork").Process(target=packs)
        process.start()
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.join()


def content_of(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("workers", [1, 3])
def test_killed_anywhere_and_started_again_the_same_bytes(photos, packed, tmp_path, start, workers):
    whole, _ = packed(photos, to="whole", **SETTINGS)
    killed = tmp_path / "killed"
    for wanted in (1, 6, 14, 20):  # shards that are there when the kill comes
        process = start(photos, killed, workers)
        until = time.monotonic() + 60
        while process.is_alive() and len(list(killed.glob("*.tar"))) < wanted and time.monotonic() < until:
            time.sleep(0.001)
        process.kill()
        process.join()
        for shard in killed.glob("*.tar"):  # what has its name is whole
            assert shard.read_bytes() == (whole / shard.name).read_bytes()
    finished = start(photos, killed, workers)
    finished.join(60)
    assert finished.exitcode == 0
    assert content_of(killed) == content_of(whole)
    assert len(list(whole.glob("*.tar"))) == 20


def dying_after(operations: int):
    """Kills this process in the middle of its file operations."""
    left = [operations]

    def wrap(function):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    writing._Hashed.write, os.fsync, os.replace = map(wrap, (writing._Hashed.write, os.fsync, os.replace))


def test_killed_in_the_middle_of_file_operations_the_same_bytes(write_files, picture, packed, tmp_path):
    source = write_files("few", {f"{'ab'[n % 2]}/{n}.png": picture(n) for n in range(20)})
    whole, _ = packed(source, to="whole", per_shard=4)
    killed, context = tmp_path / "killed", multiprocessing.get_context("fork")

    def run(operations: int):
        alone()
        dying_after(operations)
        pack(str(source), SourceOptions(), Packing(to=str(killed), per_shard=4))

    deaths, code = 0, None
    while code != 0:
        process = context.Process(target=run, args=(1 + 3 * deaths,))
        process.start()
        process.join(60)
        code, deaths = process.exitcode, deaths + 1
        assert code in (0, -signal.SIGKILL)
        for shard in killed.glob("*.tar"):
            assert shard.read_bytes() == (whole / shard.name).read_bytes()
    assert content_of(killed) == content_of(whole) and deaths > 10


def test_workers_end_with_the_process_that_started_them(photos, tmp_path, start):
    process = start(photos, tmp_path / "out", 2)
    until = time.monotonic() + 60
    children = []
    while not children and time.monotonic() < until:
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
            children = file.read().split()
    process.kill()
    process.join()
    while any(os.path.exists(f"/proc/{child}") for child in children):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_finished_it_is_finished_and_another_packing_is_refused(photos, packed):
    folder, summary = packed(photos, per_shard=40)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert packed(photos, per_shard=40)[1] == summary
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    with pytest.raises(UserError, match="seed 0 -> 1.*another --to or --name"):
        packed(photos, per_shard=40, seed=1)
    (photos / "a" / "0.png").write_bytes((photos / "a" / "2.png").read_bytes())
    with pytest.raises(UserError, match="another source"):
        packed(photos, per_shard=40)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_shards_that_are_not_ours_are_never_touched(photos, packed, write_files):
    folder = write_files("shards", {"val-000000.tar": b"precious"})
    with pytest.raises(UserError, match="val-000000.tar is there already"):
        packed(photos, val_share=0.1)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"val-000000.tar": b"precious"}
    packed(photos)  # without val, it is in nobody's way


def test_a_shard_that_has_changed_since_is_told(photos, packed):
    folder, _ = packed(photos)
    with open(folder / "train-000000.tar", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="train-000000.tar is missing or has changed"):
        packed(photos)


def test_two_at_once_are_refused(photos, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(packing_of, "_PATIENCE", 0.2)
    (tmp_path / "shards" / ".train.packing").mkdir(parents=True)
    with open(tmp_path / "shards" / ".train.packing" / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="Another process is packing train"):
            packed(photos)
    packed(photos)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_sentence_and_a_place_to_go_on_from(photos, packed, tmp_path, monkeypatch, workers):
    whole, _ = packed(photos, to="whole", per_shard=20)
    write = writing._Hashed.write

    def full(self, content):
        if self.num_bytes > 20_000 and "train-000003" in self.file.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, content)

    monkeypatch.setattr(writing._Hashed, "write", full)
    with pytest.raises(RunStopped, match="no room left in .*same command again") as caught:
        packed(photos, per_shard=20, workers=workers)
    assert "\n" not in str(caught.value)
    left = list((tmp_path / "shards").glob("train*"))
    assert not any(path.name.endswith(".partial") for path in left) and len(left) >= 3
    monkeypatch.undo()
    monkeypatch.setenv("PRELUDE_CACHE", str(tmp_path / "cache"))
    folder, _ = packed(photos, per_shard=20)
    assert content_of(folder) == content_of(whole)


def test_a_worker_that_dies_is_one_sentence(photos, packed, monkeypatch):
    monkeypatch.setattr(writing, "prepare", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RunStopped, match="most often for want of memory; write a smaller --workers"):
        packed(photos, per_shard=20, workers=2)


def test_checksums_are_those_that_other_tools_compute(photos, packed):
    folder, _ = packed(photos, per_shard=40, val_share=0.5)
    done = subprocess.run(["sha256sum", "-c", "train.sha256"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("OK") == len(list(folder.glob("*.tar")))


def test_the_index_beside_shards_says_what_they_hold(photos, packed):
    folder, _ = packed(photos, per_shard=40, val_share=0.5)
    told = {line.split()[1]: line.split()[0] for line in (folder / "train.sha256").read_text().splitlines()}
    assert sorted(path.name for path in folder.glob("*.npz")) == ["train.index.npz", "val.index.npz"]
    for split in ("train", "val"):
        entries = index_file.read((folder / f"{split}.index.npz").read_bytes())
        assert sorted(entries) == sorted(path.name for path in folder.glob(f"{split}-*.tar"))
        for name, entry in entries.items():
            assert entry.sha256 == told[name] and entry.size == (folder / name).stat().st_size
            for label in ("", "cls"):
                found, expected = entry.index(label), index_tar(str(folder / name), label)
                assert np.array_equal(found.images, expected.images) and np.array_equal(found.labels, expected.labels)
                assert (found.content, found.label_content) == (expected.content, expected.label_content)


@pytest.mark.parametrize("group", ["", "parent"])
def test_val_has_its_share_and_whole_groups(write_files, picture, packed, group):
    names = [f"patient{n // 3}/{n}.png" for n in range(60)]
    source = write_files("patients", {name: picture(n) for n, name in enumerate(names)})
    folder, _ = packed(source, val_share=0.3, per_shard=7, options={"label": ("none",), "group": group})
    train, val = ({s["source"] for s in read_shards(folder, split)} for split in ("train", "val"))
    assert train | val == set(names) and not train & val and len(val) == 18
    shared = {name.partition("/")[0] for name in train} & {name.partition("/")[0] for name in val}
    assert not shared if group else shared
    with pytest.raises(UserError, match="leaves one side empty"):
        packed(source, to="other", val_share=0.001, options={"label": ("none",), "group": "top"})


def test_nothing_written_depends_on_the_workers_or_the_time(photos, packed):
    one, _ = packed(photos, to="one")
    two, _ = packed(photos, to="two", workers=2)
    assert content_of(one) == content_of(two)
