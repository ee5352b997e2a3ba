"""Where samples lie, as a table in a file that all processes of a node have in common.

- Indexed, it gives what an (N, 2) int64 array of offset and size would give. What nobody asks for takes no memory.
- The file is mapped: ranks and workers share one copy, which the kernel may drop and read again.
- Numbers have as many bytes as the largest of a column needs: mostly 8 for an image, 3 or 4 for its label.
- What travels to another process is the file's path.
- Damage is found by checksums: of the header always, of the numbers where they take `_CHECKED` bytes at most, since
  looking at all would be what mapping avoids. Files of any size are compared with the length that they should have.
- A file that is written into while it is mapped is noticed at the next look, before its numbers are believed.
"""

import contextlib
import json
import mmap
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from prelude.data.errors import RunStopped

Tables = Callable[[], Iterable[np.ndarray]]
"""Yields (n, 2) int64 of shard after shard, from the first one each time that it is called."""

_MAGIC = b"prelude places 2\n"
_CHECKED = 2**28
_PIECE = 2**24
_BLOCK = 512  # of a tar: members begin at multiples of it, unless it is damaged
_NARROW = "<u1", "<u2", "<u4", "<i8"
_OFFSETS = ("<u4", _BLOCK), ("<u4", 1), ("<i8", 1)
_SIZES = ("<u4", 1), ("<i8", 1)
_DISTANCES = ("<i2", _BLOCK), ("<i4", _BLOCK), ("<i4", 1), ("<i8", 1)
_LABEL_SIZES = tuple((dtype, 1) for dtype in _NARROW)


class Places:
    """(N, 2) int64: offset and size of each sample, -1 where it has none."""

    def __len__(self) -> int:
        raise NotImplementedError

    def _rows(self, rows: np.ndarray | slice) -> np.ndarray:
        raise NotImplementedError

    def __getitem__(self, key) -> np.ndarray:
        if isinstance(key, tuple):
            rows, column = key
            return self[rows][..., column]
        if isinstance(key, slice):
            return self._rows(key)
        if isinstance(key, int | np.integer):
            return self._rows(np.array([range(len(self))[key]]))[0]
        rows = np.asarray(key)
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        return self._rows(rows if rows.size else rows.astype(np.int64))  # [] is of floating point to numpy

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)


class Mapped(Places):
    """The table in a file that `write_images` or `write_labels` wrote. images: those that the labels belong to.

    `about` is what was written with it. Raises OSError where the file cannot be read, ValueError where it is no such
    file, or not whole. Indexed, it raises RunStopped for a file that has changed since.
    """

    def __init__(self, path: str, images: Places | None = None, opened: str = ""):
        """opened: where the file can be opened, if not at `path`."""
        self.path, self.images = path, images
        with open(opened or path, "rb") as file:
            header, begin = _read_header(file)
            self.about, self._count, self._begin = header["about"], int(header["count"]), begin
            self._checksum, self._state = header["checksum"], _state(file.fileno())
            whole = begin + self._count * sum(np.dtype(dtype).itemsize for dtype, _ in header["columns"])
            if self._state[0] != whole:
                raise ValueError(f"{self._state[0]} bytes where there should be {whole}")
            if whole - begin <= _CHECKED and _checksum(file.fileno(), begin) != self._checksum:
                raise ValueError("numbers that are not those that were written")
            self._fd = os.dup(file.fileno())  # the file may be removed, and is still there for whoever has it open
            memory = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
        self._columns = []
        for dtype, unit in header["columns"]:
            self._columns.append((np.frombuffer(memory, dtype, self._count, begin), int(unit)))
            begin += self._count * np.dtype(dtype).itemsize

    def __len__(self) -> int:
        return self._count

    def _rows(self, rows) -> np.ndarray:
        self._refuse_if_changed()
        (first, unit), (second, _) = self._columns
        found = np.stack([first[rows].astype(np.int64) * unit, second[rows].astype(np.int64)], -1)
        return found if self.images is None else _absolute(found, self.images[rows])

    def _refuse_if_changed(self) -> None:
        """Beyond the end of a file that was cut a look would kill the process, or find zeros."""
        state = _state(self._fd)
        if state == self._state:
            return
        (size, _), (whole, _) = state, self._state
        reason = f"{size} bytes where there were {whole}" if size != whole else ""
        if not reason and whole - self._begin <= _CHECKED and _checksum(self._fd, self._begin) != self._checksum:
            reason = "its numbers are not those that were written"
        if reason:
            raise RunStopped(
                f"{self.path}, the kept index of the shards, was written into while it was in use ({reason}); run the "
                f"same command again, which makes it anew. The shards are as they were."
            )
        self._state = state

    def __reduce__(self):
        self._refuse_if_changed()
        # The other place is the same file on Linux, also when it was removed, as long as this process lives.
        return _opened, (self.path, self.images, f"/proc/{os.getpid()}/fd/{self._fd}")

    def __del__(self, close=os.close):  # at the end of a process the module may have been emptied
        if hasattr(self, "_fd"):
            close(self._fd)


class Chained(Places):
    """Several tables, one after the other."""

    def __init__(self, tables: Sequence[Places | np.ndarray]):
        self.tables = tables
        self.ends = np.cumsum([len(table) for table in tables])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _rows(self, rows) -> np.ndarray:
        rows = np.arange(len(self))[rows] if isinstance(rows, slice) else rows
        found = np.empty((*rows.shape, 2), np.int64)
        turn = np.searchsorted(self.ends, rows, side="right")
        for number in np.unique(turn).tolist():
            table, here = self.tables[number], turn == number
            found[here] = table[rows[here] - (self.ends[number] - len(table))]
        return found


class Column:
    """(N,) int64: the first numbers of a table, which stay where they are."""

    def __init__(self, table: Places):
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, rows) -> np.ndarray:
        return self.table[rows, 0]


class Taken(Places):
    """Some rows of a table. rows: (n,) int64."""

    def __init__(self, table: Places | np.ndarray, rows: np.ndarray | Column):
        self.table, self.rows = table, rows

    def __len__(self) -> int:
        return len(self.rows)

    def _rows(self, rows) -> np.ndarray:
        return self.table[self.rows[rows]]


def write_images(path: str, tables: Tables, about: Callable[[], Any]) -> None:
    """about: JSON, asked for once the tables are through. Raises OSError, and what `tables` raises."""
    _write(path, tables, about, [_OFFSETS, _SIZES])


def write_labels(path: str, tables: Tables, images: Places, about: Callable[[], Any]) -> None:
    """As `write_images`, of labels, which are kept as distances from the ends of their images."""

    def relative() -> Iterable[np.ndarray]:
        begin = 0
        for table in tables():
            yield _relative(table, images[begin : begin + len(table)])
            begin += len(table)

    _write(path, relative, about, [_DISTANCES, _LABEL_SIZES])


# ---- labels beside images


def _relative(labels: np.ndarray, images: np.ndarray) -> np.ndarray:
    """(distance from the image's last block, size + 1); zeros where there is no label."""
    return np.where(labels[:, :1] < 0, 0, labels - np.stack([_end(images), np.full(len(images), -1)], -1))


def _absolute(relative: np.ndarray, images: np.ndarray) -> np.ndarray:
    offsets = relative[..., 0] + _end(images)
    return np.where(relative[..., 1:] > 0, np.stack([offsets, relative[..., 1] - 1], -1), -1)


def _end(images: np.ndarray) -> np.ndarray:
    """Where the next header would be."""
    return images[..., 0] + -(-images[..., 1] // _BLOCK) * _BLOCK


# ---- the file


class _TooNarrow(Exception):
    """A number does not fit. args: which column."""


def _write(path: str, tables: Tables, about: Callable[[], Any], ladders: list) -> None:
    """Begins with few bytes a number, and again with more where they do not do."""
    steps = [0] * len(ladders)
    while True:
        try:
            forms = [ladder[step] for ladder, step in zip(ladders, steps, strict=True)]
            return _write_as(path, tables, about, forms)
        except _TooNarrow as too_narrow:
            steps[too_narrow.args[0]] += 1


def _write_as(path: str, tables: Tables, about: Callable[[], Any], forms: list[tuple[str, int]]) -> None:
    """Into a file that `path` leads to once it is on the disk. The header comes last, when `about` is known."""
    unique = f"{path}.{os.getpid()}.{secrets.token_hex(4)}"
    aside, columns, count = [f"{unique}.{number}.tmp" for number in range(len(forms))], [], 0
    try:
        for name in aside:
            columns.append(open(name, "w+b"))
        for table in tables():
            count += len(table)
            for number, ((dtype, unit), file) in enumerate(zip(forms, columns, strict=True)):
                file.write(_encoded(table[:, number], dtype, unit, number))
        aside.append(f"{unique}.tmp")
        with open(aside[-1], "wb") as whole:
            checksum = 0
            for file in columns:
                file.flush()
                checksum = _checksum(file.fileno(), 0, checksum)
            whole.write(_header({"count": count, "columns": forms, "checksum": checksum, "about": about()}))
            for file in columns:
                file.seek(0)
                shutil.copyfileobj(file, whole, _PIECE)
            whole.flush()
            os.fsync(whole.fileno())
        os.replace(aside[-1], path)
    finally:
        for file in columns:
            file.close()
        for name in aside:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)


def _encoded(values: np.ndarray, dtype: str, unit: int, column: int) -> bytes:
    numbers, rest = np.divmod(values, unit)
    room = np.iinfo(dtype)
    if len(values) and (rest.any() or numbers.min() < room.min or numbers.max() > room.max):
        raise _TooNarrow(column)
    return numbers.astype(dtype).tobytes()


def _header(content: dict) -> bytes:
    text = json.dumps(content).encode()
    text += b" " * (-(len(_MAGIC) + 12 + len(text)) % 8)  # so that numbers of 8 bytes begin where processors like it
    return _MAGIC + len(text).to_bytes(8, "little") + zlib.crc32(text).to_bytes(4, "little") + text


def _read_header(file) -> tuple[dict, int]:
    """(what it says, where the columns begin)"""
    start = file.read(len(_MAGIC) + 12)
    if not start.startswith(_MAGIC) or len(start) < len(_MAGIC) + 12:
        raise ValueError("no file of places")
    size = int.from_bytes(start[-12:-4], "little")
    if size > os.fstat(file.fileno()).st_size:
        raise ValueError("a header longer than its file")
    text = file.read(size)
    if zlib.crc32(text) != int.from_bytes(start[-4:], "little"):
        raise ValueError("a header that is not the one that was written")
    return json.loads(text), len(start) + size


def _state(fd: int) -> tuple[int, int]:
    """Of a file: what changes when it is written into."""
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns


def _checksum(fd: int, begin: int = 0, start: int = 0) -> int:
    """Of a file from a byte on. By offset: processes that were forked share one place in it."""
    while piece := os.pread(fd, _PIECE, begin):
        start, begin = zlib.crc32(piece, start), begin + len(piece)
    return start


def _opened(path: str, images: Places | None, opened: str) -> Mapped:
    return Mapped(path, images, "" if os.path.exists(path) else opened)
