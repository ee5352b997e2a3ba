"""Writing into a run folder: full disks, links that lead elsewhere, files that a crash left."""

import errno
import logging
import os
import signal
import stat
import subprocess

import pytest
import torch
from forked import is_killed

from prelude.pretrain import files
from prelude.pretrain.files import Growing, Lines, Tolerant, read_lines, save_file, write_whole


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount one")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder) -> None:
    with pytest.raises(OSError), open(folder / "filler", "wb", buffering=0) as filler:
        while filler.write(b"\0" * 4096):
            continue


def test_a_full_disk_takes_no_line_by_halves_and_what_waited_follows(small_disk, caplog):
    lines = Lines(small_disk / "metrics.jsonl")
    for step in range(1, 4):
        lines.add({"step": step, "text": "x" * 3000})
    fill(small_disk)
    for step in range(4, 7):
        lines.add({"step": step, "text": "x" * 3000})
    assert [line["step"] for line in lines.read()] == [1, 2, 3, 4, 5, 6]
    assert (small_disk / "metrics.jsonl").read_bytes().endswith(b"\n")
    (told,) = caplog.messages
    assert "metrics.jsonl cannot be written (No space left on device); the run goes on" in told
    (small_disk / "filler").unlink()
    lines.sync()
    assert [line["step"] for line in read_lines(small_disk / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert not lines.waiting


def test_a_file_that_is_replaced_is_as_it_was_where_the_disk_is_full(small_disk):
    write_whole(small_disk / "config.yaml", "old\n")
    fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        write_whole(small_disk / "config.yaml", "new\n" * 100_000)
    assert sorted(path.name for path in small_disk.iterdir()) == ["config.yaml", "filler"]
    assert (small_disk / "config.yaml").read_text() == "old\n"


def test_a_disk_that_is_gone_and_comes_back_costs_no_line(tmp_path, caplog):
    folder, away = tmp_path / "run", tmp_path / "away"
    folder.mkdir()
    lines = Lines(folder / "online.jsonl")
    lines.add({"step": 1})
    folder.rename(away)
    lines.add({"step": 2})
    lines.sync()
    away.rename(folder)
    lines.add({"step": 3})
    assert [line["step"] for line in read_lines(folder / "online.jsonl")] == [1, 2, 3]
    assert len(caplog.messages) == 1


def test_a_pipe_in_a_files_place_is_told_and_not_waited_for(tmp_path, caplog):
    os.mkfifo(tmp_path / "metrics.jsonl")
    lines = Lines(tmp_path / "metrics.jsonl")
    lines.start(5)
    lines.add({"step": 6})
    assert caplog.messages and lines.read() == [{"step": 6}]  # kept for a better day


def test_lines_that_cannot_be_read_are_not_known_and_that_is_told_once(tmp_path, monkeypatch, caplog):
    def refused(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    lines = Lines(tmp_path / "test.jsonl")
    lines.add({"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(files.Path, "read_bytes", refused)
        lines.start(5)
        assert lines.read() == []
    assert len(caplog.messages) == 1 and "test.jsonl" in caplog.messages[0] and "Input/output" in caplog.messages[0]
    assert lines.read() == [{"step": 1}]


def test_what_is_not_worth_the_memory_is_dropped(tmp_path):
    file = Growing(tmp_path / "run" / "events")
    file.append(b"picture", keep=False)
    file.append(b"number")
    (tmp_path / "run").mkdir()
    file.append(b"!")
    assert (tmp_path / "run" / "events").read_bytes() == b"number!"


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_kill_while_lines_are_dropped_leaves_all_of_them(tmp_path, operation):
    lines = Lines(tmp_path / "metrics.jsonl")
    for step in range(1, 9):
        lines.add({"step": step})

    def start():
        setattr(os, operation, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        lines.start(5)

    assert is_killed(start)
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 8
    Lines(tmp_path / "metrics.jsonl").start(5)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("damage", [b"\xff\xfe\n", b"\x00" * 40 + b"\n", b"[1]\n", b'{"step": "x"}\n', b"12\n"])
def test_damage_in_the_middle_costs_that_line_and_is_told(tmp_path, caplog, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'{"step": 2}\n{"step": 3, "lo')
    assert [line["step"] for line in read_lines(path)] == [1, 2]
    Lines(path).start(2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert any("1 damaged lines are left out" in message for message in caplog.messages)


def test_links_are_replaced_and_what_they_lead_to_stays(tmp_path):
    for name in ("whole", "grown", "tensors", ".tmp-whole"):
        (tmp_path / f"target-{name}").write_text("mine")
        (tmp_path / name).symlink_to(f"target-{name}")
    write_whole(tmp_path / "whole", "ours")
    Growing(tmp_path / "grown").append(b"ours")
    save_file({"a": torch.zeros(2)}, tmp_path / "tensors")
    for name in ("whole", "grown", "tensors", ".tmp-whole"):
        assert (tmp_path / f"target-{name}").read_text() == "mine"
        assert not (tmp_path / name).is_symlink()


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_new_files_have_the_permissions_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "whole", "x")
        Growing(tmp_path / "grown").append(b"x")
        save_file({"a": torch.zeros(2)}, tmp_path / "tensors")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_the_bytes_reach_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(files.os, "replace", lambda *paths: (done.append("name"), replace(*paths)))
    write_whole(tmp_path / "config.yaml", "x")
    assert done == ["file", "name", "folder"]


def test_only_what_the_disk_does_is_tolerated_and_told_once_a_failure(caplog):
    tolerant = Tolerant("a log")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with tolerant:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        with tolerant:
            pass
        with tolerant:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert len(caplog.messages) == 2
    with pytest.raises(ValueError), tolerant:
        raise ValueError
