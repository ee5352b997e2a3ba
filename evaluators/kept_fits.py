"""What evaluators found, kept beside the features that it was found on, so that a comparison repeats no fit.

- A fit is named by a hash of everything that decides it: the evaluator and its settings, the code of all evaluators,
  the content of features, labels and groups, the seed, the kind of device and the version of torch.
- A file is there whole or not at all, and carries a checksum; a damaged one is made again. What cannot be kept is told,
  and costs time only.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from prelude.data.whole_files import write_whole
from prelude.evaluators.features.bank import FITS
from prelude.evaluators.features.extraction import Features
from prelude.evaluators.results import Outcome, Percent, packed, unpacked, without_none
from prelude.pretrain.files import Tolerant

FORMAT = 1
PIECE = 2**24  # bytes


class KeptFits:
    """In a bank's folder."""

    def __init__(self, bank: Path):
        self.folder = bank / FITS
        self.tolerant = Tolerant(self.folder)

    def found(self, key: str) -> tuple[Outcome, float] | None:
        """The outcome, and the seconds that it took; None where there is none that is sound."""
        try:
            checksum, _, body = (self.folder / f"{key}.json").read_text().partition("\n")
        except (OSError, UnicodeDecodeError):
            return None
        if checksum != xxhash.xxh3_128_hexdigest(body.encode()):
            return None
        kept = json.loads(body)
        return _outcome(kept["outcome"]), kept["seconds"]

    def keep(self, key: str, outcome: Outcome, seconds: float) -> Outcome:
        """As it will be found: what has been kept and what has not look alike."""
        body = json.dumps({"outcome": _plain(outcome), "seconds": round(seconds, 3)})
        path = self.folder / f"{key}.json"
        with self.tolerant:
            self.folder.mkdir(parents=True, exist_ok=True)
            text = f"{xxhash.xxh3_128_hexdigest(body.encode())}\n{body}"
            write_whole(path, text, draft=path.with_name(f".{path.name}.{os.getpid()}"))
        return _outcome(json.loads(body)["outcome"])


def key_of(evaluator: Callable, content: str, seed: int, device: torch.device) -> str:
    """content: of `content_of`."""
    decides = [FORMAT, _named(evaluator), _code(), content, seed, device.type, torch.__version__]
    return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=16).hexdigest()


def content_of(*parts: dict[str, Features]) -> str:
    """A hash of all that features are, but for where they came from."""
    digest = xxhash.xxh3_128()
    for part in parts:
        for kind, features in part.items():
            digest.update(kind.encode())
            for name in ("values", "labels", "sample_ids", "groups", "same_as"):
                _update(digest, getattr(features, name))
    return digest.hexdigest()


def _update(digest, tensor: Tensor | None) -> None:
    digest.update(repr(None if tensor is None else (tensor.dtype, tuple(tensor.shape))).encode())
    if tensor is not None:
        content = memoryview(tensor.contiguous().numpy()).cast("B")
        for first in range(0, len(content), PIECE):
            digest.update(content[first : first + PIECE])


def _named(evaluator: Callable) -> list:
    """What an evaluator is called, and its settings."""
    if isinstance(evaluator, partial):
        return [_named(evaluator.func), repr(evaluator.args), repr(sorted(evaluator.keywords.items()))]
    return [evaluator.__module__, evaluator.__qualname__]


@cache
def _code() -> str:
    """A hash of the evaluators' source."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _plain(outcome: Outcome) -> dict:
    right = [packed(each) for each in outcome.right]
    told = asdict(replace(outcome, right=()), dict_factory=without_none)
    return told | {"right": right, "num_test": len(outcome.right[0]) if right else 0}


def _outcome(plain: dict) -> Outcome:
    right = [torch.from_numpy(unpacked(text, plain["num_test"])) for text in plain["right"]]
    by_kind = {kind: _numbers(found) for kind, found in plain["by_kind"].items()}
    fields = {key: plain[key] for key in ("evaluator", "chosen", "recipe", "details", "warnings")}
    return Outcome(**fields, numbers=_numbers(plain["numbers"]), by_kind=by_kind, right=right)


def _numbers(found: dict) -> dict[str, Percent]:
    return {name: _number(number) for name, number in found.items()}


def _number(found: dict) -> Percent:
    interval = tuple(found["interval"]) if "interval" in found else None
    return Percent(found["value"], found.get("se"), found.get("spread"), interval)
