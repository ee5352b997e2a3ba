"""Which sample of several data sets comes when: a pure function of (seed, position), as in `order`.

- Each part has an endless order of its own, in which every sample of it comes once in each pass.
- Positions are dealt out in blocks. How many of a block belong to a part follows from the weights by exact arithmetic
  alone, so that a part never falls behind its share by more than rounding; where in the block they lie is drawn.
- Nothing is counted on the way: what came before a block is computed from its number.
- An epoch is as many positions as all parts together have samples. A part's pass may take more or less than one.
"""

import hashlib
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from prelude.data.order import Order, Recent, Shuffle, hashed, permutation, substitute
from prelude.data.shards import Part, ShardIndex

BLOCK = 1024  # positions that are mixed with each other


class MixedOrder:
    """The endless order of the samples of an index that has `parts`."""

    def __init__(self, parts: Sequence[Part], counts: np.ndarray, seed: int, shuffle: Shuffle):
        self.parts, self.seed = parts, seed
        self.num_samples = sum(part.num_samples for part in parts)
        of_parts = np.split(counts, np.cumsum([part.num_shards for part in parts])[:-1])
        self.orders = [
            Order(of_part, seed_of_part(seed, part.name), shuffle)
            for part, of_part in zip(parts, of_parts, strict=True)
        ]
        self._dealt = Dealer({part.name: part.weight for part in parts}, seed, BLOCK, b"mix").dealt

    def samples_at(self, positions) -> np.ndarray:
        """Sample ids in [0, num_samples) at these positions; any shape, int64."""
        positions = np.asarray(positions, np.int64)
        blocks, places = np.divmod(positions, BLOCK)
        ids = np.empty_like(positions)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            dealt, nth = self._dealt(block)
            turn, nth = dealt[places[here]], nth[places[here]]
            found = np.empty_like(nth)
            for i in np.unique(turn).tolist():
                found[turn == i] = self.parts[i].begin + self.orders[i].samples_at(nth[turn == i])
            ids[here] = found
        return ids


class Dealer:
    """Whose turn it is, of several with weights, for ever.

    Turns are dealt in blocks. How many of a block belong to each follows from the weights, where in the block they lie
    is drawn from the seed. use: of the seed, apart from others.
    """

    def __init__(self, weights: Mapping[str, float], seed: int, block: int, use: bytes):
        self.length, self.seed, self.use = block, seed, use
        self.weights = [Fraction(repr(weight)) for weight in weights.values()]  # 0.1 is a tenth
        names = list(weights)
        self._heavy_first = sorted(range(len(names)), key=lambda i: (-self.weights[i], names[i]))
        self._blocks = Recent(64)

    def dealt(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each turn in a block: whose it is, and how many of theirs came before. Both (length,) int64."""
        return self._blocks.get(block, lambda: self._deal(block))

    def _deal(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        before, after = self.counts_before(block * self.length), self.counts_before((block + 1) * self.length)
        counts = [b - a for a, b in zip(before, after, strict=True)]
        order = permutation(self.length, self.seed, block, use=self.use)
        dealt = np.repeat(np.arange(len(counts)), counts)[order]
        nth = np.empty(self.length, np.int64)
        for i, (first, count) in enumerate(zip(before, counts, strict=True)):
            nth[dealt == i] = np.arange(first, first + count)
        return dealt, nth

    def counts_before(self, turn: int) -> list[int]:
        """How many turns before a block's first one belong to each.

        The heaviest takes its share, rounded, then the next one its share of what is left, and so on: each count grows
        by 0 or 1 from turn to turn, and together by 1.
        """
        counts, left = [0] * len(self.weights), turn
        total = sum(self.weights)
        for i in self._heavy_first:
            counts[i] = int(left * self.weights[i] / total + Fraction(1, 2))
            left, total = left - counts[i], total - self.weights[i]
        return counts


def order_of(index: ShardIndex, seed: int, shuffle: Shuffle) -> Order | MixedOrder:
    if index.parts:
        return MixedOrder(index.parts, index.counts, seed, shuffle)
    return Order(index.counts, seed, shuffle)


def substitute_in(index: ShardIndex, seed: int, position: int, attempt: int, sample_id: int) -> int:
    """The sample that takes an unreadable one's place: of the same part, where there are several."""
    for part in index.parts:
        if part.begin <= sample_id < part.end:
            return part.begin + substitute(seed, position, attempt, part.num_samples)
    return substitute(seed, position, attempt, index.num_samples)


def seed_of_part(seed: int, name: str) -> int:
    """Of a part's own order: it depends on the part's name, and not on which others there are."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return hashed(b"part", seed, int.from_bytes(digest, "little", signed=True)) >> 1


def passes(parts: Sequence[Part]) -> list[float]:
    """How often each part is gone through in an epoch."""
    samples, weights = sum(part.num_samples for part in parts), sum(part.weight for part in parts)
    return [samples * part.weight / weights / part.num_samples for part in parts]
