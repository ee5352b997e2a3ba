"""Waits for local data: told, ended by a stop at once, and ended by themselves; workers that hang or die."""

import contextlib
import logging
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import threading
import time

import pytest
import torch
from torch.utils.data import IterableDataset

from prelude.data import stores, waiting, workers
from prelude.data.batch import View, ViewPlan
from prelude.data.errors import RunStopped, Stopped, UserError
from prelude.data.loader import Loader, build_loader, one_pass
from prelude.data.members import label_members
from prelude.data.shards import ShardIndex
from prelude.data.subset import balanced_subset

PLAN = ViewPlan((View((6, 6)),))


@pytest.fixture
def hung(monkeypatch):
    """hung(path): from now on nobody comes back from opening it, as on a file system that does not answer."""
    answered, hanging, real = threading.Event(), set(), os.open

    def open_or_hang(path, *rest, **more):
        if str(path) in hanging:
            answered.wait(100)
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", open_or_hang)
    yield lambda path: hanging.add(str(path))
    answered.set()


@contextlib.contextmanager
def stop_is_asked_for(patience):
    """In the middle of what follows, which is then left at once: no test here waits for 60 seconds."""
    asked = threading.Event()
    patience.should_stop = asked.is_set
    timer = threading.Timer(0.3, asked.set)
    timer.start()
    yield
    timer.cancel()


# ---- one wait


def test_a_wait_is_told_again_and_again_and_ends(patience, caplog):
    patience.timeout_seconds, patience.setting = 1.0, "data.timeout_seconds"
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(RunStopped, match="for 1 seconds while waiting for godot; .*larger data.timeout_seconds"),
    ):
        waiting.called(threading.Event().wait, "godot")
    assert len([r for r in caplog.records if "waiting for godot, for" in r.message]) == 2


def test_a_wait_that_makes_progress_does_not_end(patience):
    patience.timeout_seconds = 0.5

    def slow():
        for _ in range(10):
            time.sleep(0.15)
            waiting.moved()
        return "come"

    assert waiting.called(slow, "godot") == "come"


def test_results_come_in_order_and_the_first_error_is_raised_in_its_place():
    def function(n):
        time.sleep(0.02 * (n % 3))
        return n if n < 15 else 1 // 0

    found = waiting.in_threads(function, range(20), str)
    assert [next(found) for _ in range(15)] == list(range(15))
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_an_error_of_the_file_system_about_time_is_an_error_and_not_a_wait():
    def function():
        raise TimeoutError(110, "Connection timed out")

    with pytest.raises(TimeoutError, match="Connection timed out"):
        waiting.called(function, "a file")


# ---- the start


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_shard_that_cannot_be_opened_ends_the_walk(place, write_shards, hung, patience):
    paths = write_shards([3, 3, 3])
    path = paths[0 if place == "first" else -1]
    hung(path)
    patience.timeout_seconds = 0.5
    with pytest.raises(RunStopped, match=f"waiting for the headers of {path}"):
        ShardIndex(paths)


def test_a_stop_is_obeyed_during_the_walk(write_shards, hung, patience):
    paths = write_shards([3, 3])
    hung(paths[1])
    with stop_is_asked_for(patience), pytest.raises(Stopped, match=f"waiting for the headers of {paths[1]}"):
        ShardIndex(paths)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo.tar")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.tar"))
    for path in (tmp_path / "fifo.tar", tmp_path / "socket.tar", "/dev/zero"):
        with pytest.raises(UserError, match=f"{path} .* is a pipe or a device.*write 'pipe:cat {path}'"):
            build_loader(str(path), PLAN, seed=0, micro_batch=2)


def test_a_shard_that_has_become_a_pipe_is_damage_and_not_a_wait(write_shards):
    paths = write_shards([30, 30])
    loader = Loader(ShardIndex(paths), PLAN, seed=0, micro_batch=6)
    os.unlink(paths[0])
    os.mkfifo(paths[0])
    for _ in range(10):
        assert len(next(loader)) == 6
    assert {reason for _, reason in loader.bad.counts} == {"cannot be read: a pipe or a device, and not a file"}


def test_hung_threads_keep_no_process_alive(write_shards, run_python):
    code = (
        "import os, sys, threading, prelude.data.source as s, prelude.data.waiting as w\n"
        "from prelude.data.batch import View, ViewPlan\nfrom prelude.data.loader import build_loader\n"
        "import torch; torch.set_num_threads(4)\n"
        "loader = build_loader(sys.argv[1], ViewPlan((View((6, 6)),)), seed=0, micro_batch=8)\n"
        "os.pread = lambda *_: threading.Event().wait()\nw.patience.timeout_seconds = 0.5\nnext(loader)\n"
    )
    process = run_python(code, write_shards([20])[0])
    assert process.wait(timeout=100) == 1
    assert "RunStopped: Nothing has come for 0.5 seconds" in process.communicate()[1]


# ---- batches and labels


def reads(index, num_workers):
    loader = Loader(index, PLAN, seed=0, micro_batch=2, num_workers=num_workers)

    def read():
        try:
            while True:
                next(loader)
        finally:
            loader.close()

    return read


def evaluates(index, num_workers):
    return lambda: list(one_pass(index, PLAN, batch_size=2, num_workers=num_workers))


@pytest.mark.parametrize("use", [reads, evaluates])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_that_hangs_is_named(use, num_workers, write_shards, hung, patience):
    paths = write_shards([10, 10])
    used = use(ShardIndex(paths), num_workers)
    hung(paths[1])
    patience.timeout_seconds = 1.0
    with pytest.raises(RunStopped, match=f"waiting for the next batch.*it reads {paths[1]}"):
        used()


@pytest.mark.parametrize("use", [reads, evaluates])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stop_is_obeyed_while_a_shard_hangs(use, num_workers, write_shards, hung, patience):
    paths = write_shards([10, 10])
    used = use(ShardIndex(paths), num_workers)
    hung(paths[1])
    before = set(multiprocessing.active_children())
    with stop_is_asked_for(patience), pytest.raises(Stopped, match="waiting for the next batch"):
        used()
    assert not set(multiprocessing.active_children()) - before


def test_images_that_hang_while_they_are_looked_at_are_named(write_shards, hung, patience):
    paths = write_shards([10, 10])
    index = ShardIndex(paths)
    hung(paths[0])
    patience.timeout_seconds = 0.5
    with pytest.raises(RunStopped, match=f"waiting for an image in {paths[0]}"):
        Loader(index, PLAN, seed=0, micro_batch=2)


def test_labels_that_hang_are_named(write_shards, hung, patience):
    paths = write_shards([10, 10])
    index = ShardIndex(paths, "cls")
    hung(paths[1])
    patience.timeout_seconds = 0.5
    with pytest.raises(RunStopped, match="waiting for the labels in"):
        list(label_members(index))
    with pytest.raises(RunStopped, match="waiting for (a label|the labels) in"):
        balanced_subset(index, "cls", 15, seed=0)


# ---- workers


class Stall(IterableDataset):
    """How long a server may be silent, as this process sees it."""

    def __iter__(self):
        yield {"seconds": stores.stall_seconds()}


def test_a_worker_that_imports_everything_anew_gives_a_store_a_part_of_the_trainers_patience(monkeypatch):
    """As by `spawn` and `forkserver`, which leave behind what was set in the trainer."""
    start = workers._start

    def anew(*arguments, **settings):
        waiting.patience.timeout_seconds = waiting.TIMEOUT_SECONDS
        start(*arguments, **settings)

    monkeypatch.setattr(workers, "_start", anew)
    waiting.wait_at_most(40.0, "data.timeout_seconds")
    assert [told["seconds"] for told in workers.Workers(Stall(), 1).results()] == [10.0]


# By a pipe that has no room for a whole batch, so that workers are in the middle of one most of the time.
BY_PIPE = ViewPlan((View((128, 128)),))


@pytest.fixture(params=["by pipe", "by shared memory"])
def started(write_shards, monkeypatch, request):
    """A loader of two workers that has given a batch, and its workers in the order of their turns."""
    before = set(multiprocessing.active_children())
    if request.param == "by shared memory":
        monkeypatch.setattr(workers, "SENT_BYTES", 0)
    loader = Loader(ShardIndex(write_shards([34])), BY_PIPE, seed=0, micro_batch=2, num_workers=2)
    next(loader)
    processes = sorted(set(multiprocessing.active_children()) - before, key=lambda worker: worker._identity)
    yield loader, processes
    loader.close()
    assert not any(worker.is_alive() for worker in processes)


def exhaust(loader):
    while True:
        next(loader)


def test_a_worker_that_is_stopped_is_named_and_given_up(started, patience):
    loader, workers = started
    os.kill(workers[1].pid, signal.SIGSTOP)
    patience.timeout_seconds = 1.0
    with pytest.raises(RunStopped, match=rf"data worker 1 \(process {workers[1].pid}, stopped by a signal"):
        exhaust(loader)


@pytest.mark.skipif(torch.cuda.is_available(), reason="no batch to a GPU goes through a pipe")
def test_a_worker_that_is_stopped_in_mid_message_is_named_with_the_one_it_keeps_waiting(
    write_shards, patience, monkeypatch
):
    travel, may_go = workers._ready_to_travel, multiprocessing.Event()

    def second_waits(arrays, **how):
        if torch.utils.data.get_worker_info().id == 1:
            may_go.wait(60)
        return travel(arrays, **how)

    monkeypatch.setattr(workers, "_ready_to_travel", second_waits)
    before = set(multiprocessing.active_children())
    loader = Loader(ShardIndex(write_shards([34])), BY_PIPE, seed=0, micro_batch=2, num_workers=2)
    next(loader)
    first, second = sorted(set(multiprocessing.active_children()) - before, key=lambda worker: worker._identity)
    time.sleep(1)  # the first has the pipe full of its second batch by now
    os.kill(first.pid, signal.SIGSTOP)
    may_go.set()
    patience.timeout_seconds = 1.0
    told = (
        rf"data worker 1 \(process {second.pid}; .*\), while data worker 0 \(process {first.pid}\) is stopped by a sig"
    )
    with pytest.raises(RunStopped, match=told):
        exhaust(loader)
    loader.close()


def test_a_worker_that_goes_on_again_has_lost_nothing(started, write_shards):
    loader, workers = started
    os.kill(workers[0].pid, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (workers[0].pid, signal.SIGCONT)).start()
    same = Loader(loader.index, PLAN, seed=0, micro_batch=2)
    next(same)
    for _ in range(12):
        assert torch.equal(next(loader).sample_ids, next(same).sample_ids)


@pytest.mark.parametrize(
    "number, sentence",
    [
        (signal.SIGKILL, "SIGKILL.* the kernel's OOM killer .* write a smaller data.num_workers"),
        (signal.SIGBUS, "SIGBUS.* /dev/shm has .* MiB free.* --shm-size"),
        (signal.SIGSEGV, "SIGSEGV"),
    ],
)
def test_how_a_worker_died_is_said(started, number, sentence):
    loader, workers = started
    os.kill(workers[0].pid, number)
    with pytest.raises(RunStopped, match=f"A data worker died .process {workers[0].pid}, {sentence}"):
        exhaust(loader)


def test_a_death_does_not_break_into_what_the_trainer_does(started):
    loader, workers = started
    os.kill(workers[0].pid, signal.SIGKILL)
    workers[0].join()
    time.sleep(0.1)  # a signal's handler runs between two lines like these
    with pytest.raises(RunStopped, match="OOM killer"):
        exhaust(loader)


# ---- shared memory


def no_room(monkeypatch, times, sent_bytes=0):
    """Workers find /dev/shm full so many times."""
    monkeypatch.setattr(workers, "SENT_BYTES", sent_bytes)
    real, left = torch.Tensor.share_memory_, [times]

    def share(tensor):
        if tensor.ndim == 4 and left[0] > 0:
            left[0] -= 1
            raise RuntimeError(
                "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
            )
        return real(tensor)

    monkeypatch.setattr(torch.Tensor, "share_memory_", share)


def test_a_batch_waits_for_room_in_shared_memory(write_shards, monkeypatch):
    no_room(monkeypatch, 3)
    loader = Loader(ShardIndex(write_shards([34])), PLAN, seed=0, micro_batch=2, num_workers=2)
    same = Loader(loader.index, PLAN, seed=0, micro_batch=2)
    for _ in range(6):
        assert torch.equal(next(loader).views[0], next(same).views[0])
    loader.close()


def test_a_small_batch_needs_no_shared_memory(write_shards, monkeypatch, patience):
    no_room(monkeypatch, 10**9, workers.SENT_BYTES)
    patience.timeout_seconds = 5.0
    loader = Loader(ShardIndex(write_shards([34])), PLAN, seed=0, micro_batch=2, num_workers=2)
    same = Loader(loader.index, PLAN, seed=0, micro_batch=2)
    for _ in range(6):
        assert torch.equal(next(loader).views[0], next(same).views[0])
    loader.close()


def test_shared_memory_that_stays_full_is_named(write_shards, monkeypatch, patience):
    no_room(monkeypatch, 10**9)
    patience.timeout_seconds = 1.0
    loader = Loader(ShardIndex(write_shards([34])), PLAN, seed=0, micro_batch=2, num_workers=1)
    with pytest.raises(
        RunStopped, match="it needs .* MiB for a batch and /dev/shm has .* of .* MiB free; .*--shm-size"
    ):
        next(loader)
    loader.close()


REAL = """
import sys
from prelude.data import waiting
from prelude.data.batch import View, ViewPlan
from prelude.data.loader import build_loader
waiting.patience.timeout_seconds = 2
loader = build_loader(sys.argv[1], ViewPlan((View((128, 128)),)), seed=0, micro_batch=int(sys.argv[2]), num_workers=2)
try:
    for _ in range(12):
        next(loader)
except Exception as error:
    print(f"{type(error).__name__}: {error}")
else:
    print("all came")
"""


@pytest.mark.parametrize(
    "size, micro_batch, said",
    [
        ("5m", 25, "all came"),  # five batches of 1.2 MB at once do not fit, and need not
        ("1m", 30, "RunStopped: .* it needs 1.406 MiB for a batch and /dev/shm has .* of 1 MiB free"),
        ("4k", 5, "RunStopped: 2 data workers cannot be started .*; /dev/shm has .* of 0.003906 MiB free"),
    ],
)
def test_a_real_shared_memory_of_this_size(size, micro_batch, said, write_shards, run_python):
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("a mount of its own takes rights that this user does not have")
    shards = write_shards([60])[0]
    code = (
        "import os, subprocess, sys\n"
        f"done = subprocess.run(['unshare', '-m', 'sh', '-c', 'mount -t tmpfs -o size={size} none /dev/shm && "
        "exec \"$@\"', 'sh', sys.executable, '-c', sys.argv[1], *sys.argv[2:]])\n"
        "sys.exit(done.returncode)\n"
    )
    out, err = run_python(code, REAL, shards, micro_batch).communicate(timeout=200)
    assert re.search(said, out), out + err
