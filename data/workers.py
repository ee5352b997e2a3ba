"""The processes that make batches beside the one that trains.

- How they are started is said, and not left to the version of Python. By `fork` they cost nothing at the start and
  share all memory. By `forkserver` and `spawn`, for libraries that do not survive a fork, they import everything anew,
  and what they are sent is no larger for more samples, as the index lies in files.
- Workers ignore the signals that end a run, so that the step under way can finish and be saved. They end with the
  process that started them, however it ends and whatever they are waiting for, and what they started ends with them.
- A worker that dies is an error and not a wait, told when its batch is due and never in the middle of a step.
- A worker that finds no room in /dev/shm for a batch waits for it. Left to torch, the batch would be lost there, and
  the trainer would wait for it for ever.
"""

import atexit
import contextlib
import functools
import itertools
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from multiprocessing.connection import wait as wait_for
from typing import Literal

import torch
from torch.utils.data import DataLoader, IterableDataset

from prelude.data.errors import RunStopped, in_one_line
from prelude.data.waiting import Board, Caller, doing, end_with_parent, moved, patience, shared_memory, state_of

MICRO_BATCHES_AHEAD = 2  # that each worker prepares
SENT_BYTES = 2**20  # of views to a CPU: fewer cost less by a pipe than by a descriptor of shared memory
_PRELOADED = ["prelude.data.loader"]  # by the server that workers are forked from
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_CLOSING_SECONDS = 5


def start_workers_by(method: str) -> None:
    """From now on, in this process. method: of `multiprocessing`, or `auto`: fork on Linux, spawn elsewhere."""
    global _start_method
    _start_method = method


_start_method = "auto"


def _context():
    method = _start_method
    if method == "auto":
        method = "fork" if sys.platform == "linux" else "spawn"
    context = torch.multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(_PRELOADED)
    return context


class Workers:
    """`num_workers` processes that take turns in making the batches of `pipeline`.

    Raises RunStopped where they cannot be started.
    """

    def __init__(self, pipeline: IterableDataset, num_workers: int):
        self.num_workers = num_workers
        before = set(multiprocessing.active_children())
        pinned = torch.cuda.is_available()  # by a thread that takes tensors, and would wait for the rest of a message
        try:
            self.board = Board(num_workers)
            context = _context()
            ends_with = "parent" if threading.current_thread() is threading.main_thread() else "nobody"
            if context.get_start_method() == "forkserver":
                ends_with = "starter"
            loader = DataLoader(
                pipeline,
                batch_size=None,
                collate_fn=functools.partial(_ready_to_travel, sent_bytes=0 if pinned else SENT_BYTES),
                num_workers=num_workers,
                prefetch_factor=MICRO_BATCHES_AHEAD,
                pin_memory=pinned,
                multiprocessing_context=context,
                worker_init_fn=functools.partial(
                    _start, board=self.board, ends_with=ends_with, timeout_seconds=patience.timeout_seconds
                ),
                generator=torch.Generator(),  # or torch draws from the global one at each start
            )
            with _signals_held_back():
                self.batches = iter(loader)
        except (OSError, RuntimeError) as error:
            for process in set(multiprocessing.active_children()) - before:
                process.kill()
            raise RunStopped(
                f"{num_workers} data workers cannot be started ({in_one_line(error)}); {shared_memory()}. "
                f"Write a smaller data.num_workers, or give the job more of what is short."
            ) from error
        self.processes = list(self.batches._workers)
        self.moves = 0
        _running.add(self)
        _keep_deaths_for_later()

    def results(self) -> Iterator[dict]:
        """What the pipeline yields. Raises RunStopped when a worker dies, and as `data.waiting.Wait` does."""
        call = Caller()
        try:
            for nth in itertools.count():
                due = functools.partial(self._waited_for, nth % self.num_workers)
                try:
                    arrays = call(functools.partial(next, self.batches, None), due, look=self._look)
                except (RuntimeError, ConnectionError, EOFError) as error:  # torch noticed first, or in mid-batch
                    self._explain_death(error)
                    raise
                if arrays is None:
                    return
                yield arrays
        finally:
            call.left()
            self.end()

    def end(self) -> None:
        """Ends all of them at once: a worker that hangs would not hear a request."""
        if self.batches is None:
            return
        self.kill()
        # torch's own clean-up waits for threads that a killed worker may have left with half a message.
        closing = threading.Thread(target=self.batches._shutdown_workers, daemon=True)
        closing.start()
        closing.join(_CLOSING_SECONDS)
        self.batches = None

    def kill(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):  # it ended just now
                if process.exitcode is not None:
                    continue
                (os.killpg if _leads_a_group(process.pid) else os.kill)(process.pid, signal.SIGKILL)

    def has_one_in(self, words: str) -> bool:
        """Whether an error of torch speaks of one of these. Their exit codes may not be known yet, in any thread."""
        return any(re.search(rf"\b{process.pid}\b", words) for process in self.processes)

    def _look(self) -> None:
        self._explain_death()
        moves, self.moves = self.moves, self.board.moves()
        if moves != self.moves:  # a batch may take long: what it is made of has come from far away
            moved()

    def _explain_death(self, noticed: Exception | None = None) -> None:
        for process in self.processes:
            if process.exitcode is None and noticed:
                process.join(1)  # torch may have seen an end that the process object learns of a moment later
            if process.exitcode:
                raise RunStopped(_of_what(process)) from noticed

    def _waited_for(self, number: int) -> str:
        """Another one is named with it that is stopped: if in the middle of a message, it keeps the pipe from all."""
        states = {n: state_of(process.pid) for n, process in enumerate(self.processes)}
        own, line = states.pop(number), self.board.line(number)
        told = (
            f"the next batch of data worker {number} (process {self.processes[number].pid}{own and ', ' + own}; {line})"
        )
        stopped = next((n for n, state in states.items() if state.startswith("stopped")), None)
        if own or stopped is None:
            return told
        return f"{told}, while data worker {stopped} (process {self.processes[stopped].pid}) is {states[stopped]}"


def _of_what(process) -> str:
    """Why a dead worker has most likely died, and what to do."""
    ended = f"A data worker died (process {process.pid}, "
    if process.exitcode == -signal.SIGKILL:
        return (
            f"{ended}SIGKILL). This is how the kernel's OOM killer ends a process when memory runs out: write a "
            f"smaller data.num_workers, or give the job more memory."
        )
    if process.exitcode == -signal.SIGBUS:
        return (
            f"{ended}SIGBUS). This is what a write to shared memory ends in when there is no more: {shared_memory()}. "
            f"Write a smaller data.num_workers or train.micro_batch, or make it larger (docker run --shm-size=8g). So "
            f"does a look into an index whose file in $PRELUDE_CACHE another host has removed, or its disk has lost."
        )
    how = signal.Signals(-process.exitcode).name if process.exitcode < 0 else f"exit code {process.exitcode}"
    return (
        f"{ended}{how}). If it printed nothing, it was most likely short of memory: write a smaller "
        f"data.num_workers, or give the job more."
    )


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """A worker is born with these signals held back, until it ignores them: none can end it in between."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- in a worker


def _start(
    number: int, board: Board, ends_with: Literal["parent", "starter", "nobody"], timeout_seconds: float
) -> None:
    """ends_with: `starter`, where another process than the parent asked for this one. timeout_seconds: how long the
    trainer waits, which a store is given a part of."""
    patience.timeout_seconds = timeout_seconds
    for name in _IGNORED:
        signal.signal(name, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)  # so that the commands of a stream can be ended together with it
    if ends_with == "parent":
        end_with_parent()  # torch's watch over the parent looks up between batches only
    elif ends_with == "starter":
        threading.Thread(target=_end_with_starter, daemon=True).start()
    torch.set_num_threads(1)
    board.written_by(number)
    doing(b"it has read nothing yet")


def _end_with_starter() -> None:
    """The parent is a server, which lives as long as one of its children does."""
    wait_for([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _ready_to_travel(arrays: dict, *, sent_bytes: int) -> dict:
    """Moves views of more bytes into shared memory, whose descriptor travels; all else is sent as it is, in numpy."""
    views = arrays.get("views", ())
    if sum(view.nbytes for view in views) <= sent_bytes:
        return arrays | {"views": tuple(view.numpy() for view in views)}
    for view in views:
        while True:
            try:
                view.share_memory_()
                break
            except RuntimeError as error:
                if "No space left" not in str(error):
                    raise
                need = f"it needs {view.nbytes / 2**20:.4g} MiB for a batch and {shared_memory()}"
                doing(f"{need}; write a smaller data.num_workers, or docker run --shm-size=8g".encode())
                time.sleep(0.1)
    return arrays


# ---- deaths and ends


def _leads_a_group(pid: int) -> bool:
    try:
        return os.getpgid(pid) == pid
    except ProcessLookupError:
        return False


def _keep_deaths_for_later() -> None:
    """torch's handler of SIGCHLD raises in whatever the main thread is doing, a step or a save: a worker of ours is
    told of when its batch is due."""
    raising = signal.getsignal(signal.SIGCHLD)
    if threading.current_thread() is not threading.main_thread() or not callable(raising) or raising in _keeping:
        return

    def handler(signum, frame):
        try:
            raising(signum, frame)
        except RuntimeError as error:
            if not any(workers.has_one_in(str(error)) for workers in _running):
                raise

    _keeping.add(handler)
    signal.signal(signal.SIGCHLD, handler)


_keeping: set = set()
_running: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """Python ends its child processes with SIGTERM and waits for them; ours ignore it and must be told otherwise."""
    for workers in list(_running):
        workers.kill()
        workers.batches = None
