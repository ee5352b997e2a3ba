"""A table of paths: CSV as spreadsheets write it, TSV, or JSON lines.

- Byte order marks, UTF-16, `sep=;` lines, semicolons, tabs and quotes are understood.
- A path is relative to the table's folder (or `--root`), or absolute; backslashes are tried as slashes.
- Without a header, columns are called 1, 2, ...
"""

import csv
import io
import json
import os
import re
import stat
from collections.abc import Sequence

from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.data.image_files import MAX_IMAGE_BYTES, OF_THE_FILE, PassedOver, image_extension_of
from prelude.data.packing.columns import Columns, apply_columns, column_of_splits, image_column
from prelude.data.packing.source import Source, SourceOptions, read_file, stamp_of
from prelude.data.packing.splits import are_several, of_one_split, place_of_split, splits_at

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_DELIMITERS = ",;\t|"


class TableSource(Source):
    what = "a table of paths"

    def __init__(self, table: str, columns: Columns, options: SourceOptions, is_one_split: bool = False):
        """is_one_split: whether the table was chosen as that of the split asked for; then its paths tell nothing."""
        super().__init__()
        options.allow(self.what, "image", "label", "label_separator", "group", "fields", "root", "split")
        self.root = options.root or os.path.dirname(table)
        column = image_column(columns, options.image)
        rows, self.paths = [], []
        seen: dict[str, int] = {}
        listed = ["" if value is None else str(value).strip() for value in columns.values[column]]
        for row in self._of_one_split(table, columns, listed, options, is_one_split):
            path = listed[row]
            reason = self._add(path, row, seen, columns)
            if reason:
                where = path or columns.place(row)
                self.passed_over.append(PassedOver(where, reason, reason != "listed twice"))
            else:
                rows.append(row)
        self._refuse_empty(table)
        self.notes.append(f"images from the paths of column {column!r}")
        apply_columns(self, columns.taken(rows), column, options)

    def read(self, number: int) -> tuple[bytes, str]:
        path = self.paths[number]
        return read_file(path), image_extension_of(path)

    def _of_one_split(
        self, table: str, columns: Columns, listed: list[str], options: SourceOptions, is_one_split: bool
    ) -> Sequence[int]:
        """The rows of the split that is asked for; all where the table names no several."""
        splits = column_of_splits(columns, options)
        if is_one_split and (options.whole or not are_several(splits)):
            return range(len(listed))
        splits = splits or self._splits_of_paths(listed, options.one_split)
        told = [path or columns.place(row) for row, path in enumerate(listed)]
        rows = of_one_split(table, told, splits, options, "row", self.notes)
        self._refuse_other_splits(table, listed, splits, rows)
        return rows

    def _refuse_other_splits(self, table: str, listed: list[str], splits: list[str], rows: Sequence[int]) -> None:
        """Raises UserError where an image of these rows is of another split too."""
        if len(rows) == len(listed):
            return
        taken = {self._resolved(listed[row]): splits[row] for row in rows if listed[row]}
        for path, split in zip(listed, splits, strict=True):
            own = taken.get(self._resolved(path)) if path and split else None
            if own and own != split:
                raise UserError(f"{path} is listed in {table} as {own} and as {split}; leave one of the two out.")

    def _splits_of_paths(self, listed: list[str], asked: str) -> list[str]:
        """As folders of one level tell, or all files, as they do of a folder of images."""
        names = [os.path.normpath(path.replace("\\", "/")) if path else "" for path in listed]
        if any(map(os.path.isabs, names)):
            base = os.path.abspath(self.root)
            names = [name.removeprefix(f"{base}/") for name in names]
        place = place_of_split([name for name in names if name], asked)
        return [""] * len(names) if place is None else splits_at(place, names)

    def _add(self, path: str, row: int, seen: dict, columns: Columns) -> str | None:
        """The reason why this row's image is left out, if it is."""
        if not path:
            return "no path"
        if _URL.match(path):
            return "a URL and not a file"
        found = self._resolved(path)
        if found in seen:
            return _twice(path, seen[found], row, columns)
        seen[found] = row
        try:
            status = os.stat(found)
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            if isinstance(error, OSError) and error.errno not in OF_THE_FILE:
                raise
            return "no such file"
        if not stat.S_ISREG(status.st_mode):
            return "not a regular file"
        size = status.st_size
        if not image_extension_of(found):
            return "no image by its name"
        if not 0 < size <= MAX_IMAGE_BYTES:
            return "image too large" if size else "empty image"
        self.names.append(path)
        self.paths.append(found)
        self.stamps.append(stamp_of(found))
        return None

    def _resolved(self, path: str) -> str:
        found = os.path.normpath(os.path.join(self.root, path))
        if "\\" in path and not os.path.exists(found):
            return os.path.normpath(os.path.join(self.root, path.replace("\\", "/")))
        return found

    def _refuse_empty(self, table: str) -> None:
        if not self.names and self.passed_over:
            where, reason, _ = self.passed_over[0]
            images = counted(len(self.passed_over), "image")
            raise UserError(
                f"None of the {images} of {table} can be had (the first: {where[:200]}, {reason}, looked for in "
                f"{self.root or '.'}); write --root with the folder that the paths are relative to, or --image with "
                f"another column."
            )


def read_table(path: str) -> Columns:
    """The columns of a .csv, .tsv or .jsonl file. Raises UserError where it is none."""
    with open(path, "rb") as file:
        content = file.read()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as CSV UTF-8 in the spreadsheet program."
        ) from None
    return _json_lines(path, text) if path.lower().endswith((".jsonl", ".ndjson")) else _csv(path, text)


def _csv(path: str, text: str) -> Columns:
    first, _, rest = text.partition("\n")
    told = re.fullmatch(r'"?sep=(.)"?\s*', first)
    if told:
        text = rest
    delimiter = told[1] if told else max(_DELIMITERS, key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows, lines = [], []
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append(row)
                lines.append(reader.line_num + bool(told))
    except csv.Error as error:
        raise UserError(f"{path} is no table (line {reader.line_num}: {error}); mend it.") from None
    if not rows:
        raise UserError(f"{path} is empty; write a table with a column of paths.")
    names = [cell.strip() for cell in rows[0]]
    header = not any(map(image_extension_of, names))
    if not header:  # an image where a name should be
        names = [str(number + 1) for number in range(len(names))]
    else:
        rows, lines = rows[1:], lines[1:]
    for row, line in zip(rows, lines, strict=True):
        if len(row) > len(names) and any(cell.strip() for cell in row[len(names) :]):
            raise UserError(
                f"Line {line} of {path} has {counted(len(row), 'cell')}, but the table has "
                f"{counted(len(names), 'column')}; quote cells that "
                f"hold a {delimiter!r}."
            )
    repeated = [name for name in names if name and names.count(name) > 1]
    if repeated:
        raise UserError(f"{path} has two columns {repeated[0]!r}; give them different names.")
    padded = [row + [""] * (len(names) - len(row)) for row in rows]
    values = {name: [row[n] for row in padded] for n, name in enumerate(names) if name}
    return Columns(path, values, [f"line {line}" for line in lines], header=header)


def _json_lines(path: str, text: str) -> Columns:
    rows, lines = [], []
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                row = json.loads(content)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise UserError(f"Line {line} of {path} is no JSON object; mend it.")
            rows.append(row)
            lines.append(f"line {line}")
    names = dict.fromkeys(name for row in rows for name in row)
    return Columns(path, {name: [row.get(name) for row in rows] for name in names}, lines)


def _twice(path: str, first: int, row: int, columns: Columns) -> str:
    if any(values[first] != values[row] for values in columns.values.values()):
        raise UserError(
            f"{path} is listed twice in {columns.path} with different values ({columns.place(first)} and "
            f"{columns.place(row)}); write one row an image, with several labels in a column each or joined by a "
            f"separator (--label-separator)."
        )
    return "listed twice"
