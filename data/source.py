"""From places in the order to arrays: the two stages of the pipeline that webdataset has no part for.

- A source (an IterableDataset, the head of a `wds.DataPipeline`) says which samples make the next micro-batch.
  Worker w of n makes the micro-batches w, w + n, w + 2n, ..., so that a DataLoader hands them over in order.
- `MicroBatchReader` (a `wds.map` stage) reads and decodes them into one buffer a view.
- What comes out depends on positions alone. An unreadable sample is replaced by one that its position determines, so
  that the micro-batch stays full and nobody else's samples move. So is an unreadable partner, by another of its group.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from itertools import count
from multiprocessing.pool import ThreadPool
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from prelude.data.batch import ViewPlan, VolumePlan
from prelude.data.decode import MAX_PIXELS, BadImage, ValueRange, decode
from prelude.data.errors import RunStopped
from prelude.data.labels import LabelReader
from prelude.data.mixed_order import order_of, substitute_in
from prelude.data.open_files import OpenFiles, Place
from prelude.data.order import Shuffle, sample_seeds
from prelude.data.shards import ShardIndex
from prelude.data.views import write_views

if TYPE_CHECKING:
    from prelude.data.partners import Partners

MAX_ATTEMPTS = 16
_LOOKED_AHEAD = 4096  # positions
_LOOKED_UP = 1024  # positions, at once: a look into the order costs the same for one as for hundreds
_HELD_BYTES = 2**20  # of decoded pixels that wait to be cut: about what a processor's cache holds


def worker() -> tuple[int, int]:
    """(number of this worker, number of workers); the main process is worker 0 of 1."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def rank_positions(start: int, nth: int, micro_batch: int, rank: int, world_size: int) -> np.ndarray:
    """(micro_batch,) int64: the positions of a rank's micro-batch number `nth` after `start`.

    Ranks take turns sample by sample, so that the samples of a global batch are the same at any number of ranks.
    """
    return start + (nth * micro_batch + np.arange(micro_batch)) * world_size + rank


class EndlessSource(IterableDataset):
    """A rank's micro-batches from position `start` on, for ever."""

    def __init__(
        self, index: ShardIndex, shuffle: Shuffle, seed: int, start: int, micro_batch: int, rank: int, world_size: int
    ):
        self.order = order_of(index, seed, shuffle)
        self.order_ahead = order_of(index, seed, shuffle)  # of another thread
        self.start, self.micro_batch, self.global_batch = start, micro_batch, micro_batch * world_size
        self.positions_of = functools.partial(
            rank_positions, start, micro_batch=micro_batch, rank=rank, world_size=world_size
        )

    def __iter__(self):
        first, workers = worker()
        some = workers * max(_LOOKED_UP // self.micro_batch, 1)
        for begin in count(first, some):
            turns = range(begin, begin + some, workers)
            positions = np.stack([self.positions_of(nth) for nth in turns])
            yield from map(_step, turns, positions, self.order.samples_at(positions))

    def ahead(self, nth: int) -> Iterator[np.ndarray]:
        """The samples of all ranks from a micro-batch on, some at a time: what a node will need. For another thread."""
        for begin in count(self.start + nth * self.global_batch, _LOOKED_AHEAD):
            yield self.order_ahead.samples_at(begin + np.arange(_LOOKED_AHEAD))


class OnePassSource(IterableDataset):
    """A rank's contiguous part of the index, or of some `samples` of it, in order, once; the last micro-batch may be
    short."""

    def __init__(
        self, num_samples: int, batch_size: int, rank: int, world_size: int, samples: np.ndarray | None = None
    ):
        num_samples = num_samples if samples is None else len(samples)
        self.begin = num_samples * rank // world_size
        self.end = num_samples * (rank + 1) // world_size
        self.batch_size, self.samples = batch_size, samples

    def __iter__(self):
        first, workers = worker()
        for nth in range(first, -(-(self.end - self.begin) // self.batch_size), workers):
            begin = self.begin + nth * self.batch_size
            ids = np.arange(begin, min(begin + self.batch_size, self.end))
            ids = ids if self.samples is None else self.samples[ids]
            yield _step(nth, ids, ids)

    def ahead(self, nth: int) -> Iterator[np.ndarray]:
        """The samples of this rank from a micro-batch on, some at a time."""
        for begin in range(self.begin + nth * self.batch_size, self.end, _LOOKED_AHEAD):
            ids = np.arange(begin, min(begin + _LOOKED_AHEAD, self.end))
            yield ids if self.samples is None else self.samples[ids]


def _step(nth: int, positions: np.ndarray, sample_ids: np.ndarray) -> dict:
    """A micro-batch to be read, as a webdataset sample."""
    return {"__key__": f"{nth:09}", "__url__": "", "positions": positions, "sample_ids": sample_ids}


def announce(steps, reader: "MicroBatchReader"):
    """Tells the operating system of each micro-batch's bytes one micro-batch early."""
    waiting = None
    for step in steps:
        reader.will_read(step["sample_ids"], step["positions"])
        if waiting is not None:
            yield waiting
        waiting = step
    if waiting is not None:
        yield waiting


class MicroBatchReader:
    """Reads and decodes micro-batches.

    on_bad: "substitute" reads another sample in its place, at most 16 times; "skip" leaves the row out.
    threads: decoding threads of this process; 1 in workers, whose number is the parallelism. partners: whom the plan's
    partner views are of; None where it has none. buffers: what a micro-batch is decoded into; None for images.
    """

    def __init__(
        self,
        index: ShardIndex,
        plan: ViewPlan | VolumePlan,
        seed: int,
        read_label: LabelReader | None,
        on_bad: Literal["substitute", "skip"],
        threads: int = 1,
        partners: "Partners | None" = None,
        buffers: "type[MicroBatchBuffers] | None" = None,
    ):
        self.buffers = buffers or MicroBatchBuffers
        self.index, self.plan, self.seed, self.read_label, self.on_bad = index, plan, seed, read_label, on_bad
        self.threads, self.partners = threads, partners
        self.files = OpenFiles(index.paths)

    def __call__(self, step: dict) -> dict:
        """Fills the arrays of one micro-batch.

        Returns views (V tensors, each (B, H, W, C)), boxes, flips, seeds, sample_ids, positions, labels and partner_ids
        as in `Batch` but numpy, `bad`: (position, sample id, reason) of each failed attempt, and `lost`: the positions
        for which every attempt failed. Where the run cannot go on, `stopped` alone says why: an error would come out of
        a worker as a traceback.
        """
        try:
            return self._read_all(step)
        except RunStopped as error:
            return {"stopped": str(error)}

    def _read_all(self, step: dict) -> dict:
        positions, sample_ids = step["positions"], step["sample_ids"].copy()
        seeds = sample_seeds(self.seed, positions.tolist())
        seen_as = self.index.value_range, self.index.max_pixels
        rows = self.buffers(self.plan, len(positions), self.read_label, *seen_as)
        rows.partner_ids = None if self.partners is None else sample_ids.copy()
        fill = functools.partial(self._fill, rows, positions.tolist(), seeds, sample_ids)
        some = _in_runs(len(positions), self.threads)
        failures = [row for run in self._map(fill, some) for row in run]  # the failed attempts, and whether all failed
        bad = [failed for attempts, _ in failures for failed in attempts]
        lost = np.array([all_failed for _, all_failed in failures], bool)
        seeds = np.array(seeds, np.int64)
        if self.on_bad == "skip" and lost.any():
            rows.keep(~lost)
            seeds, sample_ids, positions, lost = seeds[~lost], sample_ids[~lost], positions[~lost], lost[~lost]
        return rows.arrays() | {
            "seeds": seeds,
            "sample_ids": sample_ids,
            "positions": positions,
            "bad": bad,
            "lost": positions[lost].tolist(),
        }

    def will_read(self, sample_ids: np.ndarray, positions: np.ndarray) -> None:
        with contextlib.suppress(RunStopped):  # the read itself says what is wrong
            if self.partners is not None:
                sample_ids = np.concatenate([sample_ids, self.partners.first(sample_ids, positions.tolist())])
            self.files.will_read(self._places(sample_ids, self.index.images))

    def _fill(self, buffers: "MicroBatchBuffers", positions, seeds, sample_ids, rows: range) -> list[tuple[list, bool]]:
        """Reads some rows; writes the ids that were delivered into `sample_ids`.

        Decoded images wait for each other, because resizing several in turn finds its code and tables in the
        processor's cache: on small images that is felt. Of large ones no more than two or three wait.
        """
        tried, waiting, held = [], [], 0
        for row, *places in zip(rows, *self._places_of_samples(sample_ids[rows.start : rows.stop]), strict=True):
            pixels, failed = self._read_one(buffers, row, places, positions[row], sample_ids)
            tried.append((failed, pixels is None))
            if pixels is not None:
                partner = pixels
                if self.partners is not None:
                    partner = self._read_partner(buffers, row, positions[row], int(sample_ids[row]), pixels, failed)
                waiting.append((row, pixels, partner))
                held += pixels.nbytes + (partner.nbytes if partner is not pixels else 0)
            if held > _HELD_BYTES:
                buffers.write(waiting, seeds)
                waiting, held = [], 0
        buffers.write(waiting, seeds)
        return tried

    def _read_one(self, buffers, row: int, places, position: int, sample_ids) -> tuple[np.ndarray | None, list]:
        """The pixels for a row, from its `places` or of what comes instead; and the failed attempts."""
        sample_id, failed = int(sample_ids[row]), []
        for attempt in range(MAX_ATTEMPTS + 1):
            if attempt:
                sample_id = substitute_in(self.index, self.seed, position, attempt, sample_id)
                sample_ids[row] = sample_id
                places = [place for (place,) in self._places_of_samples(sample_ids[row : row + 1])]
            try:
                return buffers.decode(self._read_sample(buffers, row, *places)), failed
            except BadImage as error:
                failed.append((position, sample_id, str(error)))
            if self.on_bad == "skip":
                break
        return None, failed

    def _read_partner(
        self, buffers, row: int, position: int, sample_id: int, pixels: np.ndarray, failed: list
    ) -> np.ndarray:
        """The pixels of a sample's partner, or of those that come in its place, and at last the sample's own `pixels`.
        Adds to the failed attempts."""
        for partner in self.partners.in_turn(sample_id, position):
            (place,) = self._places(np.array([partner]), self.index.images)
            try:
                found = buffers.decode(self.files.read(*place))
            except BadImage as error:
                failed.append((position, partner, str(error)))
                continue
            buffers.partner_ids[row] = partner
            return found
        buffers.partner_ids[row] = sample_id
        return pixels

    def _read_sample(self, buffers, row: int, image: Place, label: Place | None) -> bytes:
        """An image, still encoded, whose label goes into its row. Raises BadImage."""
        if label is None:
            return self.files.read(*image)
        if label[1] < 0:
            raise BadImage(f"no .{self.read_label.extension} label")
        content, written = self.files.read_both(image, label)
        buffers.labels[row] = self.read_label(written)
        return content

    def _places_of_samples(self, sample_ids: np.ndarray) -> tuple[list[Place], list[Place] | list[None]]:
        """Of images and of labels; None for each where none are asked for."""
        labels = (
            self._places(sample_ids, self.index.labels) if self.read_label is not None else [None] * len(sample_ids)
        )
        return self._places(sample_ids, self.index.images), labels

    def _places(self, sample_ids: np.ndarray, table: np.ndarray) -> list[Place]:
        shards = np.searchsorted(self.index.ends, sample_ids, side="right")
        return list(zip(shards.tolist(), *table[sample_ids].T.tolist(), strict=True))

    def _map(self, function, runs):
        return self._pool.map(function, runs, chunksize=1) if self.threads > 1 else map(function, runs)

    @functools.cached_property
    def _pool(self) -> ThreadPool:
        return ThreadPool(self.threads)  # its threads are daemons: one that hangs keeps no process alive


def _in_runs(num_rows: int, threads: int) -> list[range]:
    """Rows that a thread reads at once: all, or a quarter of its share, so that none has to wait long for the last."""
    length = max(num_rows // (4 * threads) if threads > 1 else num_rows, 1)
    return [range(start, min(start + length, num_rows)) for start in range(0, num_rows, length)]


class MicroBatchBuffers:
    """The arrays of one micro-batch of `size` rows, to be filled some rows at a time from any thread."""

    def __init__(
        self,
        plan: ViewPlan,
        size: int,
        read_label: LabelReader | None,
        value_range: ValueRange | None = None,
        max_pixels: int = MAX_PIXELS,
    ):
        sizes, dtype = self.sizes(plan), torch.uint8 if value_range is None else torch.float32
        self.plan, self.value_range, self.max_pixels = plan, value_range, max_pixels
        self.views = tuple(torch.empty(size, *of_view, plan.channels, dtype=dtype) for of_view in sizes)
        self.pixels = [view.numpy() for view in self.views]
        self.boxes = np.zeros((size, len(sizes), 4), np.int32)
        self.flips = np.zeros((size, len(sizes)), bool)
        self.labels = None if read_label is None else np.zeros((size, *read_label.shape), read_label.dtype)
        self.partner_ids: np.ndarray | None = None  # (size,) int64, where the plan has partner views

    @staticmethod
    def sizes(plan: ViewPlan) -> list[tuple[int, ...]]:
        """Of each view, without channels."""
        return [view.size for view in plan.views]

    def decode(self, image: bytes) -> np.ndarray:
        """(H, W, C). Raises BadImage."""
        return decode(image, value_range=self.value_range, channels=self.plan.channels, max_pixels=self.max_pixels)

    def write(self, decoded: Sequence[tuple[int, np.ndarray, np.ndarray]], seeds: Sequence[int]) -> None:
        """The views of decoded images into their rows. decoded: (row, pixels, those of its partner); seeds: of every
        row."""
        if decoded:
            rows, images, partners = map(list, zip(*decoded, strict=True))
            seeds = [seeds[row] for row in rows]
            self.boxes[rows], self.flips[rows] = write_views(images, self.plan, seeds, self.pixels, rows, partners)

    def keep(self, rows: np.ndarray) -> None:
        """Drops all other rows. rows: (size,) bool."""
        self.views = tuple(view[torch.from_numpy(rows)] for view in self.views)
        self.boxes, self.flips = self.boxes[rows], self.flips[rows]
        self.labels = None if self.labels is None else self.labels[rows]
        self.partner_ids = None if self.partner_ids is None else self.partner_ids[rows]

    def arrays(self) -> dict:
        arrays = {"views": self.views, "boxes": self.boxes, "flips": self.flips, "labels": self.labels}
        return arrays | {"partner_ids": self.partner_ids}
