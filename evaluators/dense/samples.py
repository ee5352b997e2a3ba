"""A few samples of an index, to be looked at."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prelude.data.batch import ViewPlan
from prelude.data.errors import UserError
from prelude.data.loader import one_pass
from prelude.data.shards import ShardIndex
from prelude.evaluators.embedding.samples import Keys, pixels_of
from prelude.evaluators.features.extraction import NothingReadable


@dataclass(frozen=True)
class Samples:
    ids: list[int]
    keys: list[str]


def all_over(index: ShardIndex, count: int) -> np.ndarray:
    """(n,) int64, growing: the ids of `count` samples, or of all where there are fewer."""
    return np.linspace(0, index.num_samples - 1, min(count, index.num_samples)).round().astype(np.int64)


def chosen_samples(index: ShardIndex, keys: Sequence[str] | None, count: int, channels: int = 3) -> Samples:
    """Those of `keys`, in this order, or `count` from all over that can be read with `channels`. Raises UserError for a
    key that is not there, and where none of those from all over can be read."""
    found = Keys(index)
    if not keys:
        ids = all_over(index, count)
        sound = np.array([not isinstance(pixels, str) for pixels in pixels_of(index, ids.tolist(), channels)])
        if not sound.any():
            raise NothingReadable(index.named)
        return Samples(ids[sound].tolist(), found.of(ids[sound]))
    every = found.of(np.arange(index.num_samples))
    places = {key: place for place, key in reversed(list(enumerate(every)))}
    for key in keys:
        if key not in places:
            examples = ", ".join(every[:3])
            raise UserError(f"{index.named}: there is no key {key!r}; keys are {examples}, …")
    return Samples([places[key] for key in keys], list(keys))


def read_samples(index: ShardIndex, plan: ViewPlan, ids: Sequence[int]) -> Tensor:
    """(n, C, H, W) as the one view of `plan` shows them, in the order of `ids`. Raises UserError for one that cannot be
    read."""
    wanted = np.unique(ids)
    read = {}
    for batch in one_pass(index, plan, batch_size=len(wanted), samples=wanted):
        read |= dict(zip(batch.sample_ids.tolist(), batch.views[0], strict=True))
    for sample in ids:
        if sample not in read:
            raise UserError(
                f"The image of {index.key(sample)} in {index.shard_of(sample)} cannot be read; name another."
            )
    return torch.stack([read[sample] for sample in ids])
