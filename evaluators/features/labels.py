"""What the samples of labelled shards are: a class number each, or a vector of yes, no and unknown.

- Labels are read from the shards each time, never from a bank of features: the same features serve every labelling.
- A sample whose label is missing or cannot be read is left out of an evaluation and counted.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prelude.data.class_names import label_reader
from prelude.data.counting import counted
from prelude.data.decode import BadImage
from prelude.data.errors import UserError
from prelude.data.findings import VectorFormat
from prelude.data.groups import group_names
from prelude.data.labels import extension_of, in_words
from prelude.data.members import label_members
from prelude.data.shards import ShardIndex


@dataclass(frozen=True)
class Labels:
    """Of all N samples of an index, in its order."""

    values: Tensor  # (N,) int64 class numbers, or (N, L) float32 of 1, 0 and NaN for unknown
    known: Tensor  # (N,) bool: whether the sample has a label at all
    groups: Tensor | None = None  # (N,) int64: samples of one group (a patient) must not be told apart as independent
    group: str = ""  # the label that was to say so
    num_ungrouped: int = 0  # labelled samples of which it does not, each a group of its own
    same_as: Tensor | None = None  # (N,) int64, of test: the sample of train that is the same image; -1: none


def class_numbers(index: ShardIndex) -> Labels:
    """Of names, their places among those of the index, or in sorted order. Raises UserError where there are neither
    class numbers nor names."""
    reader = label_reader(index, index.label)
    if reader.shape or reader.dtype != "int64":
        raise not_class_numbers(index.label, reader.dtype, reader.shape)
    values, known = torch.zeros(index.num_samples, dtype=torch.int64), torch.zeros(index.num_samples, dtype=torch.bool)
    for i, content in enumerate(label_members(index)):
        try:
            if content is not None:
                values[i], known[i] = int(reader(content)), True
        except BadImage:
            continue  # it stays unknown
    return Labels(values, known)


def grouped(labels: Sequence[Labels], indexes: Sequence[ShardIndex], group: str, asked: bool = True) -> list[Labels]:
    """The labels of each index with groups: samples whose label `group` is written alike share a number, in all of the
    indexes; a sample without one is alone, and an index without any has None.

    asked: by who judges, of every labelled sample. Raises UserError where one is without, then; and for what names no
    group.
    """
    numbers: dict[str | tuple[int, int], int] = {}
    found = []
    for place, (part, index) in enumerate(zip(labels, indexes, strict=True)):
        names = group_names(index, group)
        alone = [i for i, known in enumerate(part.known.tolist()) if known and names[i] is None]
        if asked and not any(names):
            raise no_group(index, group)
        if asked and alone:
            raise UserError(
                f"{len(alone)} of {counted(int(part.known.sum()), 'labelled image')} in {index.named} have no "
                f"{in_words(group)} to group by (the first: {index.key(alone[0])}); write one for each, of its own "
                f"where it stands alone, or leave --group out."
            )
        own = _numbered(names, numbers, place) if any(names) else None
        found.append(replace(part, groups=own, group=group, num_ungrouped=len(alone)))
    return found


def no_group(index: ShardIndex, group: str) -> UserError:
    return UserError(
        f"Groups of images cannot be read from {group}: no sample in {index.named} has a {in_words(group)} with a "
        "value in it; name another in --group or evaluate.label_group, or leave it out (evaluate.label_group='')."
    )


def _numbered(names: Sequence[str | None], numbers: dict, place: int) -> Tensor:
    """place: of the index among others, as a sample without a name is like none of theirs."""
    keys = ((place, i) if name is None else name for i, name in enumerate(names))
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys], dtype=torch.int64)


def not_class_numbers(label: str, dtype, shape: Sequence[int]) -> UserError:
    found = f"{str(dtype).removeprefix('torch.')} of shape {tuple(shape)}"
    return UserError(
        f"The {in_words(label)}s do not hold one class number a sample (found {found}); "
        f"write --label with the extension of integer labels, or of class names."
    )


def label_group(label: str, group: str) -> str:
    """The label whose values group the samples; a field's name alone is of the member that holds the labels."""
    return group if ":" in group or not group else f"{extension_of(label)}:{group}"


def label_vectors(index: ShardIndex, form: VectorFormat) -> Labels:
    """Raises UserError where no member has the format, none of the names ever occurs, or a sample has no group where
    groups are asked for."""
    if ":" in index.label:
        raise UserError(f"--label {index.label} names a field where findings are; write --label json --field FIELD.")
    values, known = [], []
    for content in label_members(index):
        try:
            parsed = json.loads(content) if content is not None else None
        except (ValueError, RecursionError):
            parsed = None
        vector = form.vector(parsed) if isinstance(parsed, (dict, list)) else None
        values.append(vector or [math.nan] * len(form.names))
        known.append(vector is not None)
    if not any(known):
        where = f"the field {form.field!r} of .{index.label} members" if form.field else f".{index.label} members"
        raise UserError(
            f"No sample in {index.named} has labels in {where}; write lists of names, or objects from "
            f"names to 1, 0 and -1."
        )
    labels = torch.tensor(values)
    if not (labels == 1).any():
        within = "" if form.field else ", or write in --field (evaluate.label_field) which field has the findings"
        raise UserError(f"None of {', '.join(form.names)} ever occurs in {index.named}; correct names{within}.")
    found = Labels(labels, torch.tensor(known))
    group = label_group(index.label, form.group_field)
    return grouped([found], [index], group, form.group_asked)[0] if group else found
