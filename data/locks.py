"""Locks on files, which the kernel lets go of when their holder ends, however it ends."""

import contextlib
import errno
import fcntl
import functools
import logging
import os
import time
from collections.abc import Iterator

from prelude.data.waiting import Wait, moved, while_it_moves

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.05
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def lock(fd: int) -> bool:
    """Whether an open file could be had for this process alone."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(fd: int, path: str) -> bool:
    """Whether an open file still has this path."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def alone(path: str, what: str = "") -> Iterator[bool]:
    """Nobody else is within the same `path`, which is a file as long as somebody is. Progress of who is within is
    progress of those who wait. A file system without locks lets everybody in, which is told once; False, then.

    what: the wait to get in is for; "" where whoever called is waited for already, in a thread of its own. Raises
    OSError where the file cannot be written, and as `Wait.look` does.
    """
    fd, locked = _locked(path, what)
    try:
        with while_it_moves(lambda: os.utime(fd)):
            yield locked
    finally:
        with contextlib.suppress(OSError):
            if is_at(fd, path):
                os.unlink(path)
        os.close(fd)


@functools.cache  # once for a folder
def _warn_unlocked(folder: str) -> None:
    log.warning(
        "%s lies on a file system without locks (flock), so processes may do the same work there side by side; set "
        "PRELUDE_CACHE to a folder on a disk of the node",
        folder,
    )


def _locked(path: str, what: str) -> tuple[int, bool]:
    """The open file, and whether it is locked."""
    before, waiting = 0, Wait(lambda: what)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if lock(fd) and is_at(fd, path):
                return fd, True
        except OSError as error:
            if error.errno in _NO_LOCKS:
                _warn_unlocked(os.path.dirname(path))
                return fd, False
            os.close(fd)
            raise
        now = os.fstat(fd).st_mtime_ns
        os.close(fd)
        if now != before:
            moved()
        before = now
        if what:
            waiting.look()
        time.sleep(_LOOK_SECONDS)
