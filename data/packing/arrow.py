"""Parquet files and Hugging Face datasets on disk: image bytes, or paths, in columns.

- Only the columns that labels, groups and fields need are read as a whole; images are read in blocks, by row group or
  record batch.
- Class names of Hugging Face's `ClassLabel` are taken from the schema.
"""

import bisect
import functools
import glob
import itertools
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from prelude.data.errors import UserError, in_one_line
from prelude.data.packing.blocks import CACHE_BYTES, BlockCache
from prelude.data.packing.columns import Columns, apply_columns, column_of_splits
from prelude.data.packing.extras import needed
from prelude.data.packing.images import extension_of
from prelude.data.packing.source import ALL, LeftOut, Source, SourceOptions, damaged, short_names, stamp_of
from prelude.data.packing.splits import are_several, of_one_split, one_split, splits_of
from prelude.data.packing.table import TableSource
from prelude.data.packing.within import files_within


def open_arrow(path: str, options: SourceOptions) -> Source:
    """A source of Parquet or Arrow files: their image bytes where a column has some, else the paths in them."""
    needed("pyarrow", "parquet", path)
    files, told = _files(path, options)
    tables = [_ArrowFile(file) if file.endswith(".arrow") else _ParquetFile(file) for file in files]
    schema = tables[0].schema
    for table in tables:
        if table.schema.names != schema.names:
            raise UserError(f"{table.path} has other columns than {tables[0].path}; pack them one by one.")
    names = [options.image] if options.image in schema.names else schema.names  # of what may be the image
    held = {name: _holding(name, tables) for name in names}
    with_bytes = [name for name in names if held[name]]
    if len(with_bytes) > 1:  # one that some file leaves empty is not the image where another is everywhere
        with_bytes = [name for name in with_bytes if len(held[name]) == len(tables)] or with_bytes
    if len(with_bytes) > 1:
        raise UserError(f"{path} has images in the columns {', '.join(with_bytes)}; write --image COLUMN.")
    columns = Columns(path, _Lazy(tables, schema.names, with_bytes), (), _class_names(tables))
    if not with_bytes:
        table = os.path.join(path, "") if os.path.isdir(path) else path  # whose folder the paths are relative to
        return TableSource(table, columns, options, is_one_split=told)
    return ArrowSource(path, tables, columns, with_bytes[0], options, is_one_split=told)


class ArrowSource(Source):
    what = "a table of images"

    def __init__(
        self, path: str, tables: list, columns: Columns, image: str, options: SourceOptions, is_one_split: bool
    ):
        """is_one_split: whether the tables were chosen as those of the split asked for."""
        super().__init__()
        options.allow(self.what, "image", "label", "label_separator", "group", "fields", "split")
        if options.image:
            columns.check(options.image, "image")
        self.tables, self.image = tables, image
        self.starts = [0]
        blocks, names = [], []
        for table, short in zip(tables, short_names([table.path for table in tables]), strict=True):
            blocks += [self.starts[-1] + start for start in table.starts[:-1]]
            self.starts.append(self.starts[-1] + table.num_rows)
            names += [f"{short}/{row:08d}" for row in range(table.num_rows)]
        splits = column_of_splits(columns, options)
        if is_one_split and (options.whole or not are_several(splits)):
            self.rows = range(len(names))
        else:
            self.rows = of_one_split(path, names, splits or [""] * len(names), options, "row", self.notes)
        self.names = [names[row] for row in self.rows]
        if sum(table.image_bytes(image) for table in tables) > CACHE_BYTES:
            self.blocks = _first_of_each(blocks, self.rows)
        self.stamps = [stamp_of(table.path) for table in tables]
        self.notes.append(f"images from column {image!r}")
        apply_columns(self, replace(columns, values=columns.values.taken(self.rows)), image, options)

    def read(self, number: int) -> tuple[bytes, str]:
        row = self.rows[number]
        which = bisect.bisect_right(self.starts, row) - 1
        try:
            value = self.tables[which].value(self.image, row - self.starts[which])
        except (ValueError, OSError) as error:  # what pyarrow raises on damaged bytes
            raise damaged(self.tables[which].path, error, "damaged row group") from error
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path"):
                raise LeftOut("a path and no image bytes")
            value = value.get("bytes")
        if not value:
            raise LeftOut("empty image")
        return value, extension_of(value)


def _first_of_each(blocks: list[int], rows: Sequence[int]) -> list[int]:
    """The numbers of the first of these rows, which are in order, in each block that has one."""
    firsts = sorted({bisect.bisect_left(rows, start) for start in blocks})
    return [number for number in firsts if number < len(rows)]


class _ParquetFile:
    """Rows of a Parquet file, read by row groups."""

    def __init__(self, path: str):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        try:
            with pq.ParquetFile(path) as file:
                self.schema = file.schema_arrow
                groups = [file.metadata.row_group(n) for n in range(file.num_row_groups)]
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path} is no Parquet file ({in_one_line(error, 80)}); mend it.") from None
        self.starts = [0, *itertools.accumulate(group.num_rows for group in groups)]
        self.num_rows = self.starts[-1]
        self._sizes: Counter[str] = Counter()
        for group in groups:
            for chunk in map(group.column, range(group.num_columns)):
                self._sizes[chunk.path_in_schema.partition(".")[0]] += chunk.total_uncompressed_size
        self._cache = BlockCache()

    def image_bytes(self, name: str) -> int:
        return self._sizes[name]

    def column(self, name: str) -> list:
        import pyarrow.parquet as pq

        return pq.read_table(self.path, columns=[name], use_threads=False, partitioning=None).column(0).to_pylist()

    def value(self, name: str, row: int):
        group = bisect.bisect_right(self.starts, row) - 1
        rows = self._cache.get((name, group), lambda: self._read_group(name, group))
        return rows[row - self.starts[group]].as_py()

    def _read_group(self, name: str, group: int):
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.path) as file:
            rows = file.read_row_group(group, columns=[name], use_threads=False).column(0)
        return rows, rows.nbytes


class _ArrowFile:
    """Rows of an Arrow stream or file, as Hugging Face datasets keeps them, mapped into memory."""

    def __init__(self, path: str):
        self.path = path
        table = self._table
        self.schema, self.num_rows, self.starts = table.schema, table.num_rows, [0, table.num_rows]

    def image_bytes(self, name: str) -> int:
        return 0  # mapped: any row is at hand

    def column(self, name: str) -> list:
        return self._table.column(name).to_pylist()

    def value(self, name: str, row: int):
        return self._table.column(name)[row].as_py()

    @functools.cached_property
    def _table(self):
        import pyarrow as pa

        try:
            mapped = pa.memory_map(self.path)
            try:
                return pa.ipc.open_stream(mapped).read_all()
            except pa.ArrowInvalid:
                return pa.ipc.open_file(mapped).read_all()
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{self.path} is no Arrow file ({in_one_line(error, 80)}); mend it.") from None

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_table"}


def _files(path: str, options: SourceOptions) -> tuple[list[str], bool]:
    """(the files of a pattern, a folder, or a saved dataset, of one split where they are of several; whether they are
    of the split that was asked for)."""
    if os.path.isfile(os.path.join(path, "dataset_dict.json")):
        with open(os.path.join(path, "dataset_dict.json")) as file:
            splits = json.load(file)["splits"]
        # A split that was made of another one is saved under the name of that one.
        return _files(os.path.join(path, one_split(path, splits, options.split)), replace(options, split=""))[0], True
    if os.path.isfile(os.path.join(path, "state.json")):
        with open(os.path.join(path, "state.json")) as file:
            state = json.load(file)
        if told := bool(options.split and state.get("_split")):
            one_split(path, [state["_split"]], options.split)
        return [os.path.join(path, part["filename"]) for part in state["_data_files"]], told
    if os.path.isdir(path):
        found = files_within(path, ".parquet") or files_within(path, ".arrow")
    else:
        found = [path] if os.path.exists(path) else glob.glob(path)
    if not found:
        raise UserError(f"No file matches {path!r}; correct the name of the source.")
    found.sort()
    splits = splits_of(path, found)
    several = len(set(splits_of(path, found, within=False))) > 1 or are_several(splits)
    if options.split == ALL or not (options.split or several) or (options.whole and not options.split):
        return found, False
    if not several:  # then a column of several may tell more
        return found, options.split in splits
    split = one_split(path, splits, options.split)
    return [file for file, told in zip(found, splits, strict=True) if told == split], True


def _holds_bytes(kind) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        names = [kind.field(n).name for n in range(kind.num_fields)]
        return "bytes" in names
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holding(name: str, tables: list) -> list:
    """Those in which a column holds bytes. Raises UserError where it holds something else in another; a file that knows
    no type, because all is null, holds neither."""
    import pyarrow as pa

    typed = [table for table in tables if not pa.types.is_null(table.schema.field(name).type)]
    found = [table for table in typed if _holds_bytes(table.schema.field(name).type)]
    if found and len(found) < len(typed):
        other = next(table for table in typed if table not in found)
        raise UserError(
            f"Column {name!r} holds image bytes in one of {found[0].path} and {other.path} only; pack them one by one."
        )
    return found


def _class_names(tables: list) -> dict[str, list[str]]:
    """Of columns of class numbers, which must mean the same in every file; one that names fewer has those of others."""
    found: dict[str, tuple[list[str], str]] = {}
    for table in tables:
        for name, names in _told_names(table.schema).items():
            known, path = found.get(name, ([], ""))
            for number, (one, other) in enumerate(zip(known, names, strict=False)):
                if one != other:
                    raise UserError(
                        f"Class {number} of column {name!r} is {one!r} in {path} and {other!r} in {table.path}; pack "
                        f"them one by one, or number the classes alike."
                    )
            if len(names) > len(known):
                found[name] = names, table.path
    return {name: names for name, (names, _) in found.items()}


def _told_names(schema) -> dict[str, list[str]]:
    told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    found = {}
    for name, feature in told.items():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel" and inner.get("names"):
            found[name] = inner["names"]
    return found


class _Lazy(dict):
    """Columns by name, read when they are first asked for; those of images are known by name alone. rows: of all of
    them, those that are meant; None: all."""

    def __init__(self, tables: list, names: list[str], images: list[str], rows: Sequence[int] | None = None):
        super().__init__(dict.fromkeys([*images, *(name for name in names if name not in images)]))
        self.tables, self.rows = tables, rows

    def __getitem__(self, name: str) -> list:
        if super().__getitem__(name) is None:
            column = [value for table in self.tables for value in table.column(name)]
            self[name] = column if self.rows is None else [column[row] for row in self.rows]
        return super().__getitem__(name)

    def taken(self, rows: Sequence[int]) -> "_Lazy":
        return _Lazy(self.tables, list(self), [], rows)

    def items(self):
        return [(name, self[name]) for name in self]

    def values(self):
        return [self[name] for name in self]
