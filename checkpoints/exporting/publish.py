"""A folder that appears whole: written beside its place, it takes it in one operation.

Where the file system cannot exchange two folders (NFS), a kill between two renames leaves the earlier export aside, and
the next export brings it back first.
"""

import ctypes
import glob
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import get_args

from safetensors import SafetensorError

from prelude.checkpoints.exporting.formats import FILES, Format
from prelude.checkpoints.sources import export_section, is_export
from prelude.data.errors import UserError
from prelude.data.whole_files import remove, sync_to_disk

_DRAFT = f".tmp-{socket.gethostname()}-"
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)


@contextmanager
def published(to: Path) -> Iterator[Path]:
    """A draft to write into, which takes the place of `to` unless an error comes. Every process has a draft of its own.

    Raises UserError where `to` holds anything but an export of ours, or its folders by format, and where the disk
    refuses.
    """
    refuse_to_overwrite(to)
    draft = _beside(to, f"{_DRAFT}{os.getpid()}-")
    try:
        if not os.path.lexists(to) and _aside(to).is_dir():
            os.rename(_aside(to), to)  # a kill came between two renames
        _clear_left_behind(to)
        draft.mkdir(parents=True)
        yield draft
        _publish(draft, to)
    except (OSError, SafetensorError) as error:
        raise UserError(f"The export cannot be written to {to} ({error}); make room there or name another.") from error
    finally:
        with suppress(OSError):
            remove(draft)


def _clear_left_behind(to: Path) -> None:
    """Drafts of this host's processes that are gone."""
    for path in to.absolute().parent.glob(f"{_DRAFT}*-{glob.escape(to.absolute().name)}"):
        number = path.name.removeprefix(_DRAFT).split("-")[0]
        if number.isdecimal() and not Path(f"/proc/{number}").exists():
            with suppress(OSError):
                remove(path)


def refuse_to_overwrite(to: Path) -> None:
    if not to.exists():
        return
    if is_export(to):
        folders = [to]
    else:
        folders = list(to.iterdir()) if to.is_dir() else []
        parts = {path.name: export_section(path) for path in folders}
        of_formats = to.is_dir() and parts.keys() <= set(get_args(Format)) and None not in parts.values()
        if not of_formats or len({part.get("fingerprint") for part in parts.values()}) > 1:
            raise UserError(f"{to} exists and is no earlier export; name a new folder, or empty this one first.")
    others = sorted(str(path) for folder in folders for path in folder.iterdir() if path.name not in FILES)
    if others:
        raise UserError(
            f"{others[0]} is no file of an export, and would be lost with the earlier one in {to}; move it away "
            "first, or name another folder."
        )


def _publish(draft: Path, to: Path) -> None:
    for path in (*draft.rglob("*"), draft):
        sync_to_disk(path)  # or a power cut could leave the new names with nothing behind them
    if not os.path.lexists(to):
        os.rename(draft, to)
    elif not _exchanged(draft, to):
        _replace_in_two_steps(draft, to)
    sync_to_disk(draft.parent)


def _exchanged(draft: Path, to: Path) -> bool:
    """Lets two folders take each other's place in one operation; false where the system or file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    return libc.renameat2(_HERE, os.fsencode(draft), _HERE, os.fsencode(to), _EXCHANGE) == 0


def _replace_in_two_steps(draft: Path, to: Path) -> None:
    aside = _aside(to)
    remove(aside)
    os.rename(to, aside)
    try:
        os.rename(draft, to)
    except OSError:
        os.rename(aside, to)
        raise
    with suppress(OSError):
        remove(aside)


def _aside(to: Path) -> Path:
    return _beside(to, ".tmp-earlier-")


def _beside(to: Path, prefix: str) -> Path:
    return to.absolute().parent / f"{prefix}{to.absolute().name}"
