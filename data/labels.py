"""Labels from a tar's members, as one tensor for a batch.

- A label is named by its member's extension (`cls`), or by a field of a JSON member (`json:diagnosis`).
- It is a number, or numbers in the same shape for every sample: `.cls`, `.index`, `.id` (integers), `.json` (a number
  or a list of numbers), `.npy`. Or it is text, the name of a class: whole numbers stay what they are, other text gets
  the number of its place among the names.
- What most of some labels look like is what a label is; others are spoilt, wherever they stand.
- Formats whose decoding can run code (pickle, torch files) are refused.
"""

import io
import json
import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from webdataset.autodecode import basichandlers

from prelude.data.decode import BadImage
from prelude.data.errors import UserError

FOLDERS = ("parent", "top")  # of an image in a folder of folders: the one that it lies in, and the first one
TEXTS = ("cls", "cls2", "index", "inx", "id", "txt", "text", *FOLDERS)
JSON = ("json", "jsn")
_DTYPES = {"i": np.int64, "u": np.int64, "b": np.int64, "f": np.float32}
_SHORT, _MOST_KNOWN = 32, 4096  # bytes of a label, and labels, that are remembered
_LOOKED_AT = 64  # labels, to find out what a label is
_FORMATS = ".cls (an integer), .txt (a class name), .json (a number or a list of numbers, or json:FIELD) or .npy"
WHOLE = re.compile(r"[+-]?\d+")


def label_name(text: str) -> str:
    """`.CLS` as `cls`; a field keeps its case: `JSON:Diagnosis` is `json:Diagnosis`."""
    extension, colon, field = text.partition(":")
    return extension.lower().removeprefix(".") + colon + field


def extension_of(label: str) -> str:
    """Of the label's member."""
    return label.partition(":")[0]


def in_words(label: str) -> str:
    """`.cls member`, or `field 'diagnosis' in a .json member`."""
    extension, _, field = label.partition(":")
    return f"field {field!r} in a .{extension} member" if field else f".{extension} member"


class LabelReader:
    """Reads labels of one name out of their members. What a label is, most of `examples`, the bytes of some members,
    say: text (`is_text`), or numbers of a `shape` and `dtype`. Names have numbers once `name_classes` is told.

    Raises UserError for an extension that holds no labels, and where none of the examples is one.
    """

    def __init__(self, label: str, examples: Sequence[bytes]):
        self.label, self._number_of = label, {}
        self.extension, _, self.field = label.partition(":")
        self._kind = self.extension.rpartition(".")[2]
        if self._kind not in (*TEXTS, *JSON, "npy"):
            raise UserError(f"Labels cannot be read from .{self.extension} members; write them as {_FORMATS}.")
        if ":" in label and (self._kind not in JSON or not self.field):
            raise UserError(f"{label} names no field; write json:FIELD, or {self.extension} for the whole member.")
        found = [value for value in map(self._value, examples) if value is not None]
        if not found:
            raise UserError(self._refusal(examples))
        ((is_text, self.shape, self.dtype), _) = Counter(map(_form, found)).most_common(1)[0]
        self.is_text = is_text
        self._known: dict[bytes, np.ndarray] = {}  # of what has been read, as classes come again and again

    def name_classes(self, names: Sequence[str]) -> None:
        """In the order of their numbers."""
        self._number_of = {name: number for number, name in enumerate(names)}
        self._known.clear()

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
        value = self.plain(content)
        if not self.is_text:
            return value
        if value not in self._number_of:
            raise BadImage(f"a .{self.extension} label that is none of the classes")
        return np.asarray(self._number_of[value])

    def plain(self, content: bytes) -> np.ndarray | str:
        """The name of the class where labels are text, else as `__call__`. Raises BadImage."""
        value = self._value(content)
        if self.is_text and isinstance(value, np.ndarray) and value.dtype.kind == "i" and not value.shape:
            return str(self._raw(content)).strip()  # a class that is called 7, among others that have names
        if value is None or _form(value)[:2] != (self.is_text, self.shape):
            raise BadImage(f"bad .{self.extension} label")
        if self.is_text:
            return value
        if value.dtype.kind == "f" and self.dtype.kind != "f":
            raise BadImage(f"bad .{self.extension} label")
        return value.astype(self.dtype)

    def _refusal(self, examples: Sequence[bytes]) -> str:
        """Of members none of which can be decoded."""
        found = f"The label {examples[0][:60]!r}" if examples else "The content"
        member = f"of a .{self.extension} member"
        raw = self._raw(examples[0]) if examples else None
        if _is_beyond_64_bits(self._array(raw)):
            return (
                f"{found} {member} does not fit into 64 bits; write whole numbers from -2^63 to 2^63 - 1, such as the "
                f"numbers 0, 1, ... of the classes."
            )
        if self.field and examples:
            return f"{found} {member} has no field {self.field!r} with a class in it; write another json:FIELD."
        if isinstance(raw, dict) and raw:
            fields = " or ".join(f"{self.extension}:{field}" for field in list(raw)[:3])
            return f"{found} {member} is neither a number nor numbers, but has fields; write {fields}."
        return f"{found} {member} is neither a number nor numbers, nor the name of a class; write {_FORMATS}."

    def _value(self, content: bytes) -> np.ndarray | str | None:
        """None where there is no label in it."""
        raw = self._raw(content)
        if isinstance(raw, str) and not WHOLE.fullmatch(raw.strip()):
            return raw.strip() or None
        label = self._array(raw)
        if label is None or label.dtype.kind not in _DTYPES:
            return None
        if label.dtype == np.uint64 and (label > np.iinfo(np.int64).max).any():
            return None
        return label.astype(_DTYPES[label.dtype.kind])

    def _raw(self, content: bytes):
        """What is written there: text, or what the format makes of it; None where it makes nothing."""
        try:
            if self._kind in TEXTS:
                return content.decode()
            if self._kind == "npy":
                return basichandlers(".npy", content) if _is_whole_npy(content) else None
            raw = json.loads(content)
            return field_of(raw, self.field) if self.field else raw
        except (ValueError, TypeError, EOFError, OverflowError, RecursionError, MemoryError):
            return None

    def _array(self, raw) -> np.ndarray | None:
        try:
            return None if raw is None else np.asarray(int(raw) if isinstance(raw, str) else raw)
        except (ValueError, TypeError, OverflowError, RecursionError, MemoryError):
            return None


def field_of(raw, field: str):
    """`a.b` is the field b of a, unless there is one of that very name."""
    if not isinstance(raw, dict) or field in raw or "." not in field:
        return raw.get(field) if isinstance(raw, dict) else None
    first, _, rest = field.partition(".")
    return field_of(raw.get(first), rest)


def _form(value: np.ndarray | str) -> tuple[bool, tuple[int, ...], np.dtype]:
    """(whether it is text, shape and type of what a batch has of it)."""
    return (True, (), np.dtype(np.int64)) if isinstance(value, str) else (False, value.shape, value.dtype)


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
        f"No sample in {index.named} has a .{extension_of(index.label)} member; write another label, "
        f"or name members so that image and label are the same up to the first dot of the file's name."
    )


def _is_whole_npy(content: bytes) -> bool:
    """Whether an array's bytes are there: a header may claim any number of them, and memory is taken first."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return math.prod(shape) * dtype.itemsize <= len(content)
