"""The checkpoints that lie in a folder, and the drafts beside them: their order, which are spared, and what may go.

- Names and serial numbers are all that is trusted here; whether a checkpoint is complete is the manifest's to say.
- What has a checkpoint's name got it by one rename, when it was complete.
- What cannot be read, or is of another format, is never removed: somebody else, or tomorrow's disk, may read it.
"""

import math
import os
import re
import threading
from contextlib import suppress
from pathlib import Path

from prelude.checkpoints.manifest import obvious_fault, read_manifest
from prelude.data.whole_files import remove, sync_to_disk, write_whole
from prelude.pretrain.files import Tolerant

_TEMPORARY = ".tmp-"
_REPLACED = ".replaced"  # a checkpoint that another of the same step has taken, or is taking, the place of
_NAME = re.compile(r"step-(\d{8,})(" + re.escape(_REPLACED) + r"(-\d+)?)?")
_BEYOND = 1_000_000  # more saves than a run makes: what is saved beside unread serial numbers comes after them


class Shelf:
    """The checkpoints in `folder`, and one that is held. For rank 0."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lock = threading.Lock()  # what is held is chosen while a save may be retiring
        self.holding: str | None = None  # as `held` says, or should say, since this process began
        self.sparing, self.retiring = map(Tolerant, (folder / "held", folder))

    def draft_of(self, step: int, mark: str = "") -> Path:
        """Where a checkpoint is written before it has its name. mark: tells this save's from any other's."""
        return self.folder / f"{_TEMPORARY}{name_of(step)}{mark}"

    def put_in_place(self, draft: Path, step: int) -> None:
        place = self.folder / name_of(step)
        if os.path.lexists(place):
            os.rename(place, self._aside(place))  # where `newest` finds it, until the new one is in place
        os.rename(draft, place)
        # The rename is a change of the parent folder, and not on disk before that is.
        sync_to_disk(self.folder)

    def hold(self, step: int) -> Path | None:
        """Spares the newest complete checkpoint of at most `step`, and no other, until `release`: in later starts of
        the run too. Returns it; None, and nothing changes, where there is none."""
        held = None
        with self.lock, self.sparing:
            eligible = (path for path in self.by_age() if step_of(path) <= step and not obvious_fault(path))
            held = next(eligible, None)
            if held and self._held() != held.name:
                self.holding = held.name
                self.point("held", held)
        return held

    def release(self) -> None:
        with self.lock, self.sparing:
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

    def next_serial(self) -> int:
        serials = [_serial(path) for path in self._all()]
        return 1 + max(serials, default=0) + (_BEYOND if 0 in serials else 0)

    def point(self, name: str, place: Path) -> None:
        """Replaced in one operation: whoever reads `latest` sees the old name or the new one, never half of it."""
        write_whole(self.folder / name, place.name + "\n")

    def retire(self, keep: int) -> None:
        """Keeps the `keep` saved last and the held one, and removes all others, damaged ones with them; but nothing
        that might be read elsewhere or another day."""
        with self.lock, self.retiring:
            held, kept = self._held(), 0
            for path in self.by_age():
                if not obvious_fault(path) and _REPLACED not in path.name:
                    kept += 1
                    if kept <= keep:
                        continue
                if path.name != held and _may_go(path):
                    self._remove([path])

    def clean(self) -> None:
        self._remove(self.folder.glob(_TEMPORARY + "*"))

    def _remove(self, paths) -> None:
        """What cannot be removed now is tried again at the next save."""
        for path in list(paths):
            with suppress(OSError):
                if not path.name.startswith(_TEMPORARY):
                    # Renamed first: a removal that is interrupted must not leave half a checkpoint under its name.
                    path = path.rename(path.with_name(_TEMPORARY + path.name))
                remove(path)

    def by_age(self) -> list[Path]:
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
        return [self.folder / name for name in names if is_name(name)]


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def is_name(name: str) -> bool:
    """Whether a checkpoint may be called so."""
    return _NAME.fullmatch(name) is not None


def step_of(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def _serial(path: Path) -> int:
    """The number of this save in the run, from 1; 0 where it cannot be read."""
    try:
        return int(read_manifest(path)["serial"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _may_go(path: Path) -> bool:
    fault = obvious_fault(path)
    return fault is None or fault.lost
