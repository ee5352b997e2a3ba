"""Which image goes into which shard: a function of the source's listing, the seed and the options.

- Shards of a split differ by one sample at most, before what turns out to be undecodable.
- Images of one group are all in train or all in val.
- Images that are dear to read one by one (blocks) are shuffled by blocks, and within windows of many blocks; all others
  are shuffled as a whole.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from prelude.data.counting import counted
from prelude.data.errors import UserError

VAL = "val"
_WINDOW_BLOCKS, _WINDOW_SHARDS = 64, 8


class Shard(NamedTuple):
    name: str  # of the file, without a folder
    numbers: np.ndarray  # int64, of the source's images, in their order in the shard


def deal(
    count: int, *, name: str, per_shard: int, seed: int, val_share: float, groups: Sequence[str | None] | None,
    blocks: Sequence[int] | None,
) -> list[Shard]:  # fmt: skip
    """The shards of `count` images: NAME-000000.tar and on, and those of val.

    Raises UserError where a split would be empty.
    """
    generator = np.random.default_rng(seed)
    order = _shuffled(count, blocks, per_shard, generator)
    if not val_share:
        return _cut(name, order, per_shard)
    in_val = _chosen(count, val_share, groups, generator)
    if not in_val.any() or in_val.all():
        of = counted(len(set(groups)), "group") if groups else counted(count, "image")
        raise UserError(f"--val-share {val_share:g} of {of} leaves one side empty; write another share.")
    return _cut(name, order[~in_val[order]], per_shard) + _cut(VAL, order[in_val[order]], per_shard)


def _shuffled(count: int, blocks: Sequence[int] | None, per_shard: int, generator) -> np.ndarray:
    if blocks is None:
        return generator.permutation(count)
    parts = np.split(np.arange(count), list(blocks)[1:])
    order = np.concatenate([parts[n] for n in generator.permutation(len(parts))])
    window = max(_WINDOW_SHARDS * per_shard, _WINDOW_BLOCKS * math.ceil(count / len(parts)))
    return np.concatenate([generator.permutation(order[start : start + window]) for start in range(0, count, window)])


def _chosen(count: int, share: float, groups: Sequence[str | None] | None, generator) -> np.ndarray:
    """(count,) bool: whether an image is in val. Whole groups, in an order of the seed, while that comes nearer."""
    of_group: dict = {}
    for number in range(count):
        group = groups[number] if groups else None
        of_group.setdefault((number,) if group is None else group, []).append(number)
    members = list(of_group.values())
    chosen, wanted, taken = np.zeros(count, bool), share * count, 0
    for n in generator.permutation(len(members)):
        size = len(members[n])
        if abs(taken + size - wanted) < abs(taken - wanted):
            chosen[members[n]] = True
            taken += size
    return chosen


def _cut(name: str, order: np.ndarray, per_shard: int) -> list[Shard]:
    parts = np.array_split(order, math.ceil(len(order) / per_shard))
    return [Shard(f"{name}-{number:06d}.tar", numbers) for number, numbers in enumerate(parts)]
