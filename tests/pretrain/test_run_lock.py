"""One start at a time: who holds a run folder, and who is taken for dead."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from prelude.data.errors import UserError
from prelude.pretrain import run_lock
from prelude.pretrain.run_lock import NAME, RunLock

HOLD = """
import sys, time
from pathlib import Path
from prelude.pretrain import run_lock
run_lock.HEARTBEAT = 0.05
lock = run_lock.RunLock(Path(sys.argv[1]))
lock.hold()
print("held", flush=True)
sys.stdin.read()
lock.release()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds `run`."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], **pipes, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def on_another_host(folder, **changes) -> None:
    path = folder / NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"host": "node7", "boot": "another"} | changes))


def without_locks(monkeypatch, number=errno.ENOLCK):
    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_lock.fcntl, "lockf", lockf)


def test_a_disk_too_full_for_the_lock_is_left_as_it_was(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_lock, "_write", full)
    with pytest.raises(OSError):
        RunLock(tmp_path / "deep" / "run").hold()
    assert not (tmp_path / "deep").exists()


def test_a_second_start_is_refused_naming_both(tmp_path, holder):
    with pytest.raises(UserError) as refused:
        RunLock(tmp_path / "run").hold()
    for process in (holder.pid, os.getpid()):
        assert f"process {process} on {socket.gethostname()}" in str(refused.value)


def test_the_holder_that_is_done_leaves_no_trace(tmp_path, holder):
    holder.communicate("")
    assert not (tmp_path / "run").exists()
    lock = RunLock(tmp_path / "run")
    lock.hold()
    lock.release()


def test_a_holder_that_was_killed_is_recognised(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / NAME).exists()
    lock = RunLock(tmp_path / "run")
    lock.hold()
    assert json.loads((tmp_path / "run" / NAME).read_text())["process"] == os.getpid()
    lock.release()


def test_a_holder_on_another_host_is_refused_by_name(tmp_path, holder):
    on_another_host(tmp_path / "run", process=11)
    with pytest.raises(UserError, match="process 11 on node7"):
        RunLock(tmp_path / "run").hold()


@pytest.mark.parametrize("locks", ["of this host alone", "none"])
def test_where_locks_do_not_reach_another_host_a_heartbeat_tells(tmp_path, holder, monkeypatch, locks):
    monkeypatch.setattr(run_lock.fcntl, "lockf", lambda *_: None)
    if locks == "none":
        without_locks(monkeypatch)
    on_another_host(tmp_path / "run")
    with pytest.raises(UserError, match="on node7"):
        RunLock(tmp_path / "run").hold()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    monkeypatch.setattr(run_lock, "PATIENCE", 0.3)
    said = []
    lock = RunLock(tmp_path / "run", say=said.append)
    lock.hold()
    lock.release()
    assert "was held by process" in said[0] and "on node7" in said[0]


def test_whether_a_folder_is_held_is_found_out_without_waiting(tmp_path, holder, monkeypatch):
    folder = tmp_path / "run"
    asked = RunLock(folder)
    assert asked.is_held() is True and RunLock(tmp_path / "none").is_held() is None
    without_locks(monkeypatch)
    assert asked.is_held() is True  # looked up among the processes
    monkeypatch.undo()
    holder.kill()
    holder.wait()
    assert asked.is_held() is False and (folder / NAME).exists()
    without_locks(monkeypatch)
    assert asked.is_held() is False
    monkeypatch.undo()
    on_another_host(folder)
    assert asked.is_held() is True  # it was touched a moment ago
    os.utime(folder / NAME, (1e9, 1e9))
    assert asked.is_held() is None  # by this host's clock
    (folder / NAME).write_text("")
    assert asked.is_held() is None


def test_without_locks_a_holder_on_this_host_is_looked_up_among_its_processes(tmp_path, holder, monkeypatch):
    without_locks(monkeypatch, errno.EOPNOTSUPP)
    with pytest.raises(UserError, match=f"process {holder.pid}"):
        RunLock(tmp_path / "run").hold()
    path = tmp_path / "run" / NAME
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | {"started": "1"}))  # the number was given to another process since
    lock = RunLock(tmp_path / "run")
    lock.hold()
    lock.release()


@pytest.mark.parametrize("left", [b"", b'{"host": "no', b"\xff\xfe", b"[]"])
def test_half_a_lock_that_a_crash_left_stops_nobody(tmp_path, left):
    (tmp_path / NAME).write_bytes(left)
    lock = RunLock(tmp_path)
    lock.hold()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_child_that_outlives_a_killed_holder_keeps_nobody_out(tmp_path):
    """As data workers do for a moment."""
    forking = HOLD.replace(
        'print("held", flush=True)', "import os, signal; print(os.fork() or signal.pause(), flush=True)"
    )
    holder = subprocess.Popen([sys.executable, "-c", forking, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    holder.kill()
    holder.wait()
    try:
        os.kill(child, 0)
        lock = RunLock(tmp_path)
        lock.hold()
        lock.release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_two_starts_of_one_process_are_two(tmp_path):
    first = RunLock(tmp_path)
    first.hold()
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        RunLock(tmp_path).hold()
    first.release()


def test_a_lock_that_is_a_link_is_no_lock(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / NAME).symlink_to("mine")
    with pytest.raises(OSError):
        RunLock(tmp_path).hold()
    assert (tmp_path / "mine").read_text() == "mine"
