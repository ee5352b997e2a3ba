"""A run's checkpoints on disk: a checkpoint is there entirely, or not at all.

- Whenever the process, the node or the disk gives up, the checkpoints that were complete stay complete.
- `newest` trusts checksums, never a name: what does not match its manifest is passed over.
- A run begins anew only where no checkpoint was ever written: those that cannot be used are refused, each by name.
- What cannot be read, or is of another format, is never removed: somebody else, or tomorrow's disk, may read it.
- Saving takes a copy of the state and lets training go on; files are written and checked by a thread of each rank, and
  named by rank 0's. One save is under way at a time: the next, a stop and the end wait for it.
- Each of several ranks copies and writes the part of the state that it holds, where all see the folder. Else rank 0
  gathers and writes the whole: the folder need not be visible to other nodes.
- A failure on any rank is told to every rank, so that none waits for ever.
- A job reads each byte of a checkpoint once, to check it: every rank that sees the folder reads its share of the files.
- Files are safetensors and JSON: reading a checkpoint runs no code that it brings along.

    checkpoints/latest                 name of the last one saved, for people
    checkpoints/held                   name of one that retention spares, if any
    checkpoints/step-00001000/         model.safetensors, optimizer.safetensors, state.json, manifest.json
    checkpoints/step-00002000/         or in parts: model-00000-of-00002.safetensors and so on, and pieces.json
"""

import json
import logging
import os
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from prelude.checkpoints.checking import by_all_ranks
from prelude.checkpoints.manifest import STATE, Fault, fault_of, obvious_fault
from prelude.checkpoints.saved import incomplete, open_checkpoint, read_meta, seen_here
from prelude.checkpoints.saving import LostRank, Task, seal, write_parts, write_state
from prelude.checkpoints.shelf import Shelf, name_of
from prelude.checkpoints.state.parts import Part, part_of
from prelude.checkpoints.state.portable import PortableState, gather_state
from prelude.checkpoints.state.restoring import restore_state
from prelude.data.errors import RunStopped, UserError
from prelude.pretrain import attendance, distributed
from prelude.pretrain.files import Tolerant, reason
from prelude.pretrain.recipes import read_recipe

_PATIENCE_WITH_OTHERS = 60.0  # seconds that a run which ends by an error gives other ranks to write their parts

log = logging.getLogger(__name__)


class Store:
    """The checkpoints in `folder`, of which the `keep` that were saved last are kept, and the one that is held."""

    def __init__(self, folder: str | Path, keep: int = 3):
        self.folder, self.keep = Path(folder), keep
        self.checked: Path | None = None  # what `newest` has read to the last byte
        self.under_way = ""  # name of the checkpoint that is being saved
        self.writing: Task | None = None  # on rank 0, and on all where each writes its part
        self.ranks: distributed.Aside | None = None  # once they write parts
        self.common = True  # whether all ranks are known, or hoped, to see the folder
        self.shelf, self.pointing = Shelf(self.folder), Tolerant(self.folder / "latest")

    def save(self, step: int, engine, meta: dict) -> None:
        """Takes a copy of the engine's state and begins to write it and `meta` (plain JSON values). Collective.

        Waits for a save that is under way first, and raises as `finish` does.
        """
        json.dumps(meta)  # on every rank: what JSON cannot hold fails on all of them alike
        self.finish()
        self.checked = None  # this save may take its place
        draft = self._common_draft(step) if distributed.world_size() > 1 else None
        if draft:
            part, ranks = part_of(engine), self._ranks_aside()
            self.writing = Task(lambda done: self._try_to_write_part(draft, step, part, meta, ranks, done))
        else:
            state = gather_state(engine)
            if distributed.is_main():
                self.writing = Task(lambda _: self._try_to_write_whole(step, state, meta))
        self.under_way = name_of(step)

    def has_ended(self) -> bool:
        """Whether rank 0 has written, or failed to write, what `finish` would wait for; never on another rank."""
        return distributed.is_main() and self.writing is not None and self.writing.has_ended()

    def finish(self) -> Path | None:
        """Waits for the save that is under way, if any, and returns its folder. Collective.

        Raises RunStopped on every rank when the disk did not take it.
        """
        if not self.under_way:
            return None
        name, self.under_way = self.under_way, ""
        failure = distributed.from_main(self._outcome())
        self.writing = None
        if failure:
            raise RunStopped(failure)
        return self.folder / name

    def _outcome(self) -> str | None:
        """Of this rank's thread, if it has one. Who waits for others here can be told from the one whose disk is waited
        for. All ranks pass the same places, or those that write nothing would seem to be ahead."""
        if self.writing:
            self.writing.own_done.wait()
        with attendance.collective():
            return self.writing.result() if self.writing else None

    def wait(self) -> None:
        """Returns when this rank writes no file any more. For a run that ends by an error: not collective."""
        try:
            if self.writing and (failure := self.writing.result(_PATIENCE_WITH_OTHERS)):
                log.warning(failure)
        except TimeoutError:
            log.warning("The checkpoint under way is lost: other ranks do not say whether they wrote their parts.")

    def _common_draft(self, step: int) -> Path | None:
        """A folder in which all ranks write their parts; None where not all see it, so that rank 0 writes for all.

        Its name is that of this save alone: what another start has left under way cannot meet it, and whoever sees the
        name sees the folder.
        """
        draft, failure = self.shelf.draft_of(step, f"-{secrets.token_hex(4)}"), None
        if distributed.is_main():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.shelf.clean()  # after processes that were killed
                draft.mkdir()
            except OSError as error:
                failure = self._not_saved(step, error)
        name, failure = distributed.from_main((draft.name, failure))
        if failure:
            raise RunStopped(failure)
        draft = self.folder / name
        (seen,) = distributed.total(os.access(draft, os.W_OK | os.X_OK))
        if seen == distributed.world_size():
            return draft
        if distributed.is_main():
            self.shelf.clean()
            if self.common:
                log.warning(f"{seen:.0f} of {distributed.world_size()} ranks can write in {self.folder}, so rank 0 "
                            "gathers the whole state in its memory and writes it.")  # fmt: skip
        self.common = False
        return None

    def _ranks_aside(self) -> distributed.Aside:
        self.ranks = self.ranks or distributed.Aside()
        return self.ranks

    def newest_for_all(self) -> Path | None:
        """As `newest` says it on rank 0, on every rank. Collective: all ranks take part in reading, once."""

        def find(fault_of: Callable[[Path], Fault | None]) -> Path | None:
            return self.newest(lambda path: obvious_fault(path) if path == self.checked else fault_of(path))

        return by_all_ranks(find)

    def newest(self, fault_of: Callable[[Path], Fault | None] = fault_of) -> Path | None:
        """The complete checkpoint that was saved last, or None where none was ever saved. Not collective, and needs no
        process group.

        One saved later that cannot be used is passed over with a warning that says what is wrong with it. Raises
        UserError where there are checkpoints and none can be used.
        """
        try:
            passed_over = []
            for path in self.shelf.by_age():
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

    def load(self, path: str | Path, engine, accept: Callable[[dict], None] = lambda meta: None) -> dict:
        """Puts a checkpoint into the engine on every rank, whatever its stage and world size. Collective.

        accept: is told the `meta` that it was saved with, on every rank and before the tensors are looked at, and
        refuses it on all ranks alike by a UserError: a setting says more than the tensors that follow from it. Returns
        the `meta`. Raises UserError on every rank, before the engine is changed, when there is no complete checkpoint
        at `path` or it does not fit the engine.
        """
        saved, answer, fault = None, None, None
        if not distributed.from_main(Path(path) == self.checked):
            fault = by_all_ranks(lambda fault_of: fault_of(Path(path)))
        if distributed.is_main():
            try:
                if fault:
                    raise incomplete(path, fault)
                saved = open_checkpoint(path, checksums=False)
                answer = {"meta": saved.meta, "manifest": saved.manifest}
            except UserError as error:
                answer = {"refusal": str(error)}
        answer = distributed.from_main(answer)
        if "refusal" in answer:
            raise UserError(answer["refusal"])
        accept(answer["meta"])
        saved = saved or seen_here(path, answer["manifest"])
        shared = min(distributed.of_all(saved is not None))
        inventory = saved.inventory() if distributed.is_main() else None
        restore_state(engine, path, inventory, saved and saved.tensors, saved and saved.moments, shared)
        return answer["meta"]

    # ---- on rank 0

    def hold(self, step: int) -> Path | None:
        """Spares the newest complete checkpoint of at most `step`, and no other, until `release`: in later starts of
        the run too. Returns it; None, and nothing changes, where there is none."""
        return self.shelf.hold(step)

    def release(self) -> None:
        """Ends what `hold` began."""
        self.shelf.release()

    def _try_to_write_whole(self, step: int, state: PortableState, meta: dict) -> str | None:
        draft = self.shelf.draft_of(step)

        def write() -> dict:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.shelf.clean()  # after processes that were killed
            return write_state(draft, state)

        return self._try_to_write(draft, step, write, _rest(step, state, meta))

    def _try_to_write_part(
        self, draft: Path, step: int, part: Part, meta: dict, ranks: distributed.Aside, done: threading.Event
    ) -> str | None:
        """On every rank; what it returns on rank 0 counts."""
        if ranks.rank == 0:
            write = lambda: write_parts(draft, part, ranks, done)  # noqa: E731
            return self._try_to_write(draft, step, write, _rest(step, part, meta), ranks.world_size)
        try:
            write_parts(draft, part, ranks, done)
        except LostRank as error:
            return self._not_saved(step, error)
        return None

    def _try_to_write(
        self, draft: Path, step: int, write: Callable[[], dict], rest: dict, ranks: int = 0
    ) -> str | None:
        """write: of what is no part of `rest`. ranks: that write parts. Returns why the disk did not take it, in a
        sentence, having cleaned up; None when it did."""
        try:
            seal(draft, write(), rest, self.shelf.next_serial(), ranks)
            self.shelf.put_in_place(draft, step)
        except OSError as error:
            with suppress(OSError):
                self.shelf.clean()
            return self._not_saved(step, error)
        attendance.saved(str(self.folder / name_of(step)))  # told too where another rank dies before `finish`
        # The checkpoint is there. What is left to do is no reason to end the run, and a full disk one to do the rest.
        with self.pointing:
            self.shelf.point("latest", self.folder / name_of(step))
        self.shelf.retire(self.keep)
        return None

    def _not_saved(self, step: int, error: OSError) -> str:
        mend = "look at the other ranks" if isinstance(error, LostRank) else "make room there"
        return (
            f"{name_of(step)} could not be saved in {self.folder} ({error}); {mend} and start the same command again, "
            f"which goes on from {self._where_to_go_on()}."
        )

    def _where_to_go_on(self) -> str:
        try:
            newest = self.newest()
        except UserError:
            return "a checkpoint once one can be read: see what is wrong with them there"
        return newest.name if newest else "the start: no checkpoint is complete"


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


def _rest(step: int, state: PortableState | Part, meta: dict) -> dict:
    """What a checkpoint holds beside tensors."""
    rest = {"step": step, "meta": meta, "optimizer": state.optimizer}
    return rest | {"scalars": state.scalars, "loss_scaler": state.loss_scaler}
