"""Where the samples of shards lie, in one file beside them: NAME.index.npz for NAME-000000.tar and all the others.

- With it, shards behind a URL need not be fetched to be indexed. `prelude shards pack` writes it.
- It has every label, so that it serves whatever is asked of the shards, and the SHA-256 of each shard.
- Places are kept as distances from where a tar would have them, so that there is little to compress: some 3 bytes a
  sample. Version 1 had the places themselves.
- A shard whose size is another one now is not taken from it. Nothing in it is believed that cannot be.
"""

import functools
import hashlib
import io
import json
import re
import zipfile
import zlib
from dataclasses import dataclass

import numpy as np

from prelude.data.tar_index import Problem, TarIndex

VERSION = 2
_BLOCK = 512  # of a tar
_NUMBER = re.compile(r"[-_.]?\d+(-of-\d+)?$")


@dataclass(frozen=True)
class Entry:
    """One shard. indexes: by extension of the label, "" for none."""

    size: int
    sha256: str
    indexes: dict[str, TarIndex]

    def index(self, label: str) -> TarIndex:
        """Without places where no sample has the label."""
        if label in self.indexes:
            return self.indexes[label]
        plain = self.indexes[""]
        nowhere = np.full((len(plain.images), 2), -1, np.int64)
        return TarIndex(plain.images, nowhere, plain.problems, plain.ended, plain.content, no_labels(len(nowhere)))


def name_for(shard: str) -> str:
    """The index file's name, from that of a shard: `train-000001.tar` and `train-00001-of-00100.tar` have one."""
    return f"{_NUMBER.sub('', shard.removesuffix('.tar')) or 'shards'}.index.npz"


def write(entries: dict[str, Entry]) -> bytes:
    """entries: by the name of the shard. The same bytes for the same entries."""
    extensions = sorted({ext for entry in entries.values() for ext in entry.indexes if ext})
    shards = [
        {
            "name": name,
            "size": entry.size,
            "sha256": entry.sha256,
            "count": len(entry.indexes[""].images),
            "problems": entry.indexes[""].problems,
            "ended": entry.indexes[""].ended,
            "content": entry.indexes[""].content,
            "labels": {ext: entry.indexes[ext].label_content for ext in sorted(entry.indexes)},
        }
        for name, entry in entries.items()
    ]
    about = json.dumps({"version": VERSION, "extensions": extensions, "shards": shards}).encode()
    images = np.concatenate([entry.indexes[""].images for entry in entries.values()])
    tables = {"images": images - _expected(images)}
    for number, ext in enumerate(extensions):
        labels = np.concatenate([entry.index(ext).labels for entry in entries.values()])
        tables[f"labels{number}"] = np.where(labels[:, 1:] < 0, (0, -1), labels - _behind(images))
    arrays = {f"{name}.{column}": _narrow(table[:, column]) for name, table in tables.items() for column in (0, 1)}
    file = io.BytesIO()
    np.savez_compressed(file, about=np.frombuffer(about, np.uint8), **arrays)
    return file.getvalue()


def read(content: bytes) -> dict[str, Entry]:
    """Entries by the name of the shard. Raises ValueError for what is no such file, or cannot be true."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            if about["version"] not in (1, VERSION):
                raise ValueError(f"version {about['version']}, and this one reads {VERSION}")
            table = functools.partial(_places if about["version"] == 1 else _distances, arrays)
            images = table("images")
            labels = {ext: table(f"labels{n}") for n, ext in enumerate(about["extensions"])}
        if about["version"] != 1:
            rounded = _rounded(images[:, 1])
            images[:, 0] = np.cumsum(images[:, 0] + rounded) - rounded
            behind = _behind(images)
            labels = {ext: np.where(found[:, 1:] < 0, -1, found + behind) for ext, found in labels.items()}
        return _entries(about["shards"], images, labels)
    except (KeyError, TypeError, AttributeError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _entries(shards: list[dict], images: np.ndarray, labels: dict[str, np.ndarray]) -> dict[str, Entry]:
    entries, begin = {}, 0
    if sum(shard["count"] for shard in shards) != len(images) or any(len(t) != len(images) for t in labels.values()):
        raise ValueError("its counts are not those of its tables")
    for shard in shards:
        part = slice(begin, begin + shard["count"])
        begin += shard["count"]
        for table in (images, *labels.values()):
            if shard["count"] and (table[part].sum(1).max() > shard["size"] or table[part].min() < -1):
                raise ValueError(f"places beyond the end of {shard['name']}")
        problems = tuple(Problem(*problem) for problem in shard["problems"])
        common = (problems, bool(shard["ended"]), str(shard["content"]))
        nothing = np.empty((0, 2), np.int64)
        indexes = {}
        for ext, label_content in shard["labels"].items():
            places = labels[ext][part] if ext else nothing
            indexes[ext] = TarIndex(images[part], places, *common, str(label_content))
        if "" not in indexes:
            raise ValueError(f"no places of the images of {shard['name']}")
        entries[str(shard["name"])] = Entry(int(shard["size"]), str(shard["sha256"]), indexes)
    return entries


def no_labels(count: int) -> str:
    """What `TarIndex.label_content` is where none of `count` samples has the label."""
    return hashlib.blake2b(bytes(4 * count), digest_size=16).hexdigest()


# ---- tables


def _expected(images: np.ndarray) -> np.ndarray:
    """(N, 2): where each image would begin if headers took no room, and no size."""
    ends = images[:, 0] + _rounded(images[:, 1])
    return np.stack([np.concatenate([[0], ends])[: len(images)], np.zeros(len(images), np.int64)], 1)


def _behind(images: np.ndarray) -> np.ndarray:
    """(N, 2): the same of labels, which mostly come next."""
    return np.stack([images[:, 0] + _rounded(images[:, 1]), np.zeros(len(images), np.int64)], 1)


def _rounded(sizes: np.ndarray) -> np.ndarray:
    return -(-sizes // _BLOCK) * _BLOCK


def _narrow(column: np.ndarray) -> np.ndarray:
    """With as few bytes a number as will do."""
    low, high = (int(column.min()), int(column.max())) if len(column) else (0, 0)
    fits = lambda dtype: np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max  # noqa: E731
    return column.astype(next(filter(fits, ("<i1", "<i2", "<i4", "<i8"))))


def _distances(arrays, name: str) -> np.ndarray:
    columns = [arrays[f"{name}.{column}"] for column in (0, 1)]
    if any(column.ndim != 1 or column.dtype.kind != "i" for column in columns):
        raise ValueError("a column that is none of places")
    return np.stack(columns, 1).astype(np.int64)


def _places(arrays, name: str) -> np.ndarray:
    table = arrays[name]
    if table.ndim != 2 or table.shape[1] != 2 or table.dtype.kind != "i":
        raise ValueError("a table that is none of places")
    return table.astype(np.int64)
