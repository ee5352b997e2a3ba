"""Pairs that are no augmentations: for a sample another one of its group (a patient, a place, a track), which a field
names.

- Which one is a pure function of (seed, position) and of the groups: the same at any number of ranks and workers, and
  after any interruption. All others of the group are equally likely.
- A sample that is alone in its group, or whose field is missing or empty, is its own partner.
- Of several data sets that are mixed each has groups of its own. Of a part of a data set, groups are what is left.
- Finding one is arithmetic and three numbers of a table, whatever the size of group and data set. The table is made
  once of a node's shards, kept beside their index and mapped; of a folder or a `select` it is made at each start.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.data.groups import group_reader
from prelude.data.kept_files import Computed, kept_numbers
from prelude.data.labels import in_words, label_name, no_label
from prelude.data.members import label_members, warn_unread
from prelude.data.order import hashed
from prelude.data.remote_shards import named
from prelude.data.shards import ShardIndex
from prelude.data.waiting import moved

MOST_TRIED = 16  # partners that cannot be read, before a sample is its own
_SIZES = 2**31  # a row's first number is (where the group begins) * _SIZES + (how many it has)


class Partners:
    """Who may stand for whom in an index. group: `json:FIELD`, or another label that is text or a number.

    `fingerprint` is a hash of all groups. Raises UserError where nothing has the field, or all samples are alone.
    """

    def __init__(self, index: ShardIndex, group: str, seed: int):
        self.group, self.seed, self.num_samples = label_name(group), seed, index.num_samples
        labelled = index.with_label(self.group)
        parts = [[part.begin, part.end] for part in index.parts]
        what = f"groups {self.group} {parts}"
        self.table, about = kept_numbers(
            labelled.identity, what, lambda: _table(labelled, self.group, parts), f"the groups by {self.group}"
        )
        self.fingerprint, self.num_groups, self.num_alone, self.num_without, self.largest = about
        if not self.num_groups:
            raise UserError(
                f"Of {counted(self.num_samples, 'image')} no two have the same {in_words(self.group)}; write the field "
                f"of objective.pair_by that those of one patient, place or track have in common, or leave it out."
            )

    def first(self, sample_ids: np.ndarray, positions: Sequence[int]) -> np.ndarray:
        """(n,) int64: the partners of samples at positions."""
        begins, sizes = np.divmod(self.table[sample_ids, 0], _SIZES)
        drawn = [self._draw(position, size) for position, size in zip(positions, sizes.tolist(), strict=True)]
        return self._others(sample_ids, begins, sizes, np.array(drawn, np.int64))

    def in_turn(self, sample_id: int, position: int) -> list[int]:
        """The partner and those that come in its place where one cannot be read; empty for a sample that is alone."""
        begin, size = divmod(int(self.table[sample_id, 0]), _SIZES)
        count = min(size - 1, MOST_TRIED)
        turns = (self._draw(position, size) + np.arange(count)) % max(size - 1, 1)
        own, begins, sizes = (np.full(count, value, np.int64) for value in (sample_id, begin, size))
        return self._others(own, begins, sizes, turns).tolist()

    def told(self) -> str:
        """What a start says of it."""
        share = 100 * (1 - self.num_alone / self.num_samples)
        without = f"; {counted(self.num_without, 'image')} with no {in_words(self.group)}" if self.num_without else ""
        return (
            f"{counted(self.num_groups, 'group')} of 2 to {self.largest} images by {self.group}, {share:.3g} % of "
            f"{counted(self.num_samples, 'image')}{without}; an image that is alone is its own partner"
        )

    def _draw(self, position: int, size: int) -> int:
        return hashed(b"partner", self.seed, position) % (size - 1) if size > 2 else 0

    def _others(self, own: np.ndarray, begins: np.ndarray, sizes: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """Number `drawn` of a group without the sample itself, whose members stand in growing order."""
        found = self.table[begins + drawn, 1]
        after = np.minimum(begins + drawn + 1, begins + sizes - 1)
        return np.where(sizes == 1, own, np.where(found < own, found, self.table[after, 1]))


def _table(index: ShardIndex, group: str, parts: list[list[int]]) -> Computed:
    """((N, 2) int64: of each sample its group's place and size, and the members of all groups, one after the other;
    what `Partners` tells of them)."""
    numbers, without, unread = _group_numbers(index, group, parts)
    members = np.argsort(numbers, kind="stable")  # growing within a group
    moved()  # to put many in order takes a while
    sizes = np.bincount(numbers)
    begins = np.cumsum(sizes) - sizes
    table = np.stack([(begins * _SIZES + sizes)[numbers], members], axis=1)
    digest = hashlib.blake2b(np.ascontiguousarray(table, "<i8"), digest_size=16).hexdigest()
    about = [digest, int((sizes > 1).sum()), int((sizes == 1).sum()), without, int(sizes.max())]
    return Computed(table, about, lasting=not unread)


def _group_numbers(index: ShardIndex, group: str, parts: list[list[int]]) -> tuple[np.ndarray, int, int]:
    """((N,) int64: which group each sample is in, in the order in which they first come; how many have none; of these,
    those whose label could not be read)."""
    if not len(index.labels):
        raise no_label(index)
    value_of = _reader(group)
    part_of = np.searchsorted([end for _, end in parts], np.arange(index.num_samples), side="right")
    known: dict = defaultdict(lambda: len(known))
    without, unread, example, numbers = 0, 0, None, np.empty(index.num_samples, np.int64)
    for sample, content in enumerate(label_members(index)):
        value = None if content is None else value_of(content)
        example = content if example is None else example
        without += value is None
        unread += content is None and int(index.labels[sample, 0]) >= 0
        numbers[sample] = known[sample if value is None else (int(part_of[sample]), value)]
    if example is None:
        raise no_label(index)
    if without == index.num_samples:
        raise UserError(
            f"{named(index.paths)} have no {in_words(group)} with text or a number in it (the first: "
            f"{example[:60]!r}); write another objective.pair_by, such as json:FIELD."
        )
    warn_unread(index, unread, "each of these samples is its own partner")
    return numbers, without, unread


def _reader(group: str):
    """From a member's bytes to the group's name, None where there is no text and no number."""
    written = group_reader(group, f"objective.pair_by={group}")

    def value_of(content: bytes) -> str | None:
        value = written(content)
        return value.strip() or None if isinstance(value, str) else None

    return value_of
