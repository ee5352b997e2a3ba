"""Several findings in one image, as a JSON member says them: which are present, absent, uncertain or unknown."""

import json
import math
from dataclasses import dataclass

import numpy as np

from prelude.data.decode import BadImage
from prelude.data.errors import UserError
from prelude.data.labels import extension_of

UNCERTAIN = -1.0  # of a finding that was looked for, without a clear answer


@dataclass(frozen=True)
class VectorFormat:
    """How a JSON member says which of several findings an image shows.

    The member, or its `field`, is a list of the names that are present (the others are absent), an object from names
    to 1, 0, -1 for uncertain or null for unknown, or a list of such numbers in the order of `names`.
    """

    names: tuple[str, ...]
    field: str = ""  # of the JSON object; "": the whole member
    group_field: str = ""  # whose values group the samples, such as `patient`; "": every sample on its own
    group_asked: bool = True  # by who judges; else by a run, whose images may name groups where these do not

    def vector(self, content: dict | list) -> list[float] | None:
        """L values of 1, 0 and NaN for what is not known; None where there is no such thing in `content`."""
        answers = self.answers(content)
        return answers and [math.nan if answer == UNCERTAIN else answer for answer in answers]

    def answers(self, content: dict | list) -> list[float] | None:
        """The same, with `UNCERTAIN` where that is the answer."""
        found = content
        if self.field:
            found = content.get(self.field) if isinstance(content, dict) else None
        if isinstance(found, dict):
            values = [found.get(name) for name in self.names]
        elif isinstance(found, list) and all(isinstance(item, str) for item in found):
            return [float(name in found) for name in self.names]
        elif isinstance(found, list) and len(found) == len(self.names):
            values = found
        else:
            return None
        if any(value not in (0, 1, UNCERTAIN, None) for value in values):
            return None
        return [math.nan if value is None else float(value) for value in values]


class FindingsReader:
    """Reads the answers of each sample as a label of a batch; in a loader it stands for a `LabelReader`."""

    dtype = np.dtype(np.float32)

    def __init__(self, label: str, form: VectorFormat):
        if ":" in label:
            raise UserError(f"{label} names a field where findings are; write json, and the field apart from it.")
        self.form, self.extension, self.shape = form, extension_of(label), (len(form.names),)

    def __call__(self, content: bytes) -> np.ndarray:
        """(L,) float32. Raises BadImage where there are no findings in a member: its image is of no use."""
        try:
            parsed = json.loads(content)
        except (ValueError, RecursionError):
            parsed = None
        answers = self.form.answers(parsed) if isinstance(parsed, (dict, list)) else None
        if answers is None:
            raise BadImage(f"bad .{self.extension} label")
        return np.array(answers, self.dtype)
