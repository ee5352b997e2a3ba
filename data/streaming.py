"""For shards that have no byte offsets (a pipe, a URL): webdataset's own stream, with the same batches.

- Each worker of each rank draws shards with replacement from a seed of its own, and shuffles samples in a buffer.
- Batches are full on every rank; crops and seeds come from the position, as in `Loader`.
- Which samples come is not exact: an epoch is a count of samples, of which some come twice and some not at all, and a
  resumed run goes on at its step with other samples.
"""

import contextlib
import functools
import hashlib
import logging
import random
import time
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np
import webdataset as wds
from torch.utils.data import IterableDataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from prelude.data.batch import ViewPlan
from prelude.data.decode import MAX_PIXELS, BadImage, ValueRange
from prelude.data.errors import UserError
from prelude.data.host import NoMoreFiles, own_fault
from prelude.data.order import sample_seed, sample_seeds
from prelude.data.pipeline import EndlessLoader
from prelude.data.shards import is_stream
from prelude.data.source import MAX_ATTEMPTS, MicroBatchBuffers, rank_positions, worker
from prelude.data.stream_commands import open_url, refuse_unknown_schemes
from prelude.data.tar_index import image_extension
from prelude.data.waiting import TIMEOUT_SECONDS, doing, patience

log = logging.getLogger(__name__)

SHUFFLE_BUFFER = 1000  # samples, as encoded bytes, of each worker
MAX_SHARDS_FAILED = 20  # in a row, before the stream is given up
FAILED_IN_PASSING = 3  # in a row, before there is a pause after each
MAX_PAUSE_SECONDS = 15


class StreamingLoader(EndlessLoader):
    """Endless batches of what webdataset can read and we cannot index. The parameters are those of `Loader`.

    urls: expanded ones. num_samples: how many make an epoch; nobody can count them beforehand.
    Raises UserError without `num_samples`, for a URL that nothing opens, and for labels, which need an index.
    """

    def __init__(
        self,
        urls: list[str],
        plan: ViewPlan,
        *,
        num_samples: int | None,
        seed: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        label: str = "",
        bad_samples_log: str | Path | None = None,
        value_range: ValueRange | Literal["auto"] | None = None,
        max_pixels: int = MAX_PIXELS,
    ):
        super().__init__(plan, seed, micro_batch, rank, world_size, num_workers, bad_samples_log)
        first = next(filter(is_stream, urls))
        if label:
            raise UserError(f"Labels cannot be read from {first}, which is no local file; copy the shards to a disk.")
        if not num_samples:
            raise UserError(
                f"{first} in data.shards is no local file, so its samples cannot be counted; write "
                f"data.num_samples=..., or copy the shards to a disk."
            )
        if value_range == "auto":
            raise UserError(
                f"data.range=auto cannot be found in {first}, which is no local file; write data.range=[low,high]."
            )
        refuse_unknown_schemes(urls)
        self.urls, self.num_samples, self.value_range, self.source = urls, num_samples, value_range, None
        self.max_pixels = max_pixels
        if rank == 0:
            log.warning("%s cannot be indexed: samples are streamed, and an exact resume is not available", first)

    @property
    def num_shards(self) -> int:
        return len(self.urls)

    def preview(self, count: int) -> list[str]:
        """Nothing: what a stream brings is not known beforehand."""
        return []

    def stages(self) -> list:
        where = dict(start=self.samples, micro_batch=self.micro_batch, rank=self.rank, world_size=self.world_size)
        where["stall_seconds"] = max(patience.timeout_seconds / 4, 1)  # so that others are tried before the run ends
        seen_as = dict(value_range=self.value_range, max_pixels=self.max_pixels)
        self.source = StreamSource(self.urls, self.plan, self.seed, **where, **seen_as)
        return [self.source]

    def close(self) -> None:
        super().close()
        if self.source is not None:
            self.source.close()

    def identity(self) -> dict:
        settings = {"seed": self.seed, "num_samples": self.num_samples, "views": self.plan.fingerprint()}
        if self.value_range:
            settings["range"] = list(self.value_range)
        if self.max_pixels != MAX_PIXELS:
            settings["max_pixels"] = self.max_pixels
        return {"exact": False, **settings}

    def name_of(self, sample):
        url, key = sample
        return url, lambda: key


class StreamSource(IterableDataset):
    """A rank's micro-batches, as `MicroBatchReader` makes them. A server that is silent for `stall_seconds` is left."""

    def __init__(
        self,
        urls,
        plan: ViewPlan,
        seed: int,
        start: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        stall_seconds: float = TIMEOUT_SECONDS / 4,
        value_range: ValueRange | None = None,
        max_pixels: int = MAX_PIXELS,
    ):
        self.urls, self.plan, self.seed, self.start = urls, plan, seed, start
        self.stall_seconds, self.value_range, self.max_pixels = stall_seconds, value_range, max_pixels
        self.micro_batch, self.rank, self.world_size = micro_batch, rank, world_size
        self.open, self.closed = None, False

    def __iter__(self):
        nth_worker, workers = worker()
        self.bad: list[tuple[int, tuple[str, str], str]] = []
        self.shards_failed, self.ever_come = 0, False
        samples = self._stream(sample_seed(self.seed, self.start + self.rank + self.world_size * nth_worker))
        for nth in count(nth_worker, workers):
            positions = rank_positions(self.start, nth, self.micro_batch, self.rank, self.world_size)
            try:
                arrays = self._micro_batch(positions, samples)
            except NoMoreFiles as error:  # it would come out of a worker as a traceback
                arrays = {"stopped": str(error)}
            yield arrays

    def _stream(self, seed: int):
        return iter(
            wds.DataPipeline(
                wds.ResampledShards(self.urls, seed=seed, worker_seed=lambda: seed, deterministic=True),
                self._opened,
                functools.partial(tar_file_expander, handler=self._shard_failed),
                functools.partial(group_by_keys, handler=self._shard_failed),
                self._counted,
                wds.shuffle(SHUFFLE_BUFFER, rng=random.Random(seed)),
            )
        )

    def _opened(self, shards):
        for shard in shards:
            if self.closed:
                raise _NothingLeft
            self.url, self.come, self.failed = shard["url"], 0, False
            doing(f"it reads {self.url}".encode())
            try:
                self.open = open_url(self.url, self.stall_seconds)
            except (OSError, ValueError) as error:
                if isinstance(error, OSError):
                    own_fault(error)
                self._shard_failed(error)
                continue
            with contextlib.closing(self.open):
                if self.closed:  # while it was opened
                    self.close()
                    raise _NothingLeft
                yield shard | {"stream": self.open}
            if not (self.come or self.failed):
                self._shard_failed(ValueError("a tar without a single sample"))

    def _counted(self, samples):
        for sample in samples:
            self.come, self.shards_failed, self.ever_come = self.come + 1, 0, True
            yield sample

    def _micro_batch(self, positions: np.ndarray, samples) -> dict:
        rows = MicroBatchBuffers(self.plan, len(positions), None, self.value_range, self.max_pixels)
        seeds = sample_seeds(self.seed, positions.tolist())
        sample_ids = np.zeros(len(positions), np.int64)
        lost = []
        for row, position in enumerate(positions.tolist()):
            self.position = position
            try:
                sample_ids[row] = self._fill(rows, row, seeds, samples)
            except _NothingLeft:
                lost.append(position)
                break
        bad, self.bad = self.bad, []
        return rows.arrays() | {
            "seeds": np.array(seeds, np.int64),
            "sample_ids": sample_ids,
            "positions": positions,
            "bad": bad,
            "lost": lost,
        }

    def _fill(self, rows: MicroBatchBuffers, row: int, seeds: list[int], samples) -> int:
        """Writes the stream's next readable sample; returns its id, a hash of its shard's URL and its key."""
        for _ in range(MAX_ATTEMPTS + 1):
            sample = next(samples)
            url, key = sample["__url__"], sample["__key__"]
            try:
                members = [name for name in sample if not name.startswith("__")]
                extension = image_extension(members) or image_extension(members, arrays=True)
                if extension is None:
                    raise BadImage("no image")
                pixels = rows.decode(sample[extension])
                rows.write([(row, pixels, pixels)], seeds)
                return int.from_bytes(hashlib.blake2b(f"{url}\0{key}".encode(), digest_size=8).digest(), "little") >> 1
            except BadImage as error:
                self.bad.append((self.position, (url, key), str(error)))
        raise _NothingLeft

    def _shard_failed(self, error: Exception) -> bool:
        """webdataset's handler: true goes on, with the next shard where this one cannot be read further."""
        self.shards_failed, self.failed = self.shards_failed + 1, True
        reason = str(error.args[0]).partition(" @ <")[0] if error.args else type(error).__name__
        self.bad.append((self.position, (self.url, "what follows"), reason))
        doing(f"it has just left {self.url}: {reason}".encode())
        if self.shards_failed > MAX_SHARDS_FAILED:
            raise _NothingLeft
        if self.ever_come and self.shards_failed > FAILED_IN_PASSING:  # a server that worked may do so again
            time.sleep(min(2 ** (self.shards_failed - FAILED_IN_PASSING - 1), MAX_PAUSE_SECONDS))
        return True

    def close(self) -> None:
        """Ends the command whose output is being read in this process, and opens no other."""
        self.closed = True
        if hasattr(self.open, "end"):
            self.open.end()


class _NothingLeft(BaseException):
    """Not an Exception: webdataset would hand it to the handler that raises it."""
