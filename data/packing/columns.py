"""Which column of a table is what: the image, labels, groups and further fields."""

import datetime
import decimal
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

from prelude.data.counting import named
from prelude.data.errors import UserError
from prelude.data.image_files import image_extension_of
from prelude.data.packing.labels import (
    class_labels,
    is_missing,
    label_columns,
    named_lists,
    named_numbers,
    split_labels,
)
from prelude.data.packing.source import Source, SourceOptions, strings
from prelude.data.packing.splits import split_in

_PATHS = ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img", "img_path")
_LABELS = ("label", "labels", "class")
_NOTHING = ("nan", "null", "none", "na", "n/a", "<na>", "-", "?")  # as programs write it into a text
_MOST_SPLITS = 10  # that have other names than those of splits, as folds have


@dataclass(frozen=True)
class Columns:
    """The rows of a table by column. `class_names`: of columns whose numbers stand for names."""

    path: str
    values: dict[str, Sequence]
    places: Sequence[str] = ()
    class_names: dict[str, Sequence[str]] = field(default_factory=dict)
    header: bool = True

    def place(self, row: int) -> str:
        return self.places[row] if self.places else f"row {row}"

    def taken(self, rows: Sequence[int]) -> "Columns":
        values = {name: [column[row] for row in rows] for name, column in self.values.items()}
        return Columns(self.path, values, [self.place(row) for row in rows], self.class_names, self.header)

    def check(self, name: str, option: str) -> str:
        """The name itself. Raises UserError where there is no such column."""
        if name not in self.values:
            near = difflib.get_close_matches(name, self.values, n=1)
            hint = f"did you mean {near[0]}?" if near else f"its columns are {', '.join(self.values)}."
            raise UserError(f"--{option} {name}: {self.path} has no such column; {hint}")
        return name


def image_column(columns: Columns, wanted: str) -> str:
    """The column of paths: the one that is asked for, has a usual name, or alone holds names of images."""
    if wanted:
        return columns.check(wanted, "image")
    holding = [
        name
        for name, values in columns.values.items()
        if any(isinstance(value, str) and image_extension_of(value.strip()) for value in values[:100])
    ]
    usual = [name for name in holding if name.lower() in _PATHS]
    if len(usual) == 1 or len(holding) == 1:
        return (usual or holding)[0]
    raise UserError(
        f"It is not clear which column of {columns.path} holds the paths of images ({', '.join(columns.values)}); "
        f"write --image COLUMN."
    )


def column_of_splits(columns: Columns, options: SourceOptions) -> list[str]:
    """What a column called `split` tells of each row, where one of its values is a split, or they are few; [] else, and
    where it is the label."""
    name = next((name for name in columns.values if _is_split(name) and name not in options.label), None)
    values = strings(columns.values[name]) if name else []
    if names := columns.class_names.get(name):
        named = {str(number): text for number, text in enumerate(names)}
        values = [named.get(value) for value in values]
    told = [(value or "").lower().removesuffix(".0") for value in values]
    told = ["" if value in _NOTHING else split_in(value) or value for value in told]
    called = set(told) - {""}
    return told if any(map(split_in, called)) or 1 < len(called) <= _MOST_SPLITS < len(told) else []


def apply_columns(source: Source, columns: Columns, image: str, options: SourceOptions) -> None:
    """Gives a source the labels, groups and fields of its rows."""
    labels = [] if options.unlabelled else list(options.label) or _guessed_label(columns, image)
    for name in labels:
        columns.check(name, "label")
    what = f"Column {labels[0]!r} of {columns.path}" if labels else ""
    if len(labels) > 1:
        source.labels = label_columns({name: columns.values[name] for name in labels}, columns.path)
    elif labels:
        source.labels = _one_column(columns, labels[0], options, what)
    if options.label_separator and len(labels) != 1:
        raise UserError("--label-separator has no effect without one --label column that it cuts; leave it out.")
    if options.group:
        source.groups = strings(columns.values[columns.check(options.group, "group")])
    kept = list(dict.fromkeys([*options.fields, *([options.group] if options.group else [])]))
    for name in kept:
        columns.check(name, "fields")
    if "labels" in kept and labels and source.labels.several:
        raise UserError(
            f"The column 'labels' of {columns.path} cannot be kept by --fields or --group beside several labels, which "
            f"take that name in the .json member; rename the column."
        )
    if kept:
        rows = zip(*(columns.values[name] for name in kept), strict=True)
        source.fields = [dict(zip(kept, map(_plain, row), strict=True)) for row in rows]
    if labels:
        kind = "several labels" if source.labels.several else "classes"
        source.notes.append(f"{kind} from {named(len(labels), 'column')} {', '.join(map(repr, labels))}")
    unused = [name for name in columns.values if name not in (image, *labels, *kept)]
    if unused:
        source.notes.append(f"not packed: {', '.join(unused)} (--label or --fields would)")


def _one_column(columns: Columns, name: str, options: SourceOptions, what: str):
    values, names = columns.values[name], columns.class_names.get(name)
    if options.label_separator or any(isinstance(value, (list, tuple)) for value in values):
        if names:
            values = named_lists(values, names, what)
        return split_labels(values, options.label_separator, what)
    if names:
        return named_numbers(values, names, options.classes, what)
    return class_labels(values, options.classes, what)


def _is_split(name: str) -> bool:
    return name.lower() == "split"


def _guessed_label(columns: Columns, image: str) -> list[str]:
    if not columns.header and len(columns.values) == 2:
        return [name for name in columns.values if name != image]
    named = [name for name in columns.class_names if name in columns.values and not _is_split(name)]
    usual = [name for name in columns.values if name.lower() in _LABELS and name != image]
    return named if len(named) == 1 else usual if len(usual) == 1 else []


def _plain(value):
    """A value that JSON can hold."""
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, bytes):
        raise UserError("A column of bytes cannot be kept as a field; leave it out of --fields and --group.")
    return None if is_missing(value) else value
