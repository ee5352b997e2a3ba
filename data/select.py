"""A part of a data set: the samples that a list of keys names, that have a certain label, or a share of them.

- Which ones is a function of the data and the selection alone, the same on all ranks and in all runs.
- A smaller share of the same seed lies within a larger one.
- What is named and is not there is refused: a list with a mistake is no smaller data set.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from prelude.data.class_names import plain_reader
from prelude.data.counting import counted
from prelude.data.decode import BadImage
from prelude.data.errors import UserError, cause_of
from prelude.data.labels import no_label
from prelude.data.members import label_members
from prelude.data.order import permutation
from prelude.data.remote_shards import shard_name
from prelude.data.shards import ShardIndex, keys_in
from prelude.data.waiting import called, in_threads


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
    is not there."""
    if selection is None:
        return index
    ids = np.arange(index.num_samples)
    if selection.keys is not None:
        ids = _with_keys(index, _lines(selection.keys, where), f"{where}.keys={selection.keys}")
    if selection.label is not None:
        ids = _with_label(index, ids, selection, where)
    if selection.share is not None:
        ids = _share(ids, selection, where)
    return index.subset(ids)


def _share(ids: np.ndarray, selection: Selection, where: str) -> np.ndarray:
    """Of the places in an order that the seed and their number decide, the first."""
    count = round(selection.share * len(ids))
    if not count:
        raise UserError(
            f"{where}.share={selection.share:g} of {counted(len(ids), 'sample')} is none; write a larger share."
        )
    return ids[np.sort(permutation(len(ids), selection.seed, use=b"share")[:count])]


def _with_label(index: ShardIndex, ids: np.ndarray, selection: Selection, where: str) -> np.ndarray:
    labelled = index.with_label(selection.label)
    if not (labelled.labels[ids, 0] >= 0).any():
        raise no_label(labelled)
    there = ids[labelled.labels[ids, 0] >= 0]
    reader = plain_reader(labelled)
    if reader.shape:
        raise UserError(f"{where}.label={selection.label} holds several numbers a sample, and no class; write another.")
    wanted, found, taken = {str(value) for value in selection.values}, set(), np.zeros(len(there), bool)
    for i, content in enumerate(label_members(labelled, there.tolist())):
        try:
            value = str(reader.plain(content)) if content is not None else None
        except BadImage:
            continue  # a sample whose label nobody knows does not have it
        taken[i] = value in wanted
        found |= {value} if taken[i] else set()
    if missing := sorted(wanted - found):
        raise UserError(f"No sample of {index.named} has the label {', '.join(missing)} of {where}.values; correct it.")
    return there[taken]


def _with_keys(index: ShardIndex, wanted: Sequence[str], where: str) -> np.ndarray:
    places: dict[str, list[int]] = defaultdict(list)  # by each name that a sample goes by
    wanted_keys = set(wanted)
    paths = list(dict.fromkeys(index.paths))
    keys_of = dict(zip(paths, in_threads(keys_in, paths, lambda path: f"the headers of {path}"), strict=True))
    begin = 0
    for path, end in zip(index.paths, index.ends.tolist(), strict=True):
        keys = keys_of[path]
        for sample, offset in enumerate(index.images[begin:end, 0].tolist(), start=begin):
            key = keys.get(offset, "?")
            for name in {key, f"{shard_name(path)}:{key}", f"{path}:{key}", f"{path!s}:{key}"}:
                if name in wanted_keys:
                    places[name].append(sample)
        begin = end
    if missing := [line for line in wanted if line not in places]:
        raise UserError(
            f"{counted(len(missing), 'key')} of {where} not found in {index.named} (the first: {missing[0]!r}); "
            f"write the keys of samples that are there."
        )
    if twice := next((line for line in wanted if len(places[line]) > 1), None):
        found = [index.shard_of(sample) for sample in places[twice]]
        alike = len(set(map(shard_name, found))) < len(set(found))
        key = twice.removeprefix(f"{shard_name(found[0])}:")
        written = f"{found[0] if alike else shard_name(found[0])}:{key}"
        raise UserError(
            f"The key {twice!r} of {where} is that of {len(places[twice])} samples; write SHARD:KEY, such as {written}."
        )
    return np.unique(np.array([places[line][0] for line in wanted], np.int64))


def _lines(path: str, where: str) -> list[str]:
    def read() -> str:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()

    try:
        lines = [line.strip() for line in called(read, f"the keys in {path}").splitlines()]
    except OSError as error:
        raise UserError(f"{where}.keys={path} cannot be read ({cause_of(error)}); write a file that can.") from None
    except UnicodeDecodeError:
        raise UserError(f"{where}.keys={path} is no text; write one key a line.") from None
    if not any(lines):
        raise UserError(f"{where}.keys={path} names no key; write one a line.")
    return list(dict.fromkeys(filter(None, lines)))
