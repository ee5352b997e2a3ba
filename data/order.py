"""Which sample comes when: a pure function of (seed, position), with no state but the position.

- The order is endless; epoch e is the positions [e * N, (e + 1) * N) of N samples, and holds every sample once.
- Position alone decides: any number of ranks and workers can compute any part of the order, in any direction, and a
  resumed run needs one integer.
- Reading stays local: shards are cut into spans of neighbouring samples, the spans are permuted, the line of spans is
  cut into `streams` that are read side by side, and each stream is shuffled within windows.
- Memory is O(shards + streams * window), and four bytes a span; never O(N).
- Permutations sort the raw words of Philox: unlike those of numpy's Generator, these are promised never to change.
"""

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Shuffle:
    """How far neighbours in a shard are torn apart. All three change the order, so a resume must find them unchanged.

    streams: places of the data set that are read side by side. span: neighbouring samples that move together; a span
    as long as a shard reads each shard once and whole, which slow storage wants. window: samples of a stream that are
    shuffled together.
    """

    streams: int = 8
    span: int = 256
    window: int = 16384


DEFAULT_SHUFFLE = Shuffle()


class Order:
    """The endless order of the samples of shards that hold `counts` samples each; at least one sample in all."""

    def __init__(self, counts: Sequence[int], seed: int, shuffle: Shuffle):
        self.num_samples = int(np.sum(counts))
        self.seed, self.shuffle = seed, shuffle
        self._spans = _Spans(np.asarray(counts, np.int64), shuffle.span)
        self._epochs = Recent(2)
        # An epoch's turn needs the windows of both epochs, and streams of unequal length change windows apart.
        self._windows = Recent(2 * min(shuffle.streams, self.num_samples) + 2)

    def samples_at(self, positions) -> np.ndarray:
        """Sample ids in [0, num_samples) at these positions; any shape, int64."""
        positions = np.asarray(positions, np.int64)
        ids = np.empty_like(positions)
        epochs = positions // self.num_samples
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self._samples_of_epoch(int(epoch), positions[here] % self.num_samples)
        return ids

    def first_samples_by_turn(self, epoch: int) -> Iterator[np.ndarray]:
        """For window after window: the first sample of each span that the streams then read, side by side."""
        streams, window = self.shuffle.streams, self.shuffle.window
        line_of_spans = self._epochs.get(epoch, lambda: self._line(epoch))
        starts = self.num_samples * np.arange(streams) // streams  # but for one sample those of `_places_in_line`
        for begin in range(0, -(-self.num_samples // streams), window):
            first = np.minimum(starts + begin, self.num_samples - 1)
            last = np.minimum(starts + min(begin + window, -(-self.num_samples // streams)), self.num_samples) - 1
            turns = zip(*(line_of_spans.at(line)[0] for line in (first, last)), strict=True)
            spans = line_of_spans.order[np.concatenate([np.arange(a, b + 1) for a, b in turns])]
            yield self._spans.starts(spans)

    def _samples_of_epoch(self, epoch: int, place: np.ndarray) -> np.ndarray:
        """place: (n,) int64 in [0, num_samples)."""
        line = self._places_in_line(epoch, place)
        line_of_spans = self._epochs.get(epoch, lambda: self._line(epoch))
        nth, within = line_of_spans.at(line)
        return self._spans.starts(line_of_spans.order[nth]) + within

    def _places_in_line(self, epoch: int, place: np.ndarray) -> np.ndarray:
        """Streams take turns: place k is item k // C of stream k % C, whose window then says which of its items."""
        streams, window = self.shuffle.streams, self.shuffle.window
        item, stream = np.divmod(place, streams)
        shorter, longer = divmod(self.num_samples, streams)  # the first `longer` streams have one item more
        stream_start = stream * shorter + np.minimum(stream, longer)
        stream_length = shorter + (stream < longer)
        nth_window, within = np.divmod(item, window)
        line = stream_start + nth_window * window
        turn = nth_window * streams + stream  # a number for each (window, stream)
        for number in np.unique(turn).tolist():
            w, c = divmod(number, streams)
            here = np.flatnonzero(turn == number)
            length = min(window, int(stream_length[here[0]]) - w * window)
            key = (epoch, c, w)
            shuffled = self._windows.get(key, lambda key=key, length=length: permutation(length, self.seed, *key))
            line[here] += shuffled[within[here]]
        return line

    def _line(self, epoch: int) -> "_Line":
        return _Line(permutation(self._spans.count, self.seed, epoch, -1, -1), self._spans)


def sample_seed(run_seed: int, position: int) -> int:
    """The seed of every random choice about the sample at a position; 63 bits."""
    return sample_seeds(run_seed, [position])[0]


def sample_seeds(run_seed: int, positions: Iterable[int]) -> list[int]:
    """`hashed` by run and position; what the run has in it is hashed once."""
    of_run = hashlib.blake2b(struct.pack("<q", run_seed), digest_size=8, person=b"seed")
    seeds = []
    for position in positions:
        of_position = of_run.copy()
        of_position.update(_PACK(position))
        seeds.append(int.from_bytes(of_position.digest(), "little") >> 1)
    return seeds


_PACK = struct.Struct("<q").pack


def substitute(run_seed: int, position: int, attempt: int, num_samples: int) -> int:
    """The sample that takes an unreadable one's place, the same on every rank and after any resume."""
    return hashed(b"substitute", run_seed, position, attempt) % num_samples


class _Spans:
    """Shards cut into spans. The last span of a shard may be shorter, an empty shard has none. Whatever is asked of a
    span is computed from the shards: ten million spans take no memory."""

    def __init__(self, counts: np.ndarray, length: int):
        """counts: (num_shards,) samples."""
        self.length = length
        of_shards = -(-counts // length)
        self._ends = np.cumsum(of_shards)  # of shards, in spans
        self._surplus = (self._ends - of_shards) * length - (np.cumsum(counts) - counts)  # if all were of full length
        self.count = int(self._ends[-1])
        self.short = (self._ends - 1)[counts % length > 0]  # those that are shorter
        self.missing = (-counts % length)[counts % length > 0]  # samples, of each of these

    def starts(self, spans: np.ndarray) -> np.ndarray:
        """(n,) int64: the first sample of each of these spans."""
        spans = spans.astype(np.int64)
        return spans * self.length - self._surplus[np.searchsorted(self._ends, spans, side="right")]


class _Line:
    """Spans one after the other in some order."""

    def __init__(self, order: np.ndarray, spans: _Spans):
        self.length = spans.length
        self.order = order.astype(np.uint32 if spans.count < 2**32 else np.int64)
        is_short = np.zeros(spans.count, bool)
        is_short[spans.short] = True
        turns = np.flatnonzero(is_short[order])  # of the short ones
        missing = spans.missing[np.searchsorted(spans.short, order[turns])]
        self._missing = np.concatenate([[0], np.cumsum(missing)])  # before and after each of the short ones
        self._short_ends = (turns + 1) * self.length - self._missing[1:]

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For samples of the line: (whose turn it is, how many samples of that span come before). Both int64."""
        full = places + self._missing[np.searchsorted(self._short_ends, places, side="right")]
        return np.divmod(full, self.length)


def permutation(length: int, *key: int, use: bytes = b"permutation") -> np.ndarray:
    """(length,) int64. use: of the key, so that another one gives another permutation."""
    words = np.random.Philox(key=hashed(use, *key, size=16)).random_raw(length)
    return np.argsort(words, kind="stable")


def hashed(use: bytes, *numbers: int, size: int = 8) -> int:
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=size, person=use).digest(), "little")


class Recent:
    """The last `limit` values that were asked for; a lost one is computed again."""

    def __init__(self, limit: int):
        self.limit, self.values = limit, OrderedDict()

    def get(self, key, compute):
        if key not in self.values:
            self.values[key] = compute()
            if len(self.values) > self.limit:
                self.values.popitem(last=False)
        self.values.move_to_end(key)
        return self.values[key]
