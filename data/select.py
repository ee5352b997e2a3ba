"""A part of a data set: the samples that a list of keys names, that have a certain label, or a share of them.

- Which ones is a function of the data and the selection alone, the same on all ranks and in all runs.
- A smaller share of the same seed lies within a larger one.
- What is named and is not there is refused: a list with a mistake is no smaller data set.
- Keys and labels are read once on a node: the samples are kept beside the index and mapped, under the data, the
  selection and the content of the list.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np

from prelude.data.class_names import plain_reader
from prelude.data.counting import counted
from prelude.data.decode import BadImage
from prelude.data.errors import RunStopped, UserError, cause_of
from prelude.data.kept_files import Computed, kept_numbers
from prelude.data.labels import no_label
from prelude.data.members import label_members, warn_unread
from prelude.data.order import permutation
from prelude.data.places import Column, Places
from prelude.data.remote_shards import shard_name
from prelude.data.shards import ShardIndex, keys_in
from prelude.data.signed_urls import without_signature
from prelude.data.waiting import called, in_threads, moved

_AT_ONCE = 2**20  # samples whose labels may be waiting to be looked at


@dataclass(frozen=True)
class Selection:
    """What is taken, in this order: the samples of `keys`, of these those whose `label` is one of `values`, of these a
    `share`."""

    keys: str | None = None  # a text file: KEY or SHARD:KEY on each line, SHARD a file's name or its path
    label: str | None = None  # as evaluations name it: cls, txt, json:FIELD
    values: tuple[int | str, ...] = ()
    share: float | None = None
    seed: int = 0  # of the share

    def said(self) -> dict:
        """What was chosen, for the record; `Selection(**said)` is the same."""
        return {key: value for key, value in asdict(self).items() if value}


def selected(index: ShardIndex, selection: Selection | None, where: str) -> ShardIndex:
    """where: the setting that says so, for messages. Raises UserError where nothing is left, or something that is named
    is not there, and RunStopped where the list changes while it is read."""
    if selection is None:
        return index
    said = selection.said()
    if selection.keys is not None:  # samples go by their shards' paths, too, as they are spelled
        said["keys"] = [_hash_of(selection.keys, where), [without_signature(path) for path in index.paths]]

    def taken() -> Computed:
        ids, unread = _samples(index, selection, where)
        if selection.keys is not None and _hash_of(selection.keys, where) != said["keys"][0]:
            raise RunStopped(f"{where}.keys={selection.keys} was changed while it was read; start again.")
        return Computed(np.stack([ids, np.zeros_like(ids)], 1), None, lasting=not unread)

    what = f"selected {json.dumps(said, sort_keys=True)}"
    table, _ = kept_numbers(index.identity, what, taken, f"the samples of {where}")
    return index.subset(Column(table) if isinstance(table, Places) else table[:, 0].copy())


def _samples(index: ShardIndex, selection: Selection, where: str) -> tuple[np.ndarray, int]:
    """((n,) int64, growing; how many are left out because their label could not be read)."""
    unread = 0
    if selection.keys is None:
        ids = np.arange(index.num_samples)
    else:
        ids = _with_keys(index, _lines(selection.keys, where), f"{where}.keys={selection.keys}")
    if selection.label is not None:
        ids, unread = _with_label(index, ids, selection, where)
    if selection.share is not None:
        moved()  # to put many in order takes a while
        ids = _share(ids, selection, where)
        moved()
    return ids, unread


def _share(ids: np.ndarray, selection: Selection, where: str) -> np.ndarray:
    """Of the places in an order that the seed and their number decide, the first."""
    count = round(selection.share * len(ids))
    if not count:
        raise UserError(
            f"{where}.share={selection.share:g} of {counted(len(ids), 'sample')} is none; write a larger share."
        )
    return ids[np.sort(permutation(len(ids), selection.seed, use=b"share")[:count])]


def _with_label(index: ShardIndex, ids: np.ndarray, selection: Selection, where: str) -> tuple[np.ndarray, int]:
    labelled = index.with_label(selection.label)
    there = ids[labelled.labels[ids, 0] >= 0]
    if not len(there):
        raise no_label(labelled)
    reader = plain_reader(labelled)
    if reader.shape:
        raise UserError(f"{where}.label={selection.label} holds several numbers a sample, and no class; write another.")
    wanted, found, taken = {str(value) for value in selection.values}, set(), np.zeros(len(there), bool)
    unread = 0
    for i, content in enumerate(_contents(labelled, there)):
        unread += content is None
        try:
            value = str(reader.plain(content)) if content is not None else None
        except BadImage:
            continue  # a sample whose label nobody knows does not have it
        taken[i] = value in wanted
        found |= {value} if taken[i] else set()
    if missing := sorted(wanted - found):
        raise UserError(f"No sample of {index.named} has the label {', '.join(missing)} of {where}.values; correct it.")
    warn_unread(labelled, unread, f"{where} leaves out their samples")
    return there[taken], unread


def _contents(labelled: ShardIndex, ids: np.ndarray) -> Iterator[bytes | None]:
    """Read no further ahead than `_AT_ONCE` samples."""
    for begin in range(0, len(ids), _AT_ONCE):
        yield from label_members(labelled, ids[begin : begin + _AT_ONCE].tolist())


def _with_keys(index: ShardIndex, places: dict[str, int], where: str) -> np.ndarray:
    """places: a number below 0 for each line, which that of its sample replaces."""
    spans: dict[str, list[tuple[int, int]]] = defaultdict(list)  # of each shard's samples, which may be there twice
    for path, end, count in zip(index.paths, index.ends.tolist(), index.counts.tolist(), strict=True):
        spans[path].append((end - count, end))

    def found_in(path: str) -> list[tuple[str, int]]:
        """Lines that name samples of a shard, and these. Nothing else is left of it, whatever it holds."""
        keys, found = keys_in(path), []
        before = {"", f"{shard_name(path)}:", f"{path}:", f"{path!s}:"}  # in names that a sample goes by
        for begin, end in spans[path]:
            for sample, offset in enumerate(index.images[begin:end, 0].tolist(), start=begin):
                key = keys.get(offset, "?")
                found += [(name, sample) for one in before if (name := f"{one}{key}") in places]
        return found

    several: dict[str, list[int]] = defaultdict(list)
    for found in in_threads(found_in, list(spans), lambda path: f"the headers of {path}"):
        for line, sample in found:
            if places[line] >= 0:
                several[line].append(sample)
            else:
                places[line] = sample
    if missing := [line for line, sample in places.items() if sample < 0]:
        raise UserError(
            f"{counted(len(missing), 'key')} of {where} not found in {index.named} (the first: {missing[0]!r}); "
            f"write the keys of samples that are there."
        )
    if twice := next((line for line in places if line in several), None):
        found = [index.shard_of(sample) for sample in sorted([places[twice], *several[twice]])]
        alike = len(set(map(shard_name, found))) < len(set(found))
        key = twice.removeprefix(f"{shard_name(found[0])}:")
        written = f"{found[0] if alike else shard_name(found[0])}:{key}"
        raise UserError(
            f"The key {twice!r} of {where} is that of {len(found)} samples; write SHARD:KEY, such as {written}."
        )
    return np.unique(np.fromiter(places.values(), np.int64, len(places)))


def _lines(path: str, where: str) -> dict[str, int]:
    """Each line with -1."""

    def read() -> dict[str, int]:
        with open(path, encoding="utf-8-sig") as file:
            return dict.fromkeys(filter(None, (line.strip() for line in file.read().splitlines())), -1)

    with _told(path, where):
        lines = called(read, f"the keys in {path}")
    if not lines:
        raise UserError(f"{where}.keys={path} names no key; write one a line.")
    return lines


def _hash_of(path: str, where: str) -> str:
    def read() -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with _told(path, where):
        return called(read, f"the keys in {path}")


@contextmanager
def _told(path: str, where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{where}.keys={path} cannot be read ({cause_of(error)}); write a file that can.") from None
    except UnicodeDecodeError:
        raise UserError(f"{where}.keys={path} is no text; write one key a line.") from None
