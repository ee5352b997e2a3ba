"""Labels from a tar's members, decoded by webdataset, as one tensor for a batch.

- A label is a number, or numbers in the same shape for every sample: `.cls`, `.index`, `.id` (integers), `.json` (a
  number or a list of numbers), `.npy`.
- What most of some labels look like is what a label is; others are spoilt, wherever they stand.
- Formats whose decoding can run code (pickle, torch files) are refused.
"""

import io
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from webdataset.autodecode import basichandlers

from prelude.data.decode import BadImage
from prelude.data.errors import UserError

_KINDS = ("cls", "cls2", "index", "inx", "id", "json", "jsn", "npy", "txt")  # of .txt it is told what is wrong
_DTYPES = {"i": np.int64, "u": np.int64, "b": np.int64, "f": np.float32}
_SHORT, _MOST_KNOWN = 32, 4096  # bytes of a label, and labels, that are remembered
_LOOKED_AT = 64  # labels, to find out what a label is
_FORMATS = ".cls (an integer), .json (a number or a list of numbers) or .npy"


class LabelReader:
    """Decodes the members with one extension. `shape` and `dtype` are those of most of `examples`, the bytes of some
    members, that can be decoded.

    Raises UserError for an extension that cannot become a tensor, and where none of the examples can.
    """

    def __init__(self, extension: str, examples: Sequence[bytes]):
        self.extension = extension
        if extension.rpartition(".")[2] not in _KINDS:
            raise UserError(f"Labels cannot be read from .{extension} members; write them as {_FORMATS}.")
        labels = [label for label in map(self._decode, examples) if label is not None]
        if not labels:
            raise UserError(self._refusal(examples))
        ((self.shape, self.dtype), _) = Counter((label.shape, label.dtype) for label in labels).most_common(1)[0]
        self._known: dict[bytes, np.ndarray] = {}  # of what has been read, as classes come again and again

    def __call__(self, content: bytes) -> np.ndarray:
        """Not to be written to. Raises BadImage when this sample's label is spoilt: without it, the sample is of no
        use."""
        label = self._known.get(content)
        if label is None:
            label = self._read(content)
            if len(content) <= _SHORT and len(self._known) < _MOST_KNOWN:
                self._known[content] = label
        return label

    def _read(self, content: bytes) -> np.ndarray:
        label = self._decode(content)
        if label is None or label.shape != self.shape or (label.dtype.kind == "f" and self.dtype.kind != "f"):
            raise BadImage(f"bad .{self.extension} label")
        return label.astype(self.dtype)

    def _refusal(self, examples: Sequence[bytes]) -> str:
        """Of members none of which can be decoded."""
        found = f"The label {examples[0][:60]!r}" if examples else "The content"
        if examples and _is_beyond_64_bits(self._array(examples[0])):
            return (
                f"{found} of a .{self.extension} member does not fit into 64 bits; write whole numbers from -2^63 to "
                f"2^63 - 1, such as the numbers 0, 1, ... of the classes."
            )
        return f"{found} of a .{self.extension} member is neither a number nor numbers; write {_FORMATS}."

    def _decode(self, content: bytes) -> np.ndarray | None:
        label = self._array(content)
        if label is None or label.dtype.kind not in _DTYPES:
            return None
        if label.dtype == np.uint64 and (label > np.iinfo(np.int64).max).any():
            return None
        return label.astype(_DTYPES[label.dtype.kind])

    def _array(self, content: bytes) -> np.ndarray | None:
        """What webdataset makes of it; None where it makes nothing."""
        try:
            if self.extension.rpartition(".")[2] == "npy" and not _is_whole_npy(content):
                return None
            return np.asarray(basichandlers(f".{self.extension}", content))
        except (ValueError, TypeError, EOFError, OverflowError, RecursionError, MemoryError):
            return None


def _is_beyond_64_bits(label: np.ndarray | None) -> bool:
    """Of whole numbers: numpy keeps as Python's own those that no type of its has room for."""
    if label is None or label.dtype == np.uint64:
        return label is not None
    return label.dtype == object and all(isinstance(number, int) for number in label.flat)


def some(sample_ids: np.ndarray) -> list[int]:
    """A few of them, from all over."""
    return sample_ids[np.linspace(0, len(sample_ids) - 1, min(len(sample_ids), _LOOKED_AT)).astype(int)].tolist()


def no_label(index) -> UserError:
    """Where no sample of an index has the label."""
    return UserError(
        f"No sample in {index.paths[0]} and the rest has a .{index.label} member; write another label, or name members "
        f"so that image and label are the same up to the first dot of the file's name."
    )


def _is_whole_npy(content: bytes) -> bool:
    """Whether an array's bytes are there: a header may claim any number of them, and memory is taken first."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return math.prod(shape) * dtype.itemsize <= len(content)
