"""Tensors in safetensors files: written with their checksum, and read where they are asked for.

- A checksum is taken of the bytes on their way to the disk; nothing is read back for it.
- A tensor may lie in one file, or flattened and in pieces in several: whoever asks by name need not know.
- What is read is what was asked for: a tensor, or a stretch of one.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from prelude.checkpoints.state.inventory import Pieces, Spec
from prelude.data.whole_files import created

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HASHED_AT_ONCE = 2**22  # bytes that are still in the processor's cache when they are written
_OPEN_AT_ONCE = 64  # files, of however many parts


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict:
    """A new file of tensors in host memory, on the disk when this returns. What a manifest says of it is returned.

    Raises OSError where the disk does not take it.
    """
    header, place = {}, 0
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # each begins aligned
    for name, tensor in ordered:
        end = place + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    values = (tensor.reshape(-1).view(torch.uint8).numpy() for _, tensor in ordered)
    return _write(path, (len(text).to_bytes(8, "little"), text, *values))


def write_json(path: Path, value) -> dict:
    """As `write_tensors`, of plain JSON values."""
    return _write(path, (json.dumps(value).encode(),))


def _write(path: Path, contents: Iterable[Sequence]) -> dict:
    checksum, size = xxhash.xxh3_128(), 0
    with created(path) as file:
        for content in contents:
            for start in range(0, len(content), _HASHED_AT_ONCE):
                chunk = content[start : start + _HASHED_AT_ONCE]
                checksum.update(chunk)
                file.write(chunk)
            size += len(content)
    return {"bytes": size, "xxh3_128": checksum.hexdigest()}


@dataclass(frozen=True)
class Laid:
    """A tensor, and where its pieces lie: a rank's in its file. Raises ValueError where they leave something out."""

    spec: Spec
    files: Sequence[Path]
    pieces: Pieces

    def __post_init__(self):
        size, at = self.size, 0
        if isinstance(self.pieces, int):
            at = min(self.pieces * len(self.files), size)
        else:
            for rank, start, stop in self.pieces:
                if start != at or stop < start or not 0 <= rank < len(self.files):
                    raise ValueError(f"the piece of rank {rank} has elements {start} to {stop} and not from {at} on")
                at = stop
        if at != size:
            raise ValueError(f"the pieces of a tensor end at element {at} of {size}")

    @property
    def size(self) -> int:
        return math.prod(self.spec.shape)

    def within(self, start: int, stop: int) -> Iterator[tuple[Path, int, int]]:
        """(file, first, last) of the pieces that have any of these elements."""
        if start == stop:
            return
        if isinstance(self.pieces, int):
            for rank in range(start // self.pieces, -(-stop // self.pieces)):
                yield self.files[rank], rank * self.pieces, min((rank + 1) * self.pieces, self.size)
        else:
            for rank, first, last in self.pieces:
                if first < stop and start < last:
                    yield self.files[rank], first, last


class TensorFiles(Mapping[str, Tensor]):
    """Tensors by name, read when they are asked for. Raises OSError or SafetensorError where they cannot be."""

    def __init__(self, laid: Mapping[str, Laid]):
        self.laid = laid
        self._open = lru_cache(_OPEN_AT_ONCE)(lambda path: safe_open(path, framework="pt"))

    @classmethod
    def of_file(cls, path: Path) -> "TensorFiles":
        """All that one file holds, each tensor whole."""
        laid = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                stored = file.get_slice(name)
                spec = Spec(tuple(stored.get_shape()), DTYPES[stored.get_dtype()])
                laid[name] = Laid(spec, (path,), [(0, 0, math.prod(spec.shape))])
        return cls(laid)

    def spec(self, name: str) -> Spec:
        return self.laid[name].spec

    def __getitem__(self, name: str) -> Tensor:
        laid = self.laid[name]
        pieces = list(laid.within(0, laid.size))
        if len(pieces) == 1:
            return self._open(pieces[0][0]).get_tensor(name).view(laid.spec.shape)
        return self.stretch(name, 0, laid.size).view(laid.spec.shape)

    def stretch(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the flattened tensor, (stop - start,)."""
        found = torch.empty(stop - start, dtype=self.laid[name].spec.dtype)
        for path, first, last in self.laid[name].within(start, stop):
            a, b = max(start, first), min(stop, last)
            found[a - start : b - start] = _elements(self._open(path), name, a - first, b - first)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.laid)

    def __len__(self) -> int:
        return len(self.laid)


def _elements(file, name: str, start: int, stop: int) -> Tensor:
    """Of what a file holds under a name, flattened: the rows that they lie in are read, and no more."""
    stored = file.get_slice(name)
    shape = stored.get_shape()
    if not shape:
        return file.get_tensor(name).reshape(1)
    row = math.prod(shape[1:])
    first = start // row
    return stored[first : -(-stop // row)].reshape(-1)[start - first * row : stop - first * row]
