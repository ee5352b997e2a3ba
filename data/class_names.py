"""Readers of an index's labels, and the numbers of classes that have names.

- Names are numbered in sorted order, those of train and test together, or in the order of a given list. Whole numbers
  stay what they are.
- A name that is not in a given list is refused, and so are texts that are all different: they are no classes.
"""

from collections.abc import Sequence

import numpy as np

from prelude.data.class_list import refuse_repeats
from prelude.data.counting import counted
from prelude.data.decode import BadImage
from prelude.data.errors import UserError
from prelude.data.labels import LabelReader, in_words, no_label, some
from prelude.data.members import label_members
from prelude.data.shards import ShardIndex

_MANY = 64  # labels of which no two are alike


def label_reader(index: ShardIndex, label: str) -> LabelReader | None:
    """For the labels of this name, after what most of them look like; None for "". Class names are those of the index,
    or all that there are. Raises UserError where there is no label."""
    if not label:
        return None
    reader = plain_reader(index)
    if reader.is_text and not index.classes:
        index = with_class_names([index])[0]
    reader.name_classes(index.classes)
    return reader


def plain_reader(index: ShardIndex) -> LabelReader:
    """One that knows no numbers of class names yet."""
    labelled = np.flatnonzero(index.labels[:, 0] >= 0)
    if not len(labelled):
        raise no_label(index)
    examples = label_members(index, some(labelled), peek=True)
    return LabelReader(index.label, [content for content in examples if content is not None])


def with_class_names(indexes: Sequence[ShardIndex], given: Sequence[str] = ()) -> list[ShardIndex]:
    """The same indexes (train and test), which agree on the numbers of class names; unchanged where labels are numbers
    and no names are given.

    Reads all labels that are text. Raises UserError for a label that is not among the given names, or beyond them, and
    for a name that is given twice where labels are text.
    """
    readers = [plain_reader(index) for index in indexes]
    if not given and not any(reader.is_text for reader in readers):
        return list(indexes)
    if any(reader.is_text for reader in readers):
        refuse_repeats(given, "The list of classes that is given")
    found: set[str] = set()
    for index, reader in zip(indexes, readers, strict=True):
        values, count = _values(index, reader)
        if not reader.is_text and given:
            _refuse_beyond(index, values, given)
        elif not reader.is_text:
            named = indexes[[reader.is_text for reader in readers].index(True)]
            raise UserError(
                f"The {in_words(index.label)}s of {index.named} hold numbers, those of {named.named} names; write both "
                f"alike."
            )
        elif not given and len(values) == count > _MANY:
            raise UserError(
                f"The {count} {in_words(index.label)}s of {index.named} are all different, so they name no classes; "
                f"write another label."
            )
        else:
            found |= values
    unknown = sorted(found - set(given)) if given else []
    if unknown:
        raise UserError(
            f"The label {unknown[0]!r} is not among the {counted(len(given), 'class')} that are given; add it, or "
            f"correct it."
        )
    names = tuple(given or sorted(found))
    return [index.with_classes(names) for index in indexes]


def _refuse_beyond(index: ShardIndex, numbers: set, given: Sequence[str]) -> None:
    if beyond := [number for number in numbers if not 0 <= number < len(given)]:
        raise UserError(
            f"The {in_words(index.label)}s of {index.named} hold class {max(beyond, key=abs)}, and {len(given)} "
            f"classes are given, numbered from 0; correct either."
        )


def _values(index: ShardIndex, reader: LabelReader) -> tuple[set, int]:
    """The different labels of an index, and how many there are in all."""
    found, count = set(), 0
    for content in label_members(index):
        try:
            value = reader.plain(content) if content is not None else None
        except BadImage:
            continue  # without its label a sample is left out, and counted, where it is read
        if value is not None:
            found.add(value if isinstance(value, str) else value.tolist() if not value.shape else -1)
            count += 1
    return found, count
