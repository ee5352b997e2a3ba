"""Every wait of the data path: nothing is waited for in silence, against a stop, or without end.

- What can hang (opening or reading a file, a worker's batch) runs in a thread of its own, so that the caller looks up
  several times a second. A thread that never comes back is left behind and keeps no process alive.
- A wait of some seconds says what it is for, and says so again at growing intervals.
- A process that is asked to stop stops waiting at once (`Stopped`); one that has waited too long ends (`RunStopped`).
- Progress is what counts: a walk over many files may take hours, as long as a header is read now and then.

How long, and who is asked about a stop, is one setting of the process: a stop is meant for all of it.
"""

import contextlib
import ctypes
import errno
import functools
import logging
import os
import queue
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass

import numpy as np
import torch

from prelude.data import host
from prelude.data.errors import RunStopped, Stopped
from prelude.data.host import own_fault
from prelude.data.signed_urls import shown

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 300.0  # less than NCCL's ten minutes, after which other ranks would end without a reason
TELL_AFTER_SECONDS = 10.0
LOOK_SECONDS = 0.1


@dataclass
class Patience:
    timeout_seconds: float = TIMEOUT_SECONDS
    setting: str = ""  # what a user writes to change it
    should_stop: Callable[[], bool] = staticmethod(lambda: False)


patience = Patience()


def wait_at_most(seconds: float, setting: str) -> None:
    """From now on a wait without progress ends after `seconds`; `setting` is the name of that to a user."""
    patience.timeout_seconds, patience.setting = seconds, setting


def stop_when(should_stop: Callable[[], bool]) -> None:
    """From now on every wait ends, with `Stopped`, once `should_stop` is true. It is asked several times a second."""
    patience.should_stop = should_stop


class Wait:
    """One wait, from its construction on. what: of it, in words; asked when it is told."""

    def __init__(self, what: Callable[[], str]):
        self.what = lambda: shown(what())
        self.began = time.monotonic()
        self.tell_after = min(TELL_AFTER_SECONDS, patience.timeout_seconds / 3)
        self.moves = _moves

    def look(self) -> None:
        """Called again and again while nothing has come. Raises Stopped and RunStopped."""
        if patience.should_stop():
            raise Stopped(f"while waiting for {self.what()}")
        if self.moves != _moves:
            self.moves, self.began = _moves, time.monotonic()
        waited = time.monotonic() - self.began
        if waited > patience.timeout_seconds:
            longer = f", or write a larger {patience.setting}" if patience.setting else ""
            raise RunStopped(
                f"Nothing has come for {patience.timeout_seconds:g} seconds while waiting for {self.what()}; look at "
                f"what serves it{longer}."
            )
        if waited > self.tell_after:
            log.warning("waiting for %s, for %.0f seconds now", self.what(), waited)
            self.tell_after = max(2 * self.tell_after, waited)


def moved() -> None:
    """Tells every wait of this process, and of the one that started it, that something has come."""
    global _moves
    _moves += 1
    if _own_moves is not None:
        _own_moves[0] = _moves


def moves() -> int:
    """How often something has come to this process. Told to those who wait for it."""
    return _moves


@contextlib.contextmanager
def while_it_moves(tell: Callable[[], None]) -> Iterator[None]:
    """Within it `tell` is called about once a second, from a thread, as long as something comes to this process."""
    left = threading.Event()

    def watch() -> None:
        before = _moves
        while not left.wait(min(1.0, patience.timeout_seconds / 5)):
            if before != _moves:
                before = _moves
                tell()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()


_moves = 0
_own_moves: np.ndarray | None = None  # on the board, in a process that has a line there


class Caller:
    """Makes calls, one at a time, in a thread of its own, which lives as long as this object is not `left`."""

    def __init__(self):
        self.calls: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(self.calls,), daemon=True).start()

    def __call__(self, function: Callable, what: Callable[[], str], look: Callable[[], None] | None = None):
        """What `function()` returns or raises. what: the wait is for. look: called at every look, besides. Raises as
        `Wait.look` does; the call then goes on, unheard."""
        future: Future = Future()
        self.calls.put((future, function))
        return _result(future, Wait(what), look)

    def left(self) -> None:
        self.calls.put(None)


def _serve(calls: queue.SimpleQueue) -> None:
    while (call := calls.get()) is not None:
        _keep(*call)
        del call  # a batch is not held until the next is asked for


def _result(future: Future, waiting: Wait, look: Callable[[], None] | None = None):
    while not (future.done() or wait([future], LOOK_SECONDS).done):
        waiting.look()
        if look is not None:
            look()
    return future.result()


def _keep(future: Future, function: Callable, *arguments) -> None:
    try:
        future.set_result(function(*arguments))
    except BaseException as error:  # it is raised again where the result is asked for
        future.set_exception(error)


def called(function: Callable, what: str | Callable[[], str]):
    """`function()`, waited for. what: for, asked when it is told where it changes."""
    (result,) = in_threads(lambda _: function(), [None], lambda _: what if isinstance(what, str) else what(), 1)
    return result


def in_threads(function: Callable, items: Iterable, what: Callable[[object], str], num_threads: int = 8) -> Iterator:
    """`function(item)` of every item, in order, while others are already under way: their waits overlap.

    what: the wait for an item is for. Raises what `function` raises, and as `Wait.look` does.
    """
    items = list(items)
    futures = [Future() for _ in items]
    places = iter(range(len(items)))  # shared by the threads

    def serve() -> None:
        for place in places:
            _keep(futures[place], function, items[place])
            moved()

    for _ in range(min(num_threads, len(items))):
        threading.Thread(target=serve, daemon=True).start()
    try:
        for place, future in enumerate(futures):
            yield _result(future, Wait(functools.partial(what, items[place])))
            futures[place] = None
    finally:
        for _ in places:
            pass  # nothing more is begun


def open_file(path: str) -> int:
    """A descriptor to read a file by offset. Raises OSError where it cannot be opened, or is a pipe or a device, which
    have no offsets; the open of a pipe would wait for somebody to write. Raises NoMoreFiles."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        own_fault(error)
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "a pipe or a device, and not a file")
    return fd


# ---- what a process is reading


class Board:
    """What each of several processes is doing, in words that the one that started them can read at any time, and
    whether something comes to it."""

    SIZE = 512  # bytes of UTF-8

    def __init__(self, num_processes: int):
        self.lines = torch.zeros(num_processes, self.SIZE, dtype=torch.uint8).share_memory_()
        self.counts = torch.zeros(num_processes, dtype=torch.int64).share_memory_()

    def line(self, process: int) -> str:
        return _words(self.lines[process].numpy())

    def moves(self) -> int:
        """How often something has come to any of them."""
        return int(self.counts.sum())

    def written_by(self, process: int) -> None:
        """From now on this process' `doing` goes to its line, and what `moved` there is counted."""
        global _line, _own_moves
        _line = memoryview(self.lines[process].numpy())
        _own_moves = self.counts[process : process + 1].numpy()


def doing(words: bytes) -> None:
    """Notes what this process is about to wait for. Cheap enough for every read."""
    size = min(len(words), Board.SIZE - 1)
    _line[:size] = words[:size]
    _line[size] = 0


def doing_now() -> str:
    """What this process noted last."""
    return _words(_line)


def _words(line: np.ndarray | memoryview) -> str:
    return shown(bytes(line).partition(b"\0")[0].decode(errors="ignore"))


_line = memoryview(bytearray(Board.SIZE))


def shared_memory() -> str:
    """The state of the memory that large batches travel through, in words."""
    try:
        status = os.statvfs(host.SHARED_MEMORY)
    except OSError:
        return f"{host.SHARED_MEMORY} does not exist"
    size, free = (count * status.f_frsize / 2**20 for count in (status.f_blocks, status.f_bavail))
    return f"{host.SHARED_MEMORY} has {free:.4g} of {size:.4g} MiB free"


def state_of(pid: int) -> str:
    """Why a process does not answer, where the kernel knows: `stopped`, `in a wait for a disk`, else ""."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            letter = file.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
    return {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "in a wait for a disk"}.get(letter, "")


def end_with_parent() -> None:
    """Called in a new process: from now on it ends with the thread that started it, on Linux, whatever it waits for."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None  # found before any fork
