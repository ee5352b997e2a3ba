"""Features of an index as columns, each handed over piece by piece: what a file holds, whatever its format.

| column | of each sample |
|---|---|
| `key` | its key in the shard, or its name in the folder |
| `shard` | the number of its shard in the list of shards |
| `sample_id` | its place among all samples of the shards, unreadable ones included |
| `label` | its class number; there only where there are any |
| a kind of feature | its D values |
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from prelude.data.errors import UserError
from prelude.data.shards import ShardIndex
from prelude.evaluators.embedding.formats import KEY, LABEL, SAMPLE_ID, SHARD
from prelude.evaluators.embedding.samples import Keys, places_of
from prelude.evaluators.features.bank import Rows
from prelude.evaluators.features.labels import Labels

UNKNOWN = -1  # the label of a sample without one
_AT_ONCE = 2**22  # values held at once


@dataclass(frozen=True)
class Column:
    name: str
    dtype: np.dtype | None  # None for text
    width: int | None  # D; None for one value a sample
    parts: Callable[[], Iterator[np.ndarray | list[str]]]  # (n,) or (n, D) each; the same n in all columns


@dataclass(frozen=True)
class Table:
    """pieces: by kind, the rows of some contiguous samples, with the id of the first."""

    index: ShardIndex
    pieces: Sequence[tuple[int, dict[str, Rows]]]
    labels: Labels | None
    dtype: str  # of the features
    about: dict = field(default_factory=dict)

    @property
    def kinds(self) -> dict[str, int]:
        """Widths by kind."""
        return {kind: rows.values.shape[1] for kind, rows in self.pieces[0][1].items()}

    @property
    def num_rows(self) -> int:
        return sum(len(ids) for ids in self.sample_ids())

    @property
    def shards(self) -> list[str]:
        return places_of(self.index)

    @property
    def columns(self) -> list[Column]:
        keys, integers = Keys(self.index), np.dtype("<i8")
        found = [
            Column(KEY, None, None, lambda: map(keys.of, self.sample_ids())),
            Column(SHARD, np.dtype("<i4"), None, lambda: map(keys.shards, self.sample_ids())),
            Column(SAMPLE_ID, integers, None, self.sample_ids),
        ]
        if self.labels is not None:
            found.append(Column(LABEL, integers, None, lambda: map(self._labels_of, self.sample_ids())))
        dtype = np.dtype(self.dtype).newbyteorder("<")
        for kind, width in self.kinds.items():
            found.append(Column(kind, dtype, width, lambda kind=kind: self._values(kind)))
        return found

    def sample_ids(self) -> Iterator[np.ndarray]:
        """(n,) int64 of each part, growing."""
        for _, ids in self._parts(next(iter(self.kinds))):
            yield ids

    def missing(self) -> np.ndarray:
        """The ids of samples without features."""
        without = np.ones(self.index.num_samples, bool)
        for ids in self.sample_ids():
            without[ids] = False
        return np.flatnonzero(without)

    def _values(self, kind: str) -> Iterator[np.ndarray]:
        for values, _ in self._parts(kind):
            with np.errstate(over="ignore"):
                narrow = values.astype(self.dtype)
            if self.dtype != "float32" and (lost := np.isinf(narrow) & np.isfinite(values)).any():
                raise UserError(
                    f"The {kind} features hold {values[lost][0]:g}, which float16 does not; write --dtype float32."
                )
            yield narrow

    def _parts(self, kind: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        step = max(_AT_ONCE // max(self.kinds.values()), 1)
        for start, rows in self.pieces:
            part = rows[kind]
            for begin in range(0, len(part.sample_ids), step):
                places = slice(begin, begin + step)
                yield part.values[places].numpy(), part.sample_ids[places].numpy() + start

    def _labels_of(self, ids: np.ndarray) -> np.ndarray:
        return np.where(self.labels.known[ids].numpy(), self.labels.values[ids].numpy(), UNKNOWN)
