"""Features written to a file for other tools: a row an image, with its key, its shard and its label.

| ending | what it holds |
|---|---|
| `.parquet` | columns `key`, `shard`, `sample_id`, `label`, a fixed-size list for each kind; `prelude` in its metadata |
| `.npz` | arrays of the same names, (N,) or (N, D); `about` is text; nothing is pickled |
| `.safetensors` | tensors `sample_id`, `label` and a kind each; `key` and `shard` are JSON lists in UTF-8 bytes |

- Rows are in the order of the shards. `label` is there where any image has one; an image without has null in Parquet,
  else -1.
- What is written is read from the bank in pieces: a file larger than the memory is no matter.
- The file is there whole or not at all.
"""

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from prelude.data.decode import BadImage, decode
from prelude.data.errors import UserError
from prelude.data.shards import ShardIndex
from prelude.data.source import OpenFiles
from prelude.evaluators.features.bank import Bank, Rows
from prelude.evaluators.features.labels import class_numbers
from prelude.pretrain.files import made_whole, reason, write_whole

FORMAT = 1
PART = 2**16  # images of an entry in the bank: no more is computed again after a kill
GROUP = 2**12  # rows that are written at once, and of a row group in Parquet
ENDINGS = (".parquet", ".npz", ".safetensors")
ABOUT, KEY, SHARD, SAMPLE_ID, LABEL = "about", "key", "shard", "sample_id", "label"
_OURS = {ABOUT, KEY, SHARD, SAMPLE_ID, LABEL, "prelude"}


@dataclass(frozen=True)
class LeftOut:
    """An image without features."""

    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class Embedding:
    """The features of n images, by kind, in pieces that are mapped from a bank."""

    parts: dict[str, list[Tensor]]  # (n_p, D) float32, n in all
    sample_ids: np.ndarray  # (n,) int64, growing
    keys: list[str]
    shards: list[str]  # of each image, a path
    labels: np.ndarray | None  # (n,) int64, -1 where there is none; None where no image has one
    about: dict  # what a reader needs to know

    def __len__(self) -> int:
        return len(self.sample_ids)

    def width(self, kind: str) -> int:
        return self.parts[kind][0].shape[1]

    def pieces(self, kind: str, dtype: str) -> Iterator[np.ndarray]:
        """(at most GROUP, D) rows, in order."""
        for part in self.parts[kind]:
            for rows in part.split(GROUP):
                with np.errstate(over="ignore"):  # refused beforehand
                    yield rows.numpy().astype(dtype)


@dataclass(frozen=True)
class ReadEmbedding:
    """One kind of feature, read from a file."""

    kind: str
    values: Tensor  # (n, D) float32
    sample_ids: np.ndarray  # (n,) int64
    keys: list[str]
    shards: list[str]
    labels: np.ndarray | None
    about: dict


def embedded(
    bank: Bank, encoder, index: ShardIndex, kinds: Sequence[str] | None, **reading
) -> tuple[dict[str, list[Rows]], np.ndarray]:
    """The rows of each part by kind, and the sample ids (n,) of all; by all ranks together.

    reading: as `Bank.rows` takes it. Small sets are the entry that evaluations have too. Raises UserError as it does.
    """
    found: dict[str, list[Rows]] = {}
    sample_ids, empty = [], None
    for start in range(0, index.num_samples, PART):
        part = index
        if index.num_samples > PART:
            part = index.subset(np.arange(start, min(start + PART, index.num_samples)))
        try:
            rows = bank.rows(encoder, part, kinds, **reading)
        except UserError as error:
            if part is index or "readable sample" not in str(error):
                raise
            empty = error  # this part is damaged from end to end, others may not be
            continue
        for kind, of_kind in rows.items():
            found.setdefault(kind, []).append(of_kind)
        sample_ids.append(next(iter(rows.values())).sample_ids.numpy() + start)
    if not found:
        raise empty
    return found, np.concatenate(sample_ids)


def embedding_of(
    rows: dict[str, list[Rows]], sample_ids: np.ndarray, encoder, index: ShardIndex, source: str
) -> tuple[Embedding, list[LeftOut]]:
    """What is written, and which images are not in it. Raises UserError for labels that are no class numbers."""
    keys = index.keys()
    labels = None
    if len(index.labels) and (index.labels[:, 0] >= 0).any():
        read = class_numbers(index)
        labels = torch.where(read.known, read.values, -1).numpy()[sample_ids]
    about = {
        "format": FORMAT,
        "source": source,
        "name": encoder.name,
        "encoder": encoder.fingerprint,
        "data": index.fingerprint,
        "shards": list(map(str, index.paths)),
        "range": index.value_range,
        "recipe": next(iter(rows.values()))[0].recipe,
        "kinds": list(rows),
    }
    parts = {kind: [part.values for part in of_kind] for kind, of_kind in rows.items()}
    numbers = np.searchsorted(index.ends, sample_ids, side="right")
    shards = [str(index.paths[n]) for n in numbers.tolist()]
    made = Embedding(parts, sample_ids, [keys[i] for i in sample_ids.tolist()], shards, labels, about)
    return made, left_out(index, sample_ids, keys)


def left_out(index: ShardIndex, sample_ids: np.ndarray, keys: list[str]) -> list[LeftOut]:
    """Images of the index that have no row, each read once more to say why, and what the index itself left out."""
    found, files = [], OpenFiles(index.paths)
    for sample in np.setdiff1d(np.arange(index.num_samples), sample_ids).tolist():
        try:
            shard = int(np.searchsorted(index.ends, sample, side="right"))
            decode(files.read(shard, *index.images[sample].tolist()), value_range=index.value_range)
            why = "it could not be read when its features were computed"
        except BadImage as error:
            why = str(error)
        found.append(LeftOut(str(index.shard_of(sample)), keys[sample], why))
    for shard, problems in index.problems.items():
        found += [LeftOut(str(shard), problem.where, problem.reason) for problem in problems]
    return found


def write_left_out(missing: list[LeftOut], path: Path) -> None:
    """A JSON object a line. Raises UserError where the disk refuses."""
    text = "".join(json.dumps(vars(one)) + "\n" for one in missing)
    _written(path, lambda: write_whole(path, text))


def check_file(path: Path) -> None:
    """Raises UserError, before any work, for an ending that is unknown and for a place that cannot be written."""
    if path.suffix not in ENDINGS:
        raise UserError(f"--to {path} has no ending that says what to write; end it with {', '.join(ENDINGS)}.")
    if path.suffix == ".parquet":
        _parquet()
    if path.is_dir():
        raise UserError(f"--to {path} is a folder; write the name of a file in it.")
    draft = path.with_name(f".tmp-{path.name}")
    _written(path, lambda: (draft.write_bytes(b""), draft.unlink()))


def write_embedding(embedding: Embedding, path: Path, dtype: str = "float32") -> None:
    """dtype: float32 or float16. Raises UserError where the disk refuses and where values do not fit into float16."""
    if taken := _OURS & set(embedding.parts):
        raise UserError(f"A kind of feature cannot be called {', '.join(taken)} in a file; write another --kind.")
    if dtype == "float16":
        _refuse_overflow(embedding)
    write = {".parquet": _write_parquet, ".npz": _write_npz, ".safetensors": _write_safetensors}[path.suffix]
    _written(path, lambda: made_whole(path, lambda file: write(embedding, file, dtype)))


def read_embedding(path: Path, kind: str | None = None) -> ReadEmbedding:
    """kind: None for the first. Raises UserError for a file that `write_embedding` has not written."""
    if not path.is_file():
        raise UserError(f"{path} is not there; write a file that prelude embed has made.")
    reader = {".parquet": _read_parquet, ".npz": _read_npz, ".safetensors": _read_safetensors}.get(path.suffix)
    if reader is None:
        raise UserError(f"{path} ends in none of {', '.join(ENDINGS)}; write a file that prelude embed has made.")
    try:
        about, get = reader(path)
        if kind is not None and kind not in about["kinds"]:
            raise UserError(f"{path} has no features of kind {kind}; write --kind with {', '.join(about['kinds'])}.")
        kind = kind or about["kinds"][0]
        values, ids = torch.from_numpy(get(kind).astype(np.float32)), get(SAMPLE_ID)
        return ReadEmbedding(kind, values, ids, list(get(KEY)), list(get(SHARD)), get(LABEL), about)
    except UserError:
        raise
    # What the readers of the three formats have been seen to raise for other files and for damaged ones.
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is no file of prelude embed, or a damaged one ({type(error).__name__}: {str(error)[:100]}); "
            f"make it again."
        ) from None


def _written(path: Path, write: Callable[[], object]) -> None:
    try:
        write()
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({reason(error)}); write a file in a folder that is there and has room."
        ) from None


def _refuse_overflow(embedding: Embedding) -> None:
    most = np.finfo(np.float16).max
    for kind in embedding.parts:
        largest = max(float(np.abs(rows).max()) for rows in embedding.pieces(kind, "float32"))
        if largest > float(most):
            raise UserError(
                f"Features {kind} reach {largest:.3g}, and float16 ends at {most:g}; write --dtype float32."
            )


# ---- Parquet


def _parquet():
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("Parquet needs pyarrow; pip install pyarrow, or end --to with .npz or .safetensors.") from None
    return pyarrow


def _write_parquet(embedding: Embedding, file: BinaryIO, dtype: str) -> None:
    pa = _parquet()
    number = {"float32": pa.float32(), "float16": pa.float16()}[dtype]
    names = pa.dictionary(pa.int32(), pa.string())
    fields = [pa.field(KEY, pa.string()), pa.field(SHARD, names), pa.field(SAMPLE_ID, pa.int64())]
    fields += [pa.field(LABEL, pa.int64())] if embedding.labels is not None else []
    fields += [pa.field(kind, pa.list_(number, embedding.width(kind))) for kind in embedding.parts]
    schema = pa.schema(fields, metadata={"prelude": json.dumps(embedding.about)})
    with pa.parquet.ParquetWriter(file, schema) as writer:
        start = 0
        for pieces in zip(*(embedding.pieces(kind, dtype) for kind in embedding.parts), strict=True):
            rows = slice(start, start + len(pieces[0]))
            columns = [_text(pa, embedding.keys[rows]), _text(pa, embedding.shards[rows]).dictionary_encode()]
            columns += [pa.array(embedding.sample_ids[rows])]
            if embedding.labels is not None:
                columns += [pa.array(embedding.labels[rows], mask=embedding.labels[rows] < 0)]
            columns += [pa.FixedSizeListArray.from_arrays(pa.array(piece.ravel()), piece.shape[1]) for piece in pieces]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=GROUP)
            start = rows.stop


def _text(pa, names: list[str]):
    return pa.array([_utf8(name) for name in names], pa.string())


def _utf8(name: str) -> str:
    """Names of files need not be text; what is none is written as an escape."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _read_parquet(path: Path):
    file = _parquet().parquet.ParquetFile(path)
    about = json.loads(file.schema_arrow.metadata[b"prelude"])

    def get(name: str):
        if name not in file.schema_arrow.names:
            return None
        column = file.read([name]).column(0)
        if name in (KEY, SHARD):
            return column.to_pylist()
        if name in about["kinds"]:
            whole = column.combine_chunks()
            return whole.flatten().to_numpy(zero_copy_only=False).reshape(len(whole), -1)
        return column.fill_null(-1).to_numpy()

    return about, get


# ---- NumPy


def _write_npz(embedding: Embedding, file: BinaryIO, dtype: str) -> None:
    columns = {
        ABOUT: np.array(json.dumps(embedding.about)),
        KEY: np.array([_utf8(key) for key in embedding.keys]),
        SHARD: np.array([_utf8(shard) for shard in embedding.shards]),
        SAMPLE_ID: embedding.sample_ids,
    }
    if embedding.labels is not None:
        columns[LABEL] = embedding.labels
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, column in columns.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, column, allow_pickle=False)
        for kind in embedding.parts:
            shape = len(embedding), embedding.width(kind)
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
            with archive.open(f"{kind}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for rows in embedding.pieces(kind, dtype):
                    member.write(rows.data)


def _read_npz(path: Path):
    arrays = np.load(path, allow_pickle=False)

    def get(name: str):
        found = arrays[name] if name in arrays.files else None
        return found.tolist() if name in (KEY, SHARD) else found

    return json.loads(str(arrays[ABOUT])), get


# ---- safetensors


def _write_safetensors(embedding: Embedding, file: BinaryIO, dtype: str) -> None:
    """By hand, after the format's description: safetensors' own writers want all tensors in memory.

    https://github.com/huggingface/safetensors: 8 bytes with the length of a JSON header, the header, the tensors.
    """
    small = {SAMPLE_ID: embedding.sample_ids}
    if embedding.labels is not None:
        small[LABEL] = embedding.labels
    for name, texts in ((KEY, embedding.keys), (SHARD, embedding.shards)):
        small[name] = np.frombuffer(json.dumps([_utf8(text) for text in texts], ensure_ascii=False).encode(), np.uint8)
    names = {"float32": "F32", "float16": "F16", "int64": "I64", "uint8": "U8"}
    header, end = {"__metadata__": {"prelude": json.dumps(embedding.about)}}, 0
    shapes = {kind: (dtype, (len(embedding), embedding.width(kind))) for kind in embedding.parts}
    shapes |= {name: (column.dtype.name, column.shape) for name, column in small.items()}
    for name, (kind, shape) in shapes.items():
        start, end = end, end + int(np.prod(shape)) * np.dtype(kind).itemsize
        header[name] = {"dtype": names[kind], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for kind in embedding.parts:
        for rows in embedding.pieces(kind, dtype):
            file.write(rows.data)
    for column in small.values():
        file.write(np.ascontiguousarray(column).data)


def _read_safetensors(path: Path):
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, "numpy")
        about = json.loads(file.metadata()["prelude"])
    except SafetensorError as error:
        raise ValueError(str(error)) from None

    def get(name: str):
        found = file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118  no mapping
        return json.loads(found.tobytes()) if name in (KEY, SHARD) else found

    return about, get
