"""Labels as people write them, made into class numbers or lists of names.

- Class names are numbered in sorted order, or in that of a given list; whole numbers stay what they are.
- Several labels of an image stay names: a list of those present, or an object from names to 1, 0, -1 (uncertain) and
  null (unknown). `prelude multilabel` reads both.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from prelude.data.class_list import refuse_repeats
from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.data.labels import WHOLE

_WHOLE = re.compile(r"[+-]?\d+(\.0*)?")  # tables write 3.0 for 3 in a column that lacks a value
_YES_OR_NO = {"": None, "nan": None, "null": None, "none": None, "true": 1, "yes": 1, "false": 0, "no": 0}
_TRUTH = {1.0: 1, 0.0: 0, -1.0: -1}


@dataclass(frozen=True)
class Labels:
    values: list  # of each image: a class number, a list of names, a dict from names to numbers, or None
    classes: tuple[str, ...] = ()  # names in the order of their numbers; () where numbers came as numbers
    several: bool = False

    @property
    def num_unlabelled(self) -> int:
        return sum(value is None for value in self.values)

    def taken(self, numbers: Sequence[int]) -> "Labels":
        return Labels([self.values[n] for n in numbers], self.classes, self.several)


def class_labels(values: Sequence, given: Sequence[str] | None, what: str, folders: bool = False) -> Labels:
    """One class an image. values: text, whole numbers, or None and "" for no label; a negative number is none, too,
    unless it is among the given.

    given: the names in the order of their numbers, if that is fixed. what: where the labels come from, for messages.
    folders: whether values are names of folders, where one among other names is a class however it is called.
    Raises UserError for a value that is no class, or not among the given.
    """
    texts = [_text(value, what) for value in values]
    whole = WHOLE if folders else _WHOLE
    if not folders:
        texts = ["" if _is_negative(text) and text not in (given or ()) else text for text in texts]
    present = {text for text in texts if text}
    if present and all(whole.fullmatch(text) for text in present) and not (given and present <= set(given)):
        numbers = [int(text.partition(".")[0]) if text else None for text in texts]
        numbers = [number if number is not None and number >= 0 else None for number in numbers]
        if given and any(number >= len(given) for number in numbers if number is not None):
            largest = max(number for number in numbers if number is not None)
            raise UserError(f"{what} holds class {largest}, but there are {len(given)} class names; correct either.")
        return Labels(numbers, tuple(given or ()))
    refuse_repeats(given or (), "The list of classes")
    classes = tuple(given or sorted(present))
    number_of = {name: number for number, name in enumerate(classes)}
    unknown = sorted(present - set(classes))
    if unknown:
        raise UserError(f"{what} holds the class {unknown[0]!r}, which is not among the {len(classes)} given; add it.")
    return Labels([number_of[text] if text else None for text in texts], classes)


def named_numbers(numbers: Sequence[int | None], names: Sequence[str], given, what: str) -> Labels:
    """Class numbers that come with their names."""
    return class_labels([_name_of(number, names, what) for number in numbers], given or names, what)


def named_lists(values: Sequence, names: Sequence[str], what: str) -> list:
    """Lists of names for those of class numbers: without the negative and missing ones, and None, which is unknown,
    where there are no others. What is no list stays what it is."""
    found = []
    for value in values:
        if isinstance(value, (list, tuple)):
            named = [name for number in value if (name := _name_of(number, names, what)) is not None]
            value = named if named or not value else None
        found.append(value)
    return found


def _name_of(number: int | None, names: Sequence[str], what: str) -> str | None:
    """None for a number that is negative or missing."""
    if number is not None and number >= len(names):
        raise UserError(f"{what} holds a class number beyond its {counted(len(names), 'name')}; correct either.")
    return names[number] if number is not None and number >= 0 else None


def split_labels(values: Sequence, separator: str, what: str) -> Labels:
    """Several labels in one column: text that is cut at `separator`, or lists. None is unknown, "" is none of them."""
    lists = []
    for value in values:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(separator)] if separator else [value.strip()]
        if value is not None and not isinstance(value, (list, tuple)):
            raise UserError(f"{what} holds {value!r} where lists of labels were expected; write another --label.")
        lists.append(None if value is None else [str(part) for part in value if part not in ("", None)])
    names = tuple(sorted({name for found in lists if found for name in found}))
    return Labels(lists, names, several=True)


def label_columns(columns: dict[str, Sequence], what: str) -> Labels:
    """Several labels in a column each: 1, 0, -1 (uncertain), or nothing (unknown)."""
    rows = zip(*([_truth(value, name, what) for value in values] for name, values in columns.items()), strict=True)
    return Labels([dict(zip(columns, row, strict=True)) for row in rows], tuple(columns), several=True)


def is_missing(value) -> bool:
    """None, or the NaN that stands for nothing in a column of numbers."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text(value, what: str) -> str:
    if is_missing(value):
        return ""
    if isinstance(value, (list, tuple, dict, bytes)):
        raise UserError(f"{what} holds {value!r:.60} and not one class; write another --label.")
    return str(value).strip()


def _is_negative(text: str) -> bool:
    return bool(_WHOLE.fullmatch(text)) and float(text) < 0


def _truth(value, name: str, what: str) -> int | None:
    text = _text(value, what).lower()
    if text in _YES_OR_NO:
        return _YES_OR_NO[text]
    try:
        return _TRUTH[float(text)]
    except (ValueError, KeyError):
        raise UserError(
            f"The label {name!r} of {what} holds {value!r}; write 1, 0, -1 or nothing, or name one column of classes."
        ) from None
