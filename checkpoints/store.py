"""A run's checkpoints on disk: a checkpoint is there entirely, or not at all.

- Whenever the process, the node or the disk gives up, the checkpoints that were complete stay complete.
- `newest` trusts checksums, never a name: what does not match its manifest is passed over.
- A run begins anew only where no checkpoint was ever written: those that cannot be used are refused, each by name.
- What cannot be read, or is of another format, is never removed: somebody else, or tomorrow's disk, may read it.
- Saving takes a copy of the state and lets training go on; files are written, checked and named by a thread of rank 0.
  One save is under way at a time: the next, a stop and the end wait for it.
- A failure on rank 0 is told to every rank, so that none waits for ever.
- Only rank 0 reads and writes files; the folder need not be visible to other nodes.
- Files are safetensors and JSON: reading a checkpoint runs no code that it brings along.

    checkpoints/latest                 name of the last one saved, for people
    checkpoints/held                   name of one that retention spares, if any
    checkpoints/step-00001000/         model.safetensors, optimizer.safetensors, state.json, manifest.json
"""

import json
import logging
import math
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from prelude.checkpoints.manifest import (
    FILES,
    FORMAT,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    described,
    fault_of,
    obvious_fault,
)
from prelude.checkpoints.portable import PortableState, gather_state, scatter_state
from prelude.data.errors import RunStopped, UserError
from prelude.pretrain import distributed
from prelude.pretrain.files import Tolerant, reason, remove, save_file, sync_to_disk, write_whole
from prelude.pretrain.recipes import read_recipe

_TEMPORARY = ".tmp-"
_REPLACED = ".replaced"  # a checkpoint that another of the same step has taken, or is taking, the place of
_NAME = re.compile(r"step-(\d{8,})(" + re.escape(_REPLACED) + r"(-\d+)?)?")
_BEYOND = 1_000_000  # more saves than a run makes: what is saved beside unread serial numbers comes after them

log = logging.getLogger(__name__)


class Task:
    """One call in a thread of its own."""

    def __init__(self, call: Callable[[], str | None]):
        self.future = Future()
        self.thread = threading.Thread(target=self._run, args=(call,), name="checkpoint")
        self.thread.start()

    def has_ended(self) -> bool:
        return self.future.done()

    def result(self) -> str | None:
        """What the call returned, or raised. Waits for it."""
        return self.future.result()

    def _run(self, call) -> None:
        try:
            self.future.set_result(call())
        except BaseException as error:  # it is the caller's
            self.future.set_exception(error)


class Store:
    """The checkpoints in `folder`, of which the `keep` that were saved last are kept, and the one that is held."""

    def __init__(self, folder: str | Path, keep: int = 3):
        self.folder, self.keep = Path(folder), keep
        self.checked: Path | None = None  # what `newest` has read to the last byte
        self.under_way = ""  # name of the checkpoint that is being saved
        self.writing: Task | None = None  # on rank 0
        self.retention = threading.Lock()  # what is held is chosen while a save may be retiring
        self.holding: str | None = None  # as `held` says, or should say, since this process began
        self.pointing, self.sparing, self.retiring = map(
            Tolerant, (self.folder / "latest", self.folder / "held", folder)
        )

    def save(self, step: int, engine, meta: dict) -> None:
        """Takes a copy of the engine's state and begins to write it and `meta` (plain JSON values). Collective.

        Waits for a save that is under way first, and raises as `finish` does.
        """
        json.dumps(meta)  # on every rank: what JSON cannot hold fails on all of them alike
        self.finish()
        state = gather_state(engine)
        self.under_way = _name(step)
        if distributed.is_main():
            self.writing = Task(lambda: self._try_to_write(step, state, meta))

    def has_ended(self) -> bool:
        """Whether rank 0 has written, or failed to write, what `finish` would wait for; never on another rank."""
        return self.writing is not None and self.writing.has_ended()

    def finish(self) -> Path | None:
        """Waits for the save that is under way, if any, and returns its folder. Collective.

        Raises RunStopped on every rank when the disk did not take it.
        """
        if not self.under_way:
            return None
        name, self.under_way = self.under_way, ""
        failure = distributed.from_main(self.writing.result() if distributed.is_main() else None)
        self.writing = None
        if failure:
            raise RunStopped(failure)
        return self.folder / name

    def wait(self) -> None:
        """Returns when no file is being written any more. For a run that ends by an error: not collective."""
        if self.writing and (failure := self.writing.result()):
            log.warning(failure)

    def newest(self) -> Path | None:
        """The complete checkpoint that was saved last, or None where none was ever saved. Not collective, and needs no
        process group.

        One saved later that cannot be used is passed over with a warning that says what is wrong with it. Raises
        UserError where there are checkpoints and none can be used.
        """
        try:
            passed_over = []
            for path in self._by_age():
                if fault := fault_of(path):
                    passed_over.append((path, fault.why))
                    continue
                for other, why in passed_over:
                    log.warning(f"Checkpoint {other} is passed over: {why}.")
                self.checked = path
                return path
            named = (self.folder / "latest").read_text(errors="replace").strip() if not passed_over else ""
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be read ({reason(error)}), so nobody knows which checkpoints are there; make it "
                f"readable, or write another run folder."
            ) from None
        listed = "; ".join(f"{path.name}: {why}" for path, why in passed_over) or f"{named or 'latest'}: it is gone"
        raise UserError(
            f"{self.folder} has checkpoints and none can be used ({listed}); make one readable to this version and "
            f"this user, or write another run folder. To begin anew there, move {self.folder} away."
        )

    def meta(self, path: str | Path) -> dict:
        """What a checkpoint was saved with; its tensors stay on disk. Not collective."""
        return read_meta(path)

    def load(self, path: str | Path, engine) -> dict:
        """Puts a checkpoint into the engine on every rank, whatever its stage and world size. Collective.

        Returns the `meta` it was saved with. Raises UserError on every rank, before anything is changed, when
        there is no complete checkpoint at `path` or it does not fit the engine.
        """
        state, answer = None, None
        if distributed.is_main():
            try:
                state, meta = read_checkpoint(path, checksums=Path(path) != self.checked)
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
        held = None
        with self.retention, self.sparing:
            eligible = (path for path in self._by_age() if _step(path) <= step and not obvious_fault(path))
            held = next(eligible, None)
            if held and self._held() != held.name:
                self.holding = held.name
                self._point("held", held)
        return held

    def release(self) -> None:
        with self.retention, self.sparing:
            self.holding = ""
            (self.folder / "held").unlink(missing_ok=True)

    def _held(self) -> str:
        """The name of the checkpoint that is spared, or nothing."""
        if self.holding is not None:
            return self.holding
        try:
            return (self.folder / "held").read_text(errors="replace").strip()
        except OSError:
            return ""

    def _try_to_write(self, step: int, state: PortableState, meta: dict) -> str | None:
        """Returns why the disk did not take it, in a sentence, having cleaned up; None when it did."""
        try:
            self._clean()  # after processes that were killed
            self._write(step, state, meta)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                self._clean()
            return (
                f"{_name(step)} could not be saved in {self.folder} ({error}); make room there and start the same "
                f"command again, which goes on from {self._where_to_go_on()}."
            )
        # The checkpoint is there. What is left to do is no reason to end the run, and a full disk one to do the rest.
        with self.pointing:
            self._point("latest", self.folder / _name(step))
        with self.retention, self.retiring:
            self._retire()
        return None

    def _where_to_go_on(self) -> str:
        try:
            newest = self.newest()
        except UserError:
            return "a checkpoint once one can be read: see what is wrong with them there"
        return newest.name if newest else "the start: no checkpoint is complete"

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
        files = {name: described(draft / name) for name in FILES}
        # The manifest vouches for the other files, so their bytes reach the disk before it exists: after a power
        # cut a file system may have kept the later of two writes and lost the earlier.
        for name in FILES:
            sync_to_disk(draft / name)
        manifest = {"format": FORMAT, "serial": self._next_serial(), "files": files}
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=1))
        sync_to_disk(draft / MANIFEST)
        # The folder's list of names is data of its own: without this, synced files may be missing from it.
        sync_to_disk(draft)
        if os.path.lexists(place):
            os.rename(place, self._aside(place))  # where `newest` finds it, until the new one is in place
        os.rename(draft, place)
        # The rename is a change of the parent folder, and not on disk before that is.
        sync_to_disk(self.folder)

    def _aside(self, place: Path) -> Path:
        """A name for what is replaced: free, and not that of something that must not be lost."""
        aside, number = place.with_name(place.name + _REPLACED), 1
        while os.path.lexists(aside):
            if _may_go(aside):
                self._remove([aside])
            else:
                number += 1
                aside = place.with_name(f"{place.name}{_REPLACED}-{number}")
        return aside

    def _next_serial(self) -> int:
        serials = [_serial(path) for path in self._all()]
        return 1 + max(serials, default=0) + (_BEYOND if 0 in serials else 0)

    def _point(self, name: str, place: Path) -> None:
        """Replaced in one operation: whoever reads `latest` sees the old name or the new one, never half of it."""
        write_whole(self.folder / name, place.name + "\n")

    def _retire(self) -> None:
        """Keeps the `keep` saved last and the held one, and removes all others, damaged ones with them; but nothing
        that might be read elsewhere or another day."""
        held, kept = self._held(), 0
        for path in self._by_age():
            if not obvious_fault(path) and _REPLACED not in path.name:
                kept += 1
                if kept <= self.keep:
                    continue
            if path.name != held and _may_go(path):
                self._remove([path])

    def _clean(self) -> None:
        self._remove(self.folder.glob(_TEMPORARY + "*"))

    def _remove(self, paths) -> None:
        """What cannot be removed now is tried again at the next save."""
        for path in list(paths):
            with suppress(OSError):
                if not path.name.startswith(_TEMPORARY):
                    # Renamed first: a removal that is interrupted must not leave half a checkpoint under its name.
                    path = path.rename(path.with_name(_TEMPORARY + path.name))
                remove(path)

    def _by_age(self) -> list[Path]:
        """Saved last first. Steps do not tell: a run may have gone back to an earlier step and on from there.

        One whose age cannot be read comes first, so that `newest` names it instead of keeping silent.
        """
        return sorted(self._all(), key=lambda path: (_serial(path) or math.inf, path.name), reverse=True)

    def _all(self) -> list[Path]:
        """Whatever has the name of a checkpoint. Raises OSError where nobody can say: an empty answer would be one."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        return [self.folder / name for name in names if _NAME.fullmatch(name)]


def read_meta(path: str | Path) -> dict:
    """What a checkpoint was saved with beside its tensors, which stay on disk; empty where it cannot be read."""
    try:
        return json.loads((Path(path) / STATE).read_text())["meta"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def refuse_incomplete(path: Path, *, checksums: bool = True) -> None:
    """Raises UserError unless it is a complete checkpoint."""
    if fault := fault_of(path, checksums=checksums):
        raise UserError(
            f"{path} is no complete checkpoint: {fault.why}; name another one, or write resume.checkpoint=auto."
        )


def read_checkpoint(path: str | Path, *, checksums: bool = True) -> tuple[PortableState, dict]:
    """A checkpoint's state and `meta`. Raises UserError unless every byte of it is as it was written; checksums: False
    where that has just been seen."""
    path = Path(path)
    refuse_incomplete(path, checksums=checksums)
    try:
        rest = json.loads((path / STATE).read_text())
        tensors, moments = load_file(path / MODEL), {}
        for place, tensor in load_file(path / OPTIMIZER).items():
            name, _, key = place.rpartition("/")
            moments.setdefault(name, {})[key] = tensor
        state = PortableState(tensors, rest["optimizer"], moments, rest["scalars"], loss_scaler=rest["loss_scaler"])
        return state, rest["meta"]
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read any more ({error}); see to the disk, and start again.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path / STATE} is not what this version writes ({type(error).__name__}: {error}); write another run_dir, "
            "and resume.checkpoint=PATH of another checkpoint."
        ) from None


def recorded_config(run: str | Path) -> dict:
    """The settings of a run, as in its config.yaml; where that is lost or damaged, as in its newest checkpoint. Empty
    where there is neither."""
    path = Path(run) / "config.yaml"
    with suppress(OSError, ValueError, UserError):
        return read_recipe(path)
    try:
        newest = Store(Path(run) / "checkpoints").newest()
    except UserError:
        return {}
    if newest is None:
        return {}
    log.warning(f"{path} cannot be read; the settings are taken from {newest.name}.")
    return json.loads((newest / STATE).read_text())["meta"].get("config", {})


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


def _may_go(path: Path) -> bool:
    fault = obvious_fault(path)
    return fault is None or fault.lost
