"""Labels from a tar's members, decoded by webdataset, as one tensor for a batch.

- A label is a number, or numbers in the same shape for every sample: `.cls`, `.index`, `.id` (integers), `.json` (a
  number or a list of numbers), `.npy`.
- Formats whose decoding can run code (pickle, torch files) are refused.
"""

import numpy as np
from webdataset.autodecode import basichandlers, decoders

from prelude.data.decode import BadImage
from prelude.data.errors import UserError

_EXECUTES_CODE = ("pkl", "pickle", "pyd", "pth")
_DTYPES = {"i": np.int64, "u": np.int64, "b": np.int64, "f": np.float32}


class LabelReader:
    """Decodes the members with one extension. `shape` and `dtype` are those of `example`, a sound label's bytes.

    Raises UserError for an extension or a label that cannot become a tensor.
    """

    def __init__(self, extension: str, example: bytes):
        self.extension = extension
        kind = extension.rpartition(".")[2]
        if kind in _EXECUTES_CODE or kind not in decoders:
            raise UserError(
                f"Labels cannot be read from .{extension} members; write them as .cls (an integer), .json (a number or "
                f"a list of numbers) or .npy."
            )
        label = self._decode(example)
        if label is None:
            raise UserError(
                f"The label {example[:60]!r} of a .{extension} member is neither a number nor numbers; write .cls (an "
                f"integer), .json (a number or a list of numbers) or .npy."
            )
        self.shape, self.dtype = label.shape, label.dtype

    def __call__(self, content: bytes) -> np.ndarray:
        """Raises BadImage when this sample's label is spoilt: without it, the sample is of no use."""
        label = self._decode(content)
        if label is None or label.shape != self.shape or (label.dtype.kind == "f" and self.dtype.kind != "f"):
            raise BadImage(f"bad .{self.extension} label")
        return label.astype(self.dtype)

    def _decode(self, content: bytes) -> np.ndarray | None:
        try:
            label = np.asarray(basichandlers(f".{self.extension}", content))
        except (ValueError, TypeError, EOFError, OverflowError):
            return None
        return label.astype(_DTYPES[label.dtype.kind]) if label.dtype.kind in _DTYPES else None
