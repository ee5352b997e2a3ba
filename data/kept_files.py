"""The folder of what is kept about data sets: their indexes, and what was computed of them once on a node.

Files are written to the side and renamed, and what is damaged is made anew. Where nothing can be kept, that is told
once, and each process computes for itself.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prelude.data.errors import cause_of
from prelude.data.host import cache_folder
from prelude.data.locks import alone
from prelude.data.places import Mapped, Places, write_images
from prelude.data.whole_files import own_draft, write_whole

log = logging.getLogger(__name__)

CACHE_VERSION = 4
_SILENT_SECONDS = 86400  # after which nobody is writing a draft any more


def folder() -> Path:
    return cache_folder() / "index"


def keep(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content, own_draft(path), synced=False)


def remove_left_drafts() -> None:
    """Those of processes that were killed: every draft has a name of its own, and nobody would write over it."""
    for pattern in ("*.tmp", ".tmp-*", "shards/.tmp-*"):  # of `places`, and of `own_draft`
        for path in folder().glob(pattern):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _SILENT_SECONDS:
                    path.unlink()


def hash_of(content) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


@functools.cache  # once for a folder
def warn_unkept(place: str, reason: str) -> None:
    log.warning("indexes of shards are not kept, because %s cannot be written: %s", place, reason)


def remembered(identity: str, what: str, compute: Callable[[], str], words: str) -> str:
    """`compute()`, a hash over all of an index; `what` says over which part. Computed once on a node; each time if
    the identity is "". words: those who wait for another process to compute it wait for. Raises as `Wait.look` does."""
    if not identity:
        return compute()
    of = hash_of([CACHE_VERSION, identity, what])
    path = folder() / f"{of}.hash"
    if known := _signed(path, of):
        return known
    try:
        with alone(f"{path}.lock", words):
            found = _signed(path, of) or compute()
            keep(path, f"{found} {hash_of([of, found])}".encode())
            return found
    except OSError as error:
        warn_unkept(str(folder()), cause_of(error))
        return compute()


class Computed(NamedTuple):
    table: np.ndarray  # (N, 2) whole numbers of 0 or more
    about: Any  # JSON
    lasting: bool = True  # False where a read failed, which may not at the next start: it is not kept


def kept_numbers(
    identity: str, what: str, compute: Callable[[], Computed], words: str
) -> tuple[Places | np.ndarray, Any]:
    """As `remembered`, a table, which is mapped, and what is said of it."""
    if not identity:
        return compute()[:2]
    path = str(folder() / f"{identity.partition(' ')[0]}.{hash_of([CACHE_VERSION, identity, what])}.numbers")
    try:
        if (table := _mapped(path)) is None:
            with alone(f"{path}.lock", words):
                if (table := _mapped(path)) is None:
                    remove_left_drafts()
                    computed = compute()
                    if not computed.lasting:
                        return computed[:2]
                    write_images(path, lambda: [computed.table], lambda: computed.about)
                    table = Mapped(path)
        return table, table.about
    except OSError as error:
        warn_unkept(str(folder()), cause_of(error))
        return compute()[:2]


def _mapped(path: str) -> Mapped | None:
    """None where it is not there yet, or spoilt."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        table = Mapped(path)
        mark_used(path)
        return table


def mark_used(path: str) -> None:
    """The time of change stays: whoever has the file open looks at that, and reads all of it again where it moved."""
    with contextlib.suppress(OSError):
        os.utime(path, ns=(time.time_ns(), os.stat(path).st_mtime_ns))


def used_at(path: Path) -> float:
    """Seconds since the epoch."""
    status = path.stat()
    return max(status.st_atime, status.st_mtime)


def _signed(path: Path, of: str) -> str:
    """What a file says with its own checksum; "" where there is none, or it is spoilt."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found, _, checksum = path.read_text(encoding="ascii").partition(" ")
        if checksum == hash_of([of, found]):
            return found
    return ""
