"""What every loader shares: the way from stages to batches, and the cursor over an endless order.

- The cursor moves when a batch is handed to the trainer, never when a worker prefetches one.
- A batch that does not come is waited for as `data.waiting` says, whoever makes it.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
import webdataset as wds

from prelude.data.bad_samples import BadSamples
from prelude.data.batch import Batch, ViewPlan
from prelude.data.errors import RunStopped, UserError, another_folder
from prelude.data.source import MAX_ATTEMPTS
from prelude.data.waiting import Caller, doing_now
from prelude.data.workers import Workers

STATE_VERSION = 1


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
        """Raises RunStopped when a sample and all that could replace it are unreadable, a worker has died, or nothing
        came for too long; Stopped when the process is asked to end while nothing comes."""
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
        listed = ", ".join(f"{key} {was.get(key)} -> {now.get(key)}" for key in changed)
        if {"label", "classes", "findings"} & set(changed):
            raise UserError(
                f"The labels are not those that the checkpoint learned ({listed}), and its outputs would be taken for "
                f"others; restore them, or write {another_folder()}."
            )
        if changed and (not allow_changed_data or "version" in changed):
            raise UserError(
                f"The data are not those that the checkpoint was made with ({listed}); restore them, or write "
                f"resume.allow_changed_data=true."
            )
        self.close()
        self.samples = state["samples"]
        if set(changed) - {"views", "groups"}:  # these leave the order of samples as it is
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
        self.bad.add_read(images_read(arrays))


def run_pipeline(stages: list, num_workers: int) -> Iterator[dict]:
    """What a `wds.DataPipeline` of these stages yields, made by worker processes or, with none, here.

    Raises RunStopped when a worker dies or says that the run cannot go on, and as `data.waiting.Wait` does when nothing
    comes.
    """
    made = Workers(wds.DataPipeline(*stages), num_workers).results() if num_workers else _made_here(stages)
    with contextlib.closing(made):
        for arrays in made:
            if "stopped" in arrays:
                raise RunStopped(arrays["stopped"])
            yield arrays


def images_read(arrays: dict) -> int:
    """How many images a batch was made of: partners count, too."""
    partner_ids = arrays.get("partner_ids")
    return len(arrays["positions"]) + (0 if partner_ids is None else int((partner_ids != arrays["sample_ids"]).sum()))


def to_batch(arrays: dict) -> Batch:
    """In page-locked memory where there is a GPU, so that the copy to it overlaps with the step."""
    labels, partner_ids = arrays["labels"], arrays.get("partner_ids")
    batch = Batch(
        views=tuple(torch.as_tensor(view).movedim(-1, 1) for view in arrays["views"]),
        boxes=torch.from_numpy(arrays["boxes"]),
        flips=torch.from_numpy(arrays["flips"]),
        seeds=torch.from_numpy(arrays["seeds"]),
        sample_ids=torch.from_numpy(arrays["sample_ids"]),
        positions=torch.from_numpy(arrays["positions"]),
        labels=None if labels is None else torch.from_numpy(labels),
        partner_ids=None if partner_ids is None else torch.from_numpy(partner_ids),
    )
    return batch.pin_memory() if torch.cuda.is_available() else batch


def _made_here(stages: list) -> Iterator[dict]:
    batches, call = iter(wds.DataPipeline(*stages)), Caller()
    try:
        while (arrays := call(lambda: next(batches, None), _what_this_process_reads)) is not None:
            yield arrays
    finally:
        call.left()


def _what_this_process_reads() -> str:
    return f"the next batch ({doing_now() or 'nothing has been read yet'})"
