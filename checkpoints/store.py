"""A run's checkpoints on disk: a checkpoint is there entirely, or not at all.

- Whenever the process, the node or the disk gives up, the checkpoints that were complete stay complete.
- `newest` trusts checksums, never a name: what does not match its manifest is passed over.
- A failure on rank 0 is told to every rank, so that none waits for ever.
- Only rank 0 reads and writes files; the folder need not be visible to other nodes.
- Files are safetensors and JSON: reading a checkpoint runs no code that it brings along.

    checkpoints/latest                 name of the last one saved, for people
    checkpoints/held                   name of one that retention spares, if any
    checkpoints/step-00001000/         model.safetensors, optimizer.safetensors, state.json, manifest.json
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from prelude.checkpoints.portable import PortableState, gather_state, scatter_state
from prelude.data.errors import RunStopped, UserError
from prelude.pretrain import distributed

FORMAT = 1
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
_FILES = (MODEL, OPTIMIZER, STATE)
_TEMPORARY = ".tmp-"
_REPLACED = ".replaced"  # a complete checkpoint that another of the same step is taking the place of
_NAME = re.compile(r"step-(\d{8,})(" + re.escape(_REPLACED) + ")?")

log = logging.getLogger(__name__)


class Store:
    """The checkpoints in `folder`, of which the `keep` that were saved last are kept, and the one that is held."""

    def __init__(self, folder: str | Path, keep: int = 3):
        self.folder, self.keep = Path(folder), keep

    def save(self, step: int, engine, meta: dict) -> Path:
        """Saves the engine's state and `meta` (plain JSON values). Collective; returns the checkpoint's folder.

        Raises RunStopped on every rank when the disk does not take it.
        """
        json.dumps(meta)  # on every rank: what JSON cannot hold fails on all of them alike
        state = gather_state(engine)
        failure = distributed.from_main(self._try_to_write(step, state, meta) if distributed.is_main() else None)
        if failure:
            raise RunStopped(failure)
        return self.folder / _name(step)

    def newest(self) -> Path | None:
        """The complete checkpoint that was saved last, or None. Not collective, and needs no process group.

        One saved later that is damaged is passed over with a warning that says what is wrong with it.
        """
        for path in self._by_age():
            if why := problem(path):
                log.warning(f"Checkpoint {path} is passed over: {why}.")
            else:
                return path
        return None

    def load(self, path: str | Path, engine) -> dict:
        """Puts a checkpoint into the engine on every rank, whatever its stage and world size. Collective.

        Returns the `meta` it was saved with. Raises UserError on every rank, before anything is changed, when
        there is no complete checkpoint at `path` or it does not fit the engine.
        """
        state, answer = None, None
        if distributed.is_main():
            try:
                state, meta = read_checkpoint(path)
                answer = {"meta": meta}
            except UserError as error:
                answer = {"refusal": str(error)}
        answer = distributed.from_main(answer)
        if "refusal" in answer:
            raise UserError(answer["refusal"])
        scatter_state(engine, state)
        return answer["meta"]

    # ---- on rank 0

    def hold(self, step: int) -> Path | None:
        """Spares the newest complete checkpoint of at most `step`, and no other, until `release`: in later starts of
        the run too. Returns it; None, and nothing changes, where there is none."""
        eligible = (path for path in self._by_age() if _step(path) <= step and _looks_complete(path))
        held = next(eligible, None)
        if held and self._held() != held.name:
            self._point("held", held)
        return held

    def release(self) -> None:
        (self.folder / "held").unlink(missing_ok=True)

    def _held(self) -> str:
        """The name of the checkpoint that is spared, or nothing."""
        try:
            return (self.folder / "held").read_text().strip()
        except OSError:
            return ""

    def _try_to_write(self, step: int, state: PortableState, meta: dict) -> str | None:
        """Returns why the disk did not take it, in a sentence, having cleaned up; None when it did."""
        try:
            self._remove(self.folder.glob(_TEMPORARY + "*"))  # left by processes that were killed
            self._write(step, state, meta)
            return None
        except (OSError, SafetensorError) as error:
            self._remove(self.folder.glob(_TEMPORARY + "*"))
            kept = self.newest()
            return (
                f"{_name(step)} could not be saved in {self.folder} ({error}); make room there and start the same "
                f"command again, which goes on from {kept.name if kept else 'the start: no checkpoint is complete'}."
            )

    def _write(self, step: int, state: PortableState, meta: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        place, draft = self.folder / _name(step), self.folder / (_TEMPORARY + _name(step))
        draft.mkdir()
        save_file(state.tensors, draft / MODEL)
        moments = {f"{name}/{key}": t for name, held in state.moments.items() for key, t in held.items()}
        save_file(moments, draft / OPTIMIZER)
        rest = {"format": FORMAT, "step": step, "meta": meta, "optimizer": state.optimizer}
        rest |= {"scalars": state.scalars, "loss_scaler": state.loss_scaler}
        (draft / STATE).write_text(json.dumps(rest))
        files = {name: _described(draft / name) for name in _FILES}
        # The manifest vouches for the other files, so their bytes reach the disk before it exists: after a power
        # cut a file system may have kept the later of two writes and lost the earlier.
        for name in _FILES:
            sync_to_disk(draft / name)
        manifest = {"format": FORMAT, "serial": 1 + max(map(_serial, self._all()), default=0), "files": files}
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=1))
        sync_to_disk(draft / MANIFEST)
        # The folder's list of names is data of its own: without this, synced files may be missing from it.
        sync_to_disk(draft)
        replaced = place.with_name(place.name + _REPLACED)
        if place.exists():
            self._remove([replaced])
            os.rename(place, replaced)  # still a checkpoint that `newest` finds, until the new one is in place
        os.rename(draft, place)
        # The rename is a change of the parent folder, and not on disk before that is.
        sync_to_disk(self.folder)
        self._point("latest", place)
        self._retire()

    def _point(self, name: str, place: Path) -> None:
        """Replaced in one operation: whoever reads `latest` sees the old name or the new one, never half of it."""
        pointer = self.folder / (_TEMPORARY + name)
        pointer.write_text(place.name + "\n")
        sync_to_disk(pointer)  # or the replaced file could come up empty after a power cut
        os.replace(pointer, self.folder / name)
        sync_to_disk(self.folder)

    def _retire(self) -> None:
        """Keeps the `keep` saved last and the held one, and removes all others, damaged ones with them."""
        kept = [path for path in self._by_age() if not path.name.endswith(_REPLACED) and _looks_complete(path)]
        held = self._held()
        self._remove(path for path in self._all() if path not in kept[: self.keep] and path.name != held)

    def _remove(self, paths) -> None:
        """What cannot be removed now is tried again at the next save."""
        for path in list(paths):
            with suppress(OSError):
                if not path.name.startswith(_TEMPORARY):
                    # Renamed first: a removal that is interrupted must not leave half a checkpoint under its name.
                    path = path.rename(path.with_name(_TEMPORARY + path.name))
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _by_age(self) -> list[Path]:
        """Saved last first. Steps do not tell: a run may have gone back to an earlier step and on from there.

        One whose age cannot be read comes first, so that `newest` names it instead of keeping silent.
        """
        return sorted(self._all(), key=lambda path: (_serial(path) or math.inf, path.name), reverse=True)

    def _all(self) -> list[Path]:
        return [path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]


def problem(path: str | Path, files: tuple[str, ...] = _FILES) -> str | None:
    """What keeps `path` from being a complete checkpoint, or None. Checks size and checksum of `files`."""
    path = Path(path)
    if not path.is_dir():
        return "there is no such folder"
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        described = {name: (manifest["files"][name]["bytes"], manifest["files"][name]["blake2b"]) for name in _FILES}
        if manifest["format"] != FORMAT:
            return f"it is of format {manifest['format']}, and this version reads format {FORMAT}"
        for name in files:
            size, digest = described[name]
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
        for name in files:
            if _digest(path / name) != described[name][1]:
                return f"{name} does not match its checksum"
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    return None


def read_meta(path: str | Path) -> dict:
    """What a checkpoint was saved with beside its tensors, which stay on disk; empty where it cannot be read."""
    try:
        return json.loads((Path(path) / STATE).read_text())["meta"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def read_checkpoint(path: str | Path) -> tuple[PortableState, dict]:
    """A checkpoint's state and `meta`. Raises UserError unless every byte of it is as it was written."""
    path = Path(path)
    if why := problem(path):
        raise UserError(f"{path} is no complete checkpoint: {why}; name another one, or write resume.checkpoint=auto.")
    rest = json.loads((path / STATE).read_text())
    moments: dict = {}
    for place, tensor in load_file(path / OPTIMIZER).items():
        name, _, key = place.rpartition("/")
        moments.setdefault(name, {})[key] = tensor
    state = PortableState(
        load_file(path / MODEL), rest["optimizer"], moments, rest["scalars"], loss_scaler=rest["loss_scaler"]
    )
    return state, rest["meta"]


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def _serial(path: Path) -> int:
    """The number of this save in the run, from 1; 0 where it cannot be read."""
    try:
        return int(json.loads((path / MANIFEST).read_text())["serial"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _looks_complete(path: Path) -> bool:
    """The cheap part of `problem`."""
    return problem(path, files=()) is None and all((path / name).exists() for name in _FILES)


def _described(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "blake2b": _digest(path)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def sync_to_disk(path: Path) -> None:
    """Returns when the disk itself, and not only the operating system, has the bytes of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
