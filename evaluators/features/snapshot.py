"""An array out of a file, as it is when it is read: what others do to the file afterwards reaches nobody.

Were the file itself mapped, cutting it would kill this process at the next look beyond its end, by a signal and without
a word, and writing into it would change the numbers in the midst of an evaluation.

- It is read once, and checked on the way, in memory as long as all ranks together then hold no more than half of what
  the machine or its container has, and half of what is free there.
- What is larger goes into a file beside it that has no name: nobody else can open that, it costs address space instead
  of memory, and the disk has its room back when the process ends, in whatever way.
- Either is writable, and private.
"""

import os
import tempfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from prelude.pretrain import distributed
from prelude.pretrain.devices import host_memory

PIECE = 2**24  # bytes


def snapshot(
    path: Path, dtype: np.dtype | str, shape: Sequence[int], *, offset: int = 0, checksum: int | None = None
) -> np.ndarray:
    """The array of this shape that begins at byte `offset` of the file. checksum: its CRC-32.

    Raises OSError where the file cannot be read or its copy has no room, and ValueError where it ends too early or its
    checksum is another.
    """
    dtype = np.dtype(dtype)
    num_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        if fits(num_bytes):
            found = np.empty(num_bytes, np.uint8)
            _read(file, memoryview(found), checksum)
            return found.view(dtype).reshape(shape)
        with tempfile.TemporaryFile(dir=path.parent, buffering=0) as copy:
            _copy(file, copy, num_bytes, checksum)
            return np.memmap(copy, dtype, "c", shape=tuple(shape))


def fits(num_bytes: int) -> bool:
    """Whether memory has so much to spare, for each rank."""
    (free, held), ranks = _free_and_held(), distributed.world_size()
    return ranks * num_bytes <= free / 2 and ranks * (held + num_bytes) <= host_memory() / 2


def _free_and_held() -> tuple[int, int]:
    """Bytes of memory that are free, and that are this process' own; where the system does not tell, all and none."""
    free, held, page = int(host_memory()), 0, os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError, IndexError, StopIteration):
        with open("/proc/meminfo") as file:
            free = 1024 * int(next(line for line in file if line.startswith("MemAvailable:")).split()[1])
        with open("/proc/self/statm") as file:
            _, resident, shared, *_ = map(int, file.read().split())
        held = page * (resident - shared)
    return free, held


def _read(file, memory: memoryview, checksum: int | None) -> None:
    found, done = 0, 0
    while done < len(memory):
        count = file.readinto(memory[done : done + PIECE])
        _refuse_end(count, done, len(memory))
        found, done = zlib.crc32(memory[done : done + count], found), done + count
    _refuse_other(found, checksum)


def _copy(file, copy, num_bytes: int, checksum: int | None) -> None:
    found, done = 0, 0
    while done < num_bytes:
        piece = file.read(min(PIECE, num_bytes - done))
        _refuse_end(len(piece), done, num_bytes)
        found, done = zlib.crc32(piece, found), done + len(piece)
        left = memoryview(piece)
        while left:
            left = left[copy.write(left) :]
    _refuse_other(found, checksum)


def _refuse_end(count: int, done: int, wanted: int) -> None:
    if not count:
        raise ValueError(f"it ends after {done:,} of {wanted:,} bytes")


def _refuse_other(found: int, checksum: int | None) -> None:
    if checksum not in (None, found):
        raise ValueError("its values are not those that were written")
