"""The folder that features are written to before they have a name: held while they are, gone afterwards.

What a process that was killed left is removed before the next one begins: no `finally` runs at a kill, nor when a
signal ends an evaluation at once. Evaluations side by side leave each other's alone.
"""

import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prelude.data.errors import UserError, cause_of
from prelude.pretrain import distributed
from prelude.pretrain.run_lock import RunLock

UNFINISHED = ".unfinished-"
_SILENT_SECONDS = 86400  # of one whose holder is on another machine, or not told: an earlier version wrote none


@contextmanager
def unfinished_folder(bank: Path) -> Iterator[Path]:
    """A new folder in a bank, the same on all ranks, which the first one holds. Raises UserError where the bank cannot
    be written."""
    lock = _held(bank) if distributed.is_main() else None
    try:
        yield distributed.from_main(lock.folder if lock else None)
    finally:
        if lock:
            lock.release()  # first: NFS keeps a file that is open, and its folder with it
            shutil.rmtree(lock.folder, ignore_errors=True)


def _held(bank: Path) -> RunLock:
    try:
        bank.mkdir(parents=True, exist_ok=True)
        for folder in bank.glob(f"{UNFINISHED}*"):
            if _is_left_behind(folder):
                shutil.rmtree(folder, ignore_errors=True)
        lock = RunLock(bank / f"{UNFINISHED}{secrets.token_hex(4)}")
        lock.hold()
    except OSError as error:
        raise UserError(f"Features cannot be kept in {bank} ({cause_of(error)}); write --bank DIR.") from None
    return lock


def _is_left_behind(folder: Path) -> bool:
    with suppress(OSError):  # its owner moves and removes what is in it, on another host maybe
        held = RunLock(folder).is_held()
        return _is_silent(folder) if held is None else not held
    return False


def _is_silent(folder: Path) -> bool:
    return time.time() - max(path.stat().st_mtime for path in (folder, *folder.rglob("*"))) > _SILENT_SECONDS
