"""What every loader shares: the worker processes, and the cursor over an endless order.

- The cursor moves when a batch is handed to the trainer, never when a worker prefetches one.
- Workers ignore the signals that end a run, so that the step under way can finish and be saved; they end with the
  process that started them, however it ends.
- A worker that dies is an error and not a wait.
"""

import atexit
import contextlib
import signal
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
import webdataset as wds

from prelude.data.bad_samples import BadSamples
from prelude.data.batch import Batch, ViewPlan
from prelude.data.errors import RunStopped, UserError
from prelude.data.source import MAX_ATTEMPTS

STATE_VERSION = 1
MICRO_BATCHES_AHEAD = 2  # that each worker prepares


class EndlessLoader(ABC):
    """An endless iterator of one rank's micro-batches; `samples` is the number of positions used up by all ranks."""

    num_samples: int  # that make an epoch

    def __init__(self, plan: ViewPlan, seed: int, micro_batch: int, rank: int, world_size: int, num_workers: int, log):
        self.plan, self.seed, self.micro_batch = plan, seed, micro_batch
        self.rank, self.world_size, self.num_workers = rank, world_size, num_workers
        self.bad = BadSamples(log)
        self.samples = 0
        self._running: Iterator[dict] | None = None

    @abstractmethod
    def stages(self) -> list:
        """The stages of a `wds.DataPipeline` that yields this rank's micro-batches from `samples` on."""

    @abstractmethod
    def identity(self) -> dict:
        """What decides which samples and pixels come when, besides `samples`."""

    def in_todays_terms(self, state: dict) -> dict:
        """A state as this version would have written it."""
        return state

    @abstractmethod
    def name_of(self, sample) -> tuple[str, Callable[[], str]]:
        """The shard of a sample that `stages` reported as bad, and a function that finds its key."""

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        """Raises RunStopped when a sample and all that could replace it are unreadable, or a worker has died."""
        if self._running is None:
            self._running = run_pipeline(self.stages(), self.num_workers)
        arrays = next(self._running)
        self._note_bad(arrays)
        self.samples += self.micro_batch * self.world_size
        return to_batch(arrays)

    def state_dict(self) -> dict:
        """A few plain values, the same on every rank."""
        return {"version": STATE_VERSION, "samples": self.samples, **self.identity()}

    def load_state_dict(self, state: dict, allow_changed_data: bool = False) -> None:
        """Goes on from `state`; nothing is read again. Ranks, workers and micro-batch may differ from what they were.

        Raises UserError if anything has changed that decides which sample comes when. `allow_changed_data` accepts the
        change: where the order is another one, its next whole epoch begins.
        """
        now = {"version": STATE_VERSION, **self.identity()}
        was = {key: value for key, value in self.in_todays_terms(state).items() if key != "samples"}
        changed = [key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)]
        if changed and (not allow_changed_data or "version" in changed):
            listed = ", ".join(f"{key} {was.get(key)} -> {now.get(key)}" for key in changed)
            raise UserError(
                f"The data are not those that the checkpoint was made with ({listed}); restore them, or write "
                f"resume.allow_changed_data=true."
            )
        self.close()
        self.samples = state["samples"]
        if set(changed) - {"views"}:
            self.samples = -(-self.samples // self.num_samples) * self.num_samples

    def close(self) -> None:
        """Ends the workers. Iterating again starts new ones at the cursor."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _note_bad(self, arrays: dict) -> None:
        for position, sample, reason in arrays["bad"]:
            shard, find_key = self.name_of(sample)
            self.bad.add(shard, reason, position, find_key)
        if arrays["lost"]:
            raise RunStopped(
                f"The sample at position {arrays['lost'][0]} cannot be read, and nor can {MAX_ATTEMPTS} others in its "
                f"place; one of them is {find_key()} in {shard} ({reason}). Mend or replace data.shards."
            )
        self.bad.add_read(len(arrays["positions"]))


def run_pipeline(stages: list, num_workers: int) -> Iterator[dict]:
    """What a `wds.DataPipeline` of these stages yields, made by worker processes or, with none, here.

    Raises RunStopped when a worker dies.
    """
    running = _results(stages, num_workers)
    _all_running.add(running)
    return running


def to_batch(arrays: dict) -> Batch:
    """In page-locked memory where there is a GPU, so that the copy to it overlaps with the step."""
    labels = arrays["labels"]
    batch = Batch(
        views=tuple(view.permute(0, 3, 1, 2) for view in arrays["views"]),
        boxes=torch.from_numpy(arrays["boxes"]),
        flips=torch.from_numpy(arrays["flips"]),
        seeds=torch.from_numpy(arrays["seeds"]),
        sample_ids=torch.from_numpy(arrays["sample_ids"]),
        positions=torch.from_numpy(arrays["positions"]),
        labels=None if labels is None else torch.from_numpy(labels),
    )
    return batch.pin_memory() if torch.cuda.is_available() else batch


def _results(stages: list, num_workers: int) -> Iterator[dict]:
    loader = wds.WebLoader(
        wds.DataPipeline(*stages),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        prefetch_factor=MICRO_BATCHES_AHEAD if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # or torch draws from the global one at each start
    )
    with _explained():
        for arrays in loader:
            if num_workers:
                _explain_deaths()
            yield arrays


def _as_it_is(arrays: dict) -> dict:
    """Keeps numpy arrays: each tensor that leaves a worker costs a file descriptor and a shared-memory segment."""
    return arrays


def _start_worker(_: int) -> None:
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    torch.set_num_threads(1)


@contextlib.contextmanager
def _explained():
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:  # a batch of the dead worker may be half received
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        raise RunStopped(
            f"A data worker died ({' '.join(str(error).split())}). It is most often short of memory, or of shared "
            f"memory in /dev/shm: write a smaller data.num_workers, or give the job more."
        ) from error


def _explain_deaths() -> None:
    """torch's handler of SIGCHLD raises in whatever the main thread is doing: say there, too, what it means."""
    raising = signal.getsignal(signal.SIGCHLD)
    if threading.current_thread() is not threading.main_thread() or not callable(raising) or raising in _explaining:
        return

    def handler(signum, frame):
        with _explained():
            raising(signum, frame)

    _explaining.add(handler)
    signal.signal(signal.SIGCHLD, handler)


_explaining: set = set()
_all_running: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _end_all_workers() -> None:
    """Python ends its child processes with SIGTERM and waits for them; ours ignore it and must be told otherwise."""
    for running in list(_all_running):
        running.close()
