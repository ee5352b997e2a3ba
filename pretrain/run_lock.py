"""One start at a time in a run folder: two would write over each other's checkpoints and logs.

- `run.lock` names the host and process that holds the folder; it is gone when they are done.
- A holder that was killed, kill -9 and a power cut included, is recognised, and its place taken.
- The lock proper is the operating system's (`fcntl`), which ends with its process and which NFS passes on to other
  hosts. Where it does not reach them, the holder's heartbeat tells: it touches the file every `HEARTBEAT` seconds, and
  a start on another machine that sees no touch for `PATIENCE` seconds takes the holder for dead.
- Where a file system has no locks at all, a holder on the same machine is looked up among the processes.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from prelude.data.errors import UserError

NAME = "run.lock"
HEARTBEAT, PATIENCE = 5.0, 60.0  # seconds
_held: set[tuple[int, int]] = set()  # device and inode of what this process holds
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class RunLock:
    """Of a run folder, which need not exist."""

    def __init__(self, folder: Path, say=None, option: str = "run_dir"):
        self.option = option  # where the folder was named
        self.folder, self.path = Path(folder), Path(folder) / NAME
        self.say = say or (lambda text: None)  # told when holding takes a while
        self.descriptor: int | None = None
        self.ended = threading.Event()

    def hold(self) -> None:
        """Raises UserError, naming holder and host, where another start holds the folder, and OSError where it
        cannot be written. The folder is made if it is not there."""
        self.made = _make_folders(self.folder)
        try:
            while not self._try_to_hold():
                continue
        except (UserError, OSError):
            self._forget_folders()
            raise
        threading.Thread(target=self._beat, daemon=True).start()

    def refuse_held(self) -> None:
        """Raises UserError where `hold` would find a holder that lives. Takes nothing and waits for nothing: one on
        another machine is taken for alive if its last heartbeat is recent."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return
        try:
            holder, touched = _read(descriptor), os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
        if holder and self._may_live(holder, touched):
            raise UserError(self._refusal(holder))

    def is_held(self) -> bool | None:
        """Whether a holder lives, found out without waiting. None where nothing says who holds the folder, or that one
        is of another machine or boot and no heartbeat is recent: their clocks may differ, and locks not reach there."""
        if _identity(self.path) in _held:
            return True
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            holder, touched = _read(descriptor), os.fstat(descriptor).st_mtime
            if not holder:  # maybe one that has not written yet, and must find the lock free
                return None
            locked = _locked(descriptor)
            if locked is False:
                return True
            if holder.get("boot") == _boot():
                return not locked and self._runs(holder)
            return True if self._may_live(holder, touched) else None
        finally:
            os.close(descriptor)

    def release(self) -> None:
        """Leaves the folder as it would be without the lock; what cannot be undone is left to the next start."""
        if self.descriptor is None:
            return
        self.ended.set()
        descriptor, self.descriptor = self.descriptor, None
        with suppress(OSError):
            _held.discard(_identity(descriptor))
            if _same(descriptor, self.path):
                self.path.unlink()
        with suppress(OSError):
            os.close(descriptor)
        self._forget_folders()

    # ---- holding

    def _try_to_hold(self) -> bool:
        """False where the file was taken away meanwhile, and holding it would mean nothing."""
        # The operating system's lock belongs to the process, and ends when any descriptor of the file is closed.
        if _identity(self.path) in _held:
            raise UserError(self._refusal(_myself()))
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            locked = _locked(descriptor)
            holder = _read(descriptor)
            if locked is False or (holder and self._lives(holder, descriptor, locked is True)):
                raise UserError(self._refusal(holder or {}))
            if not _same(descriptor, self.path):
                os.close(descriptor)
                return False
            _write(descriptor, _myself())
        except OSError:
            with suppress(OSError):  # a full disk took the name and not what it says
                if _same(descriptor, self.path):
                    self.path.unlink()
            os.close(descriptor)
            raise
        except UserError:
            os.close(descriptor)
            raise
        self.descriptor = descriptor
        _held.add(_identity(self.path))
        return True

    def _lives(self, holder: dict, descriptor: int, locked: bool) -> bool:
        """Whether a holder lives whose lock did not keep us out."""
        if holder.get("boot") == _boot():
            # Here the lock itself is proof, and where there is none the process is looked up.
            return not locked and self._runs(holder)
        self.say(
            f"{self.folder} was held by {_named(holder)} and not given back; watching for up to {PATIENCE:.0f} s "
            f"whether that still lives"
        )
        seen, until = os.fstat(descriptor).st_mtime_ns, time.monotonic() + PATIENCE
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, HEARTBEAT / 5))
            if not _same(descriptor, self.path):
                return False  # given back
            if os.fstat(descriptor).st_mtime_ns != seen:
                return True
        return False

    def _may_live(self, holder: dict, touched: float) -> bool:
        """By what it wrote and when it last did."""
        return self._runs(holder) if holder.get("boot") == _boot() else time.time() - touched < PATIENCE

    def _runs(self, holder: dict) -> bool:
        return holder.get("started", "") == _started(holder.get("process"))

    def _refusal(self, holder: dict) -> str:
        return (
            f"{self.option}={self.folder} is in use by {_named(holder)}, and this is {_named(_myself())}; wait for "
            f"that start to end, or end it, or write another {self.option}."
        )

    def _beat(self) -> None:
        while not self.ended.wait(HEARTBEAT):
            with suppress(OSError, TypeError):  # TypeError: released between the two
                os.utime(self.descriptor)

    def _forget_folders(self) -> None:
        """A start that was refused leaves no empty folders behind."""
        for folder in reversed(self.made):
            with suppress(OSError):
                folder.rmdir()


def _make_folders(folder: Path) -> list[Path]:
    """Those that had to be made, outermost first."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _locked(descriptor: int) -> bool | None:
    """Whether the operating system gave us the lock; None where the file system has none."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise


def _same(descriptor: int, path: Path) -> bool:
    return _identity(descriptor) == _identity(path)


def _identity(file: int | Path) -> tuple[int, int] | None:
    """Device and inode; None where there is no such file."""
    try:
        found = os.fstat(file) if isinstance(file, int) else file.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _read(descriptor: int) -> dict:
    """What the holder wrote; empty where there is none, or a crash left half of it."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _write(descriptor: int, holder: dict) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
    os.fsync(descriptor)


def _myself() -> dict:
    process = os.getpid()
    return {
        "host": socket.gethostname(),
        "process": process,
        "since": datetime.now().isoformat(" ", "seconds"),
        "boot": _boot(),
        "started": _started(process),
    }


def _named(holder: dict) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('process')} on {holder.get('host')} (since {holder.get('since')})"


def _boot() -> str:
    """The same for all processes of one machine from one boot to the next, whatever it is called."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.is_file() else socket.gethostname()


def _started(process: int | None) -> str | None:
    """When a process of this machine began, in the kernel's ticks: numbers of processes are given again. None where
    there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
