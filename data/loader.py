"""The loaders: endless and resumable for training, a single pass in order for evaluation.

    loader = Loader(ShardIndex("/data/{000..099}.tar"), plan, seed=0, micro_batch=64)
    batch = next(loader)
    loader.load_state_dict(state)  # at any number of ranks and workers

- Every sample comes exactly once an epoch; an epoch's end is no event, the batch across it simply goes on.
- Slot j of rank r's micro-batch m holds position start + m * b * W + j * W + r of the order: the global batch at a
  step has the same samples, crops and seeds at any number of ranks and workers, and after any interruption.
- Every rank has a batch at every step, whatever is damaged.
"""

import functools
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import webdataset as wds

from prelude.data.alternating import AlternatingLoader
from prelude.data.bad_samples import BadSamples
from prelude.data.batch import ViewPlan, VolumePlan
from prelude.data.class_names import label_reader
from prelude.data.counting import counted
from prelude.data.data_sets import Data, DataSet, found, index_of, index_of_volumes
from prelude.data.decode import MAX_PIXELS, ValueRange
from prelude.data.errors import UserError
from prelude.data.fetching import Reading, fetch_ahead, shares_of_room
from prelude.data.findings import FindingsReader, VectorFormat
from prelude.data.image_folder import ImageFolder
from prelude.data.mixed_order import order_of, passes, seed_of_part
from prelude.data.order import DEFAULT_SHUFFLE, Shuffle
from prelude.data.partners import Partners
from prelude.data.pipeline import EndlessLoader, images_read, run_pipeline, to_batch
from prelude.data.remote_shards import shard_name
from prelude.data.shards import ShardIndex, expand_shards, is_stream
from prelude.data.source import EndlessSource, MicroBatchBuffers, MicroBatchReader, OnePassSource, announce
from prelude.data.streaming import StreamingLoader
from prelude.data.value_range import refuse_other_images, tell_if_dark
from prelude.data.volumes import VolumeBuffers, refuse_other_volumes

log = logging.getLogger(__name__)


def build_loader(
    data: Data,
    plan: ViewPlan,
    *,
    seed: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    shuffle: Shuffle = DEFAULT_SHUFFLE,
    label: str = "",
    bad_samples_log: str | Path | None = None,
    num_samples: int | None = None,
    allow_commands: bool = False,
    **of_index,
) -> "Loader | StreamingLoader":
    """A `Loader` where every shard is a file, here or in a store, else a `StreamingLoader`, which alone takes
    `num_samples`.

    data: shards, or several data sets by name. allow_commands: whether a shell may run what `pipe:` says. of_index: see
    `index_of`. Raises UserError for a command that may not be run, for a cache of remote shards that is too small for
    the order, and as `index_of` and `Loader` do.
    """
    common = dict(
        seed=seed, micro_batch=micro_batch, rank=rank, world_size=world_size, num_workers=num_workers, label=label,
        bad_samples_log=bad_samples_log,
    )  # fmt: skip
    if not isinstance(data, Mapping):
        urls = expand_shards(data, allow_commands)
        if any(map(is_stream, urls)):
            of_stream = _of_stream(urls, of_index, plan)
            if shuffle != DEFAULT_SHUFFLE and rank == 0:
                log.warning("data.shuffle has no effect on streams, which have a buffer of their own; leave it out")
            return StreamingLoader(urls, plan, num_samples=num_samples, **of_stream, **common)
        data = found(data, urls)
    if num_samples is not None:
        raise UserError(
            f"data.num_samples={num_samples} has no effect on shards that are files, which are counted; leave it out."
        )
    index = index_of(data, label=label, channels=plan.channels, **of_index)
    shares_of_room([Reading(index, seed, bool(plan.group))], shuffle, tell=rank == 0)
    return Loader(index, plan, shuffle=shuffle, **common)


def alternating_loader(
    images: "Loader | StreamingLoader",
    volumes: DataSet,
    plan: VolumePlan,
    share: float,
    global_batch: int,
    *,
    seed: int,
    shuffle: Shuffle = DEFAULT_SHUFFLE,
    num_workers: int = 0,
    max_bad_share: float = 1.0,
    value_range: ValueRange | None = None,
    max_pixels: int = MAX_PIXELS,
    **common,
) -> AlternatingLoader:
    """`images` in turn with volumes. common: of `Loader`. Raises UserError for a cache of remote shards that is too
    small for both orders, and as `index_of_volumes` and `Loader` do."""
    seed_of_volumes = seed_of_part(seed, "volumes")
    index = index_of_volumes(volumes, max_bad_share=max_bad_share, value_range=value_range, max_pixels=max_pixels)
    loader = Loader(index, plan, seed=seed_of_volumes, shuffle=shuffle, num_workers=num_workers, **common)
    cached = [one for one in (images, loader) if isinstance(one, Loader) and one.reading().remote]
    tell = loader.rank == 0 and loader in cached  # of images alone it has been told
    for one, room in zip(cached, shares_of_room([one.reading() for one in cached], shuffle, tell), strict=True):
        one.room = room
    return AlternatingLoader(images, loader, share, global_batch, seed)


def _of_stream(urls: list[str], of_index: dict, plan: ViewPlan) -> dict:
    needs = {f"data.{key}": of_index.get(key) for key in ("select", "image")} | {"objective.pair_by": plan.group}
    for key, given in needs.items():
        if given:
            raise UserError(
                f"{key} needs an index, and {next(filter(is_stream, urls))} is a stream; copy the shards to a "
                f"disk, or leave it out."
            )
    if folder := next((url for url in urls if isinstance(url, ImageFolder)), None):
        raise UserError(
            f"{folder} is a folder of images, which needs an index, and {next(filter(is_stream, urls))} is a stream; "
            f"write the folder into shards (prelude shards pack), or leave one of the two out."
        )
    return {key: of_index[key] for key in ("value_range", "max_pixels") if key in of_index}


class Loader(EndlessLoader):
    """Endless batches of the samples of an index.

    label: extension of the member with a sample's label (`cls`), or "" for batches without labels. findings: how that
    member says which of several there are, where it holds no class. bad_samples_log: where unreadable samples are
    listed. Raises UserError if there is a `label` and no such member, and where no image can be read as `plan` and
    index ask for.
    """

    room = 1.0  # the share of the cache of remote shards that it may fill ahead of need

    def __init__(
        self,
        index: ShardIndex,
        plan: ViewPlan,
        *,
        seed: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        shuffle: Shuffle = DEFAULT_SHUFFLE,
        label: str = "",
        findings: VectorFormat | None = None,
        bad_samples_log: str | Path | None = None,
    ):
        super().__init__(plan, seed, micro_batch, rank, world_size, num_workers, bad_samples_log)
        self.index, self.shuffle = index.with_label(label), shuffle
        self.num_samples, self.label = index.num_samples, label
        self.fingerprint = _fingerprint(self.index, label)
        self.findings = findings
        self.partners = Partners(index, plan.group, seed) if plan.group else None
        self.reader = _reader(self.index, plan, seed, label, findings, "substitute", num_workers, self.partners)
        if rank == 0:
            self.bad.add_unindexed(index.problems)
            self.bad.add_unended(index.unended)
            if isinstance(plan, ViewPlan):
                tell_if_dark(index, plan.channels)

    @property
    def num_shards(self) -> int:
        """Of all data sets together."""
        return self.index.num_shards

    def reading(self) -> Reading:
        """What it takes of a cache of remote shards."""
        return Reading(self.index, self.seed, anywhere=bool(self.plan.group))

    def preview(self, count: int) -> list[str]:
        """Where the next `count` samples of all ranks come from: shard and key."""
        ids = order_of(self.index, self.seed, self.shuffle).samples_at(self.samples + np.arange(count))
        return [f"{shard_name(self.index.shard_of(i))}:{self.index.key(i)}" for i in ids.tolist()]

    def stages(self) -> list:
        """What a sample goes through, from a place in the order to a micro-batch; each iterates over the one before."""
        source = EndlessSource(
            self.index, self.shuffle, self.seed, self.samples, self.micro_batch, self.rank, self.world_size
        )
        return _stages(source, self.reader, self.room)

    def identity(self) -> dict:
        """What a resume must find unchanged."""
        return {
            "exact": True,
            "seed": self.seed,
            "num_samples": self.num_samples,
            "fingerprint": self.fingerprint,
            "streams": self.shuffle.streams,
            "window": self.shuffle.window,
            "span": self.shuffle.span,
            "views": self.plan.fingerprint(),
            **self._identity_of_labels(),
            **({"groups": self.partners.fingerprint} if self.partners else {}),
            **self._identity_of_parts(),
        }

    def _identity_of_labels(self) -> dict:
        """What a label says, which a head learns by its number."""
        if not self.label:
            return {}
        about = {"classes": list(self.index.classes)} if self.index.classes else {}
        about |= {"findings": [self.findings.field, *self.findings.names]} if self.findings else {}
        return {"label": self.index.label, **about}

    def _identity_of_parts(self) -> dict:
        about = {}
        for part in self.index.parts:
            told = {"weight": part.weight, "num_samples": part.num_samples, "fingerprint": part.fingerprint}
            about |= {f"mix.{part.name}.{key}": value for key, value in told.items()}
        return about

    def pairing(self) -> list[str]:
        """Who may be whose partner, in a few words."""
        return [self.partners.told()] if self.partners else []

    def mixture(self) -> list[str]:
        """What is drawn from each of several data sets, in a few words."""
        parts, weights = self.index.parts, sum(part.weight for part in self.index.parts)
        return [
            f"{part.name} {100 * part.weight / weights:.3g} % ({counted(part.num_samples, 'sample')}, {times:.3g} "
            f"times an epoch)"
            for part, times in zip(parts, passes(parts), strict=True)
        ]

    def in_todays_terms(self, state: dict) -> dict:
        """Runs of 0.1 knew names, sizes and offsets of the images and nothing of labels: theirs are the same data if
        these are. What a label says was not recorded at first, and a folder's name was what its path ended with."""
        labels = self._identity_of_labels()
        state = {key: labels[key] for key in ("label", "classes") if key in labels and "label" not in state} | state
        if state.get("fingerprint") in (self.fingerprint, None):
            return state
        if state["fingerprint"] == self.index.layout_fingerprint():
            return state | {"fingerprint": self.fingerprint}
        before = self.index.as_written()
        if state["fingerprint"] != _fingerprint(before, self.label):
            return state
        parts = zip(self.index.parts, before.parts, strict=True)
        known = {f"mix.{now.name}.fingerprint": (was.fingerprint, now.fingerprint) for now, was in parts}
        same = {key: now for key, (was, now) in known.items() if state.get(key) == was}
        return state | same | {"fingerprint": self.fingerprint}

    def name_of(self, sample):
        """(number of its shard, function that tells its key) of a sample."""
        return self.index.shard_of(sample), lambda: self.index.key(sample)


def _fingerprint(index: ShardIndex, label: str) -> str:
    return index.fingerprint + (f"_{index.label_fingerprint()}" if label else "")


class OnePass:
    """One rank's part of an index, each sample once, in order; each iteration is a pass of its own.

    Samples that cannot be read are left out and counted in `bad`. The parts of the ranks differ in length by one at
    most, and the last batch may be short: ranks need not have the same number of batches.
    """

    def __init__(self, index, plan, batch_size, rank, world_size, num_workers, label, findings, seed, samples):
        self.index, self.num_workers = index.with_label(label), num_workers
        partners = Partners(index, plan.group, seed) if plan.group else None
        self.reader = _reader(self.index, plan, seed, label, findings, "skip", num_workers, partners)
        self.source = OnePassSource(index.num_samples, batch_size, rank, world_size, samples)
        self.bad = BadSamples()

    def __iter__(self):
        running = run_pipeline(_stages(self.source, self.reader), self.num_workers)
        try:
            for arrays in running:
                for position, sample_id, reason in arrays["bad"]:
                    self.bad.add(self.index.shard_of(sample_id), reason, position, lambda: "")
                self.bad.add_read(images_read(arrays))
                if len(arrays["positions"]):
                    yield to_batch(arrays)
        finally:
            running.close()


def one_pass(
    index: ShardIndex,
    plan: ViewPlan,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    label: str = "",
    findings: VectorFormat | None = None,
    seed: int = 0,
    samples: np.ndarray | None = None,
) -> OnePass:
    """Batches for evaluation; rank r takes the samples from N * r // W up to N * (r + 1) // W.

    samples: ids of those to read, in that order; None for all N. A sample's position is its id, and `seed` decides its
    crop where the plan draws one. Errors as in `Loader`.
    """
    return OnePass(index, plan, batch_size, rank, world_size, num_workers, label, findings, seed, samples)


def _stages(source, reader: MicroBatchReader, room: float = 1.0) -> list:
    ahead = functools.partial(fetch_ahead, source=source, index=reader.index, room=room)
    return [source, ahead, functools.partial(announce, reader=reader), wds.map(reader)]


def _reader(index, plan, seed, label, findings, on_bad, num_workers, partners: Partners | None) -> MicroBatchReader:
    of_volumes = isinstance(plan, VolumePlan)
    (refuse_other_volumes if of_volumes else refuse_other_images)(index, plan.channels)
    threads = 1 if num_workers else min(torch.get_num_threads(), 8)
    read_label = FindingsReader(label, findings) if findings else label_reader(index, label)
    buffers = VolumeBuffers if of_volumes else MicroBatchBuffers
    return MicroBatchReader(index, plan, seed, read_label, on_bad, threads, partners, buffers)
