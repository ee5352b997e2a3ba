"""Whole files that were brought here from elsewhere, in a folder of bounded size that all processes of a node share.

- One process at a time brings a file: it holds a lock on the file that is being written, which the kernel lets go of
  when the process ends, however it ends. What it leaves is written over, and read by nobody.
- A file has its name only when it is whole: its size and checksum were compared, and it is on the disk.
- A file whose size, times of change or place on the disk are not those that were noted is hashed before it is read;
  a damaged one is brought again.
- Before a file is brought, the ones that were used longest ago make room for it. Reading holds no file open, so that
  what is removed takes no room. What else lies in the folder is neither counted nor removed.
- Progress of whoever brings a file is progress of those who wait for it.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from prelude.data.checksums import Digests
from prelude.data.errors import RunStopped, UserError, cause_of
from prelude.data.host import own_fault
from prelude.data.locks import is_at, lock
from prelude.data.waiting import moved
from prelude.data.whole_files import own_draft, write_whole

log = logging.getLogger(__name__)

GIB = 2**30
_LOOK_SECONDS = 0.05
_TOUCH_SECONDS = 1.0
_FULL = (errno.ENOSPC, errno.EDQUOT)
_OWN = re.compile(r"[0-9a-f]{32}\.(tar|partial)")


class Writer:
    """The file that is being brought. `at`: how many bytes have come."""

    def __init__(self, fd: int, size: int, make_room: Callable[[], bool], folder: str):
        self.fd, self.size, self.make_room, self.folder = fd, size, make_room, folder
        self.begin_again(())

    def write(self, chunk: bytes) -> None:
        """Raises RunStopped where the disk takes no more."""
        left, last_try = memoryview(chunk), False
        while left:
            try:
                written = os.pwrite(self.fd, left, self.at)
            except OSError as error:
                if error.errno not in _FULL or last_try:
                    raise _unwritable(self.folder, error) from None
                last_try = not self.make_room()  # where another process has just removed all that there was
                continue
            last_try = False
            self.digests.update(left[:written])
            self.at, left = self.at + written, left[written:]

    def begin_again(self, kinds: tuple[str, ...]) -> None:
        """From the first byte. kinds: of checksums to compute, see `Digests`."""
        self.at, self.digests = 0, Digests(kinds)


class NodeCache:
    """Files in `folder`, at most `limit` bytes together. Safe between threads and processes. A name is 32 hexadecimal
    digits, which tell it from names that people give."""

    def __init__(self, folder: str, limit: int):
        self.folder, self.limit = folder, limit
        self.sound: dict[str, list[int]] = {}  # by name: what was seen to be whole in this process
        self.touched: dict[str, float] = {}

    def check(self) -> None:
        """Raises UserError where the folder cannot be written or locked."""
        trial = os.path.join(self.folder, f"trial.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            os.makedirs(self.folder, exist_ok=True)
            with self._alone():
                pass
            try:
                with open(trial, "wb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(trial)
        except OSError as error:
            if error.errno in _FULL:
                raise _unwritable(self.folder, error) from None
            own_fault(error)
            raise UserError(
                f"data.cache_dir={self.folder} cannot be written or locked ({cause_of(error)}), and remote "
                f"shards are kept there; write a folder on a disk of this node."
            ) from None

    def has(self, name: str) -> bool:
        return os.path.exists(self._path(name))

    def open(self, name: str, size: int, bring: Callable[[Writer], None]) -> int:
        """A descriptor of the whole file `name`, to be read at once and closed. `bring` writes what is not there.

        Raises what `bring` does, and RunStopped where the disk takes no more.
        """
        while True:
            fd = self._open_sound(name)
            if fd is None:
                fd = self._brought(name, size, bring, wait=True)
            if fd is not None:
                self.touch(name)
                return fd

    def bring_ahead(self, name: str, size: int, bring: Callable[[Writer], None]) -> bool:
        """Brings a file that will be needed, unless somebody else does so already. False: there is no room now."""
        fd = self._brought(name, size, bring, wait=False)
        if fd is None:
            return self._is_being_brought(name) or self.has(name)
        os.close(fd)
        return True

    def touch(self, name: str) -> None:
        """Notes that a file is used, or about to be."""
        now = time.monotonic()
        if now - self.touched.get(name, -_TOUCH_SECONDS) >= _TOUCH_SECONDS:
            self.touched[name] = now
            with contextlib.suppress(OSError):  # it may have just been removed
                os.utime(self._record(name))

    # ---- one file

    def _open_sound(self, name: str) -> int | None:
        try:
            fd = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        seen = _identity(fd)
        if self.sound.get(name) == seen or self._noted(name).get("seen") == seen:
            self.sound[name] = seen
            return fd
        os.close(fd)
        return None

    def _brought(self, name: str, size: int, bring, wait: bool) -> int | None:
        """None: somebody else was at it, or there is no room."""
        with self._locked(name) as fd:
            if fd is None:
                if wait:
                    self._wait_for_progress(name)
                return None
            with self._alone():  # whoever gives a file its name also notes it
                kept = self._open_sound(name)
            if kept is None:
                kept = self._verified(name)
            if kept is not None:
                return kept
            if not self._make_room(size, fd):
                if wait:
                    time.sleep(_LOOK_SECONDS)
                return None
            written = Writer(fd, size, self._evict_one, self.folder)
            bring(written)
            return self._keep(name, fd, written)

    def _keep(self, name: str, fd: int, written: Writer) -> int:
        """Gives the file its name; returns a descriptor of its own."""
        try:
            os.ftruncate(fd, written.size)
            os.fsync(fd)
            readable = os.open(
                self._partial(name), os.O_RDONLY | os.O_CLOEXEC
            )  # it may be removed once it has its name
            with self._alone():
                os.replace(self._partial(name), self._path(name))
                self._note(name, fd, written.digests.hexadecimal())
            return readable
        except OSError as error:
            raise _unwritable(self.folder, error) from None

    def _verified(self, name: str) -> int | None:
        """A descriptor of a file that is there and is not as noted, if its bytes still are."""
        try:
            fd = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        noted = self._noted(name).get("digests") or {}
        if noted and Digests(tuple(noted)).of_file(fd, moved) == noted:
            self._note(name, fd, noted)
            return fd
        os.close(fd)
        log.warning("%s is damaged, and is fetched again", self._path(name))
        self._remove(name)
        return None

    def _note(self, name: str, fd: int, digests: dict[str, str]) -> None:
        self.sound[name] = _identity(fd)
        record = Path(self._record(name))
        write_whole(record, json.dumps({"seen": self.sound[name], "digests": digests}), own_draft(record), synced=False)

    def _noted(self, name: str) -> dict:
        try:
            with open(self._record(name)) as file:
                noted = json.load(file)
        except (OSError, ValueError):
            return {}
        return noted if isinstance(noted, dict) else {}

    def _remove(self, name: str) -> None:
        for path in (self._path(name), self._record(name)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    # ---- locks

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[int | None]:
        """The file to write into, locked; None where another holds it. It is removed unless it gets its name."""
        path = self._partial(name)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not lock(fd) or not is_at(fd, path):  # another has it, or has just given it its name
                yield None
                return
            try:
                yield fd
            finally:
                if is_at(fd, path):
                    os.unlink(path)
        finally:
            os.close(fd)

    def _is_being_brought(self, name: str) -> bool:
        return os.path.exists(self._partial(name))

    def _wait_for_progress(self, name: str) -> None:
        before = _changed(self._partial(name))
        time.sleep(_LOOK_SECONDS)
        if _changed(self._partial(name)) != before:
            moved()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else counts, names or removes files meanwhile; it is held for milliseconds."""
        fd = os.open(os.path.join(self.folder, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            while not lock(fd):
                time.sleep(_LOOK_SECONDS / 10)
            yield
        finally:
            os.close(fd)

    # ---- room

    def _make_room(self, size: int, fd: int) -> bool:
        """Reserves `size` bytes for the open file; False where what others are bringing leaves too little."""
        with self._alone():
            os.ftruncate(fd, 0)
            files = self._files()
            free = self.limit - sum(files.values())
            for name in self._by_use():
                if free >= size:
                    break
                free += files.get(self._path(name), 0)
                self._remove(name)
            if free < size:
                return False
            os.ftruncate(fd, size)
            return True

    def _evict_one(self) -> bool:
        """For a disk that is smaller than the limit."""
        with self._alone():
            for name in self._by_use()[:1]:
                self._remove(name)
                _warn_full(self.folder)
                return True
        return False

    def _files(self) -> dict[str, int]:
        """Bytes of everything of the cache that takes room, by path. What a killed process has left is removed."""
        found = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if not _OWN.fullmatch(entry.name) or entry.name.endswith(".partial") and _is_left(entry.path):
                        continue
                    found[entry.path] = entry.stat().st_size
        return found

    def _by_use(self) -> list[str]:
        """Names of whole files, those used longest ago first. A time that has not come yet, of a clock that was wrong,
        says nothing."""
        now, used = time.time() + 60, []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if _OWN.fullmatch(entry.name) and entry.name.endswith(".tar"):
                    name = entry.name.removesuffix(".tar")
                    with contextlib.suppress(FileNotFoundError):
                        when = _changed(self._record(name)) or entry.stat().st_mtime_ns
                        used.append((when if when / 1e9 <= now else 0, name))
        return [name for _, name in sorted(used)]

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, f"{name}.tar")

    def _record(self, name: str) -> str:
        return os.path.join(self.folder, f"{name}.json")

    def _partial(self, name: str) -> str:
        return os.path.join(self.folder, f"{name}.partial")


def _is_left(path: str) -> bool:
    """Removes a file that nobody is writing; whether it did."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if not lock(fd) or not is_at(fd, path):
            return False
        os.unlink(path)
        return True
    finally:
        os.close(fd)


def _identity(fd: int) -> list[int]:
    """Of a file on this disk: a write changes one of the times, and a copy the number."""
    status = os.fstat(fd)
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _changed(path: str) -> int | None:
    try:
        return os.stat(path).st_mtime_ns
    except FileNotFoundError:
        return None


_told_full: set[str] = set()


def _warn_full(folder: str) -> None:
    if folder not in _told_full:
        _told_full.add(folder)
        log.warning("the disk of data.cache_dir=%s is full below data.cache_gib; older shards make room", folder)


def _unwritable(folder: str, error: OSError) -> RunStopped:
    own_fault(error)
    return RunStopped(
        f"A remote shard cannot be kept in data.cache_dir={folder} ({cause_of(error)}); make room there, or "
        f"write a folder on another disk."
    )
