"""Files of features, opened again: one kind, with the keys of its samples.

Values of a `.npy` are mapped into memory, those of the other formats read into it.
"""

import csv
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prelude.data.errors import UserError, in_one_line
from prelude.evaluators.embedding.formats import (
    ABOUT_ENDING,
    KEY,
    KEYS_ENDING,
    LABEL,
    SAMPLE_ID,
    SHARD,
    beside,
    format_of,
)
from prelude.evaluators.embedding.table import UNKNOWN
from prelude.evaluators.embedding.writing import ABOUT, METADATA, SHARDS
from prelude.evaluators.features.snapshot import snapshot


@dataclass(frozen=True)
class Embedded:
    """N samples of D features of one kind, and where they come from."""

    name: str  # of the file or the encoder, for messages
    kind: str
    values: Tensor  # (N, D) float32 or float16
    keys: list[str]
    shards: list[str]
    shard: np.ndarray  # (N,) of each sample among `shards`
    sample_ids: np.ndarray  # (N,)
    labels: np.ndarray | None  # (N,) int64, `UNKNOWN` where there is none
    about: dict  # of encoder and data, see `evaluators.embedding.embed`

    def __len__(self) -> int:
        return len(self.keys)


def is_embedding(path: str | Path) -> bool:
    """Whether this is a file of features, and not one of weights."""
    path = Path(path)
    if not path.is_file() or path.suffix.lower() not in _READERS:
        return False
    if path.suffix.lower() != ".safetensors":
        return True
    try:
        with safe_open(path, framework="pt") as file:
            return METADATA in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def read(path: str | Path, kind: str | None = None) -> Embedded:
    """kind: of feature; None for the first. Raises UserError for a file that is none of ours, or is damaged."""
    path = Path(path)
    try:
        return _READERS[format_of(path)](path, kind)
    except _UNREADABLE as error:
        raise UserError(
            f"{path} is no file of features that can be read ({in_one_line(error, 90)}); write one that `prelude "
            "embed` has made."
        ) from None


# What the libraries raise on damaged or foreign bytes; pyarrow's own errors are ValueErrors and OSErrors.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, SafetensorError, zipfile.BadZipFile)


def _read_parquet(path: Path, kind: str | None) -> Embedded:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        about = json.loads((file.schema_arrow.metadata or {})[METADATA.encode()])
        kind = _kind_among(about, kind, path)
        names = file.schema_arrow.names
        small = file.read([name for name in (KEY, SHARD, SAMPLE_ID, LABEL) if name in names])
        field = file.schema_arrow.field(kind).type
        values = np.empty((file.metadata.num_rows, field.list_size), field.value_type.to_pandas_dtype())
        done = 0
        for batch in file.iter_batches(columns=[kind]):
            part = batch.column(0).flatten().to_numpy(zero_copy_only=False)
            values[done : done + len(batch)] = part.reshape(len(batch), -1)
            done += len(batch)
    shard = small.column(SHARD).combine_chunks().dictionary_encode()
    shard = shard.combine_chunks() if hasattr(shard, "combine_chunks") else shard
    labels = small.column(LABEL).fill_null(UNKNOWN).to_numpy() if LABEL in small.column_names else None
    return Embedded(
        path.name,
        kind,
        torch.from_numpy(values),
        small.column(KEY).to_pylist(),
        shard.dictionary.to_pylist(),
        shard.indices.to_numpy(),
        small.column(SAMPLE_ID).to_numpy(),
        labels,
        about,
    )


def _read_npz(path: Path, kind: str | None) -> Embedded:
    with np.load(path, allow_pickle=False) as arrays:
        about = json.loads(str(arrays[ABOUT]))
        kind = _kind_among(about, kind, path)
        labels = arrays[LABEL] if LABEL in arrays.files else None
        keys, shards = arrays[KEY].tolist(), arrays[SHARDS].tolist()
        values = torch.from_numpy(arrays[kind])
        return Embedded(path.name, kind, values, keys, shards, arrays[SHARD], arrays[SAMPLE_ID], labels, about)


def _read_npy(path: Path, kind: str | None) -> Embedded:
    about = json.loads(beside(path, ABOUT_ENDING).read_text())
    kind = _kind_among(about, kind, path)
    with open(beside(path, KEYS_ENDING), encoding="utf-8", newline="") as file:
        names, *rows = csv.reader(file)
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    shards = {shard: number for number, shard in enumerate(dict.fromkeys(columns[SHARD]))}
    values = np.load(path, mmap_mode="c", allow_pickle=False)
    if values.flags.c_contiguous:
        values = snapshot(path, values.dtype, values.shape, offset=values.offset)
    if len(values) != len(rows):
        raise ValueError(f"{len(values)} rows beside {len(rows)} keys")
    return Embedded(
        path.name,
        kind,
        torch.from_numpy(values),
        list(columns[KEY]),
        list(shards),
        np.array([shards[shard] for shard in columns[SHARD]]),
        np.array(columns[SAMPLE_ID]).astype(np.int64),
        np.array(columns[LABEL]).astype(np.int64) if LABEL in columns else None,
        about,
    )


def _read_safetensors(path: Path, kind: str | None) -> Embedded:
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {})[METADATA])
        kind = _kind_among(about, kind, path)
        labels = file.get_tensor(LABEL).clone().numpy() if LABEL in file.keys() else None
        keys, shards = (_texts(file.get_tensor(name)) for name in (KEY, SHARDS))
        numbers = (file.get_tensor(name).clone().numpy() for name in (SHARD, SAMPLE_ID))
        values = file.get_tensor(kind).clone()  # it may be a map of the file, which others can cut
        return Embedded(path.name, kind, values, keys, shards, *numbers, labels, about)


def _texts(ended: Tensor) -> list[str]:
    return ended.numpy().tobytes().decode("utf-8", "backslashreplace").split("\0")[:-1]


def _kind_among(about: dict, kind: str | None, path: Path) -> str:
    kinds = about["kinds"]
    if kind is not None and kind not in kinds:
        raise UserError(f"{path} has no {kind} features; write --kind {' or '.join(kinds)}.")
    return kind or kinds[0]


_READERS: dict[str, Callable[[Path, str | None], Embedded]] = {
    ".parquet": _read_parquet,
    ".npz": _read_npz,
    ".npy": _read_npy,
    ".safetensors": _read_safetensors,
}
