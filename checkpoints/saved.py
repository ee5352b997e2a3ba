"""What a checkpoint holds, read from its folder: the one way to its tensors, whether they lie in one file or in parts.

Reading a checkpoint runs no code that it brings along.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from prelude.checkpoints.manifest import (
    MANIFEST,
    MODEL,
    OPTIMIZER,
    PIECES,
    STATE,
    Fault,
    fault_of,
    part_name,
    ranks_of,
    read_manifest,
)
from prelude.checkpoints.state.inventory import Inventory, Pieces, Spec
from prelude.checkpoints.state.scalars import Number
from prelude.checkpoints.tensor_files import DTYPES, NAMES, Laid, TensorFiles
from prelude.data.errors import UserError, in_one_line


@dataclass(frozen=True)
class SavedState:
    """A checkpoint's state; its tensors are read when they are asked for, by parameter and by PARAMETER/MOMENT."""

    tensors: TensorFiles
    moments: TensorFiles
    optimizer: str
    scalars: dict[str, dict[str, Number | dict]]
    loss_scaler: dict[str, Number] | None
    meta: dict
    manifest: bytes

    def inventory(self) -> Inventory:
        moments: dict[str, dict[str, Spec]] = {}
        for place in self.moments:
            name, _, key = place.rpartition("/")
            moments.setdefault(name, {})[key] = self.moments.spec(place)
        tensors = {name: self.tensors.spec(name) for name in self.tensors}
        return Inventory(tensors, moments, self.optimizer, self.scalars, self.loss_scaler)


def open_checkpoint(path: str | Path, *, checksums: bool = True) -> SavedState:
    """Raises UserError unless every byte of it is as it was written; checksums: False where that has just been seen."""
    path = Path(path)
    refuse_incomplete(path, checksums=checksums)
    try:
        manifest, rest = (path / MANIFEST).read_bytes(), json.loads((path / STATE).read_text())
        own = {key: rest[key] for key in ("optimizer", "scalars", "loss_scaler", "meta")}
        return SavedState(open_tensors(path, MODEL), open_tensors(path, OPTIMIZER), **own, manifest=manifest)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read any more ({error}); see to the disk, and start again.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path / STATE} is not what this version writes ({in_one_line(error, typed=True)}); write another "
            "run_dir, and resume.checkpoint=PATH of another checkpoint."
        ) from None


def seen_here(path: str | Path, manifest: bytes) -> SavedState | None:
    """The checkpoint that another rank has checked, where this one sees it too. manifest: of that one."""
    try:
        saved = open_checkpoint(path, checksums=False)
    except UserError:
        return None
    return saved if saved.manifest == manifest else None


def open_tensors(path: Path, content: str = MODEL) -> TensorFiles:
    """A checkpoint's tensors by name. content: MODEL or OPTIMIZER.

    For a checkpoint that has been found complete. Raises OSError or SafetensorError where it cannot be read any more,
    ValueError, KeyError or TypeError where it is not what this version writes.
    """
    ranks = ranks_of(read_manifest(path))
    if not ranks:
        return TensorFiles.of_file(path / content)
    files = [path / part_name(content, rank, ranks) for rank in range(ranks)]
    listed = json.loads((path / PIECES).read_bytes())[content]
    return TensorFiles(
        {
            name: Laid(Spec(tuple(entry["shape"]), DTYPES[entry["dtype"]]), files, entry["pieces"])
            for name, entry in listed.items()
        }
    )


def listed_pieces(laid: dict[str, tuple[Spec, Pieces]]) -> dict:
    """What `open_tensors` reads of a content's pieces, in JSON's values."""
    return {
        name: {"shape": list(spec.shape), "dtype": NAMES[spec.dtype], "pieces": pieces}
        for name, (spec, pieces) in laid.items()
    }


def read_meta(path: str | Path) -> dict:
    """What a checkpoint was saved with beside its tensors, which stay on disk; empty where it cannot be read."""
    try:
        return json.loads((Path(path) / STATE).read_text())["meta"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def refuse_incomplete(path: Path, *, checksums: bool = True) -> None:
    """Raises UserError unless it is a complete checkpoint."""
    if fault := fault_of(path, checksums=checksums):
        raise incomplete(path, fault)


def incomplete(path: str | Path, fault: Fault) -> UserError:
    return UserError(
        f"{path} is no complete checkpoint: {fault.why}; name another one, or write resume.checkpoint=auto."
    )
