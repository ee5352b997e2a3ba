"""Files of features, written column by column or in groups of rows, whatever their size.

- Parquet: features as lists of fixed size, shards by name, a label that is not known as null.
- `.npz`: arrays by the names of the columns, none of them pickled; `shards` has the paths that `shard` counts.
- `.safetensors`: the same; texts are UTF-8 bytes, each ended by a zero.
- `.npy`: one kind of feature; the other columns in `NAME.keys.csv`.

What is known of encoder and data goes along as JSON: `prelude` in the metadata of Parquet and safetensors, `about` in a
`.npz`, `NAME.about.json` beside a `.npy`.
"""

import csv
import io
import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from prelude.data.whole_files import whole, write_whole
from prelude.evaluators.embedding.formats import ABOUT_ENDING, KEY, KEYS_ENDING, LABEL, SAMPLE_ID, SHARD, beside
from prelude.evaluators.embedding.table import UNKNOWN, Column, Table

METADATA, SHARDS, ABOUT = "prelude", "shards", "about"
_LETTERS = {"<f4": "F32", "<f2": "F16", "<i8": "I64", "<i4": "I32"}  # of safetensors


def write(table: Table, to: Path) -> None:
    """Raises OSError where the disk does not take it, and UserError for values that the dtype does not hold; nothing
    is then in the place of `to`."""
    if to.suffix.lower() == ".npy":
        with whole(beside(to, KEYS_ENDING)) as file:
            _write_csv(table, file)
        write_whole(beside(to, ABOUT_ENDING), json.dumps(table.about, indent=1) + "\n")
    with whole(to) as file:
        _WRITERS[to.suffix.lower()](table, file)


def _write_parquet(table: Table, file: BinaryIO) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = table.kinds
    narrow = pa.from_numpy_dtype(np.dtype(table.dtype))
    types = {KEY: pa.string(), SHARD: pa.dictionary(pa.int32(), pa.string()), SAMPLE_ID: pa.int64(), LABEL: pa.int64()}
    types |= {kind: pa.list_(narrow, width) for kind, width in kinds.items()}
    columns, names = table.columns, pa.array(table.shards)
    schema = pa.schema([(column.name, types[column.name]) for column in columns], {METADATA: json.dumps(table.about)})

    def array(column: Column, part) -> pa.Array:
        if column.width:
            return pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), column.width)
        if column.name == SHARD:
            return pa.DictionaryArray.from_arrays(part, names)
        unknown = part == UNKNOWN if column.name == LABEL else None
        return pa.array(part, types[column.name], mask=unknown)

    # Features neither repeat nor shrink: looking for either only costs time.
    squeeze = {column.name: "zstd" for column in columns if not column.width}
    squeeze |= {f"{kind}.list.element": "none" for kind in kinds}
    with pq.ParquetWriter(file, schema, compression=squeeze, use_dictionary=[SHARD]) as writer:
        for parts in zip(*(column.parts() for column in columns), strict=True):
            arrays = [array(column, part) for column, part in zip(columns, parts, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def _write_npz(table: Table, file: BinaryIO) -> None:
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        about = np.array(json.dumps(table.about))
        for name, array in ((ABOUT, about), (SHARDS, np.array(table.shards))):
            _add(archive, name, array.dtype, array.shape, [array])
        for column in table.columns:
            dtype = column.dtype or np.dtype(f"<U{max([1, *map(len, _texts(column))])}")
            parts = (np.asarray(part, dtype) for part in column.parts())
            _add(archive, column.name, dtype, _shape(table, column), parts)


def _add(archive: zipfile.ZipFile, name: str, dtype: np.dtype, shape: tuple[int, ...], parts) -> None:
    info = zipfile.ZipInfo(f"{name}.npy")
    info.compress_type = zipfile.ZIP_DEFLATED if dtype.kind == "U" else zipfile.ZIP_STORED
    with archive.open(info, "w", force_zip64=True) as member:
        _begin_npy(member, dtype, shape)
        for part in parts:
            member.write(np.ascontiguousarray(part, dtype).tobytes())


def _write_npy(table: Table, file: BinaryIO) -> None:
    (column,) = (column for column in table.columns if column.width)
    _begin_npy(file, column.dtype, _shape(table, column))
    for part in column.parts():
        file.write(np.ascontiguousarray(part, column.dtype).data)


def _begin_npy(file, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _write_safetensors(table: Table, file: BinaryIO) -> None:
    """https://huggingface.co/docs/safetensors: length of the header, header, and the bytes of all tensors."""
    shards = [f"{shard}\0".encode(errors="backslashreplace") for shard in table.shards]
    columns = sorted(table.columns, key=lambda column: -(column.dtype.itemsize if column.dtype else 1))  # aligned
    header, end = {"__metadata__": {METADATA: json.dumps(table.about)}}, 0
    for column in columns:
        shape = _shape(table, column) if column.dtype else (sum(len(text.encode()) + 1 for text in _texts(column)),)
        size = int(np.prod(shape)) * (column.dtype.itemsize if column.dtype else 1)
        letters = _LETTERS[column.dtype.str] if column.dtype else "U8"
        header[column.name] = {"dtype": letters, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    size = sum(map(len, shards))
    header[SHARDS] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(struct.pack("<Q", len(encoded)) + encoded)
    for column in columns:
        for part in column.parts():
            texts = None if column.dtype else "".join(f"{text}\0" for text in part)
            file.write(np.ascontiguousarray(part, column.dtype).data if texts is None else texts.encode())
    file.write(b"".join(shards))


def _write_csv(table: Table, file: BinaryIO) -> None:
    text = io.TextIOWrapper(file, "utf-8", errors="backslashreplace", newline="")
    columns = [column for column in table.columns if not column.width]
    rows = csv.writer(text)
    rows.writerow([column.name for column in columns])
    shard = [column.name for column in columns].index(SHARD)
    for parts in zip(*(column.parts() for column in columns), strict=True):
        lists = [part if isinstance(part, list) else part.tolist() for part in parts]
        lists[shard] = [table.shards[number] for number in lists[shard]]
        rows.writerows(zip(*lists, strict=True))
    text.flush()
    text.detach()


def _shape(table: Table, column: Column) -> tuple[int, ...]:
    return (table.num_rows, column.width) if column.width else (table.num_rows,)


def _texts(column: Column) -> Iterator[str]:
    return (text for part in column.parts() for text in part) if column.dtype is None else iter(())


_WRITERS = {
    ".parquet": _write_parquet,
    ".npz": _write_npz,
    ".npy": _write_npy,
    ".safetensors": _write_safetensors,
}
