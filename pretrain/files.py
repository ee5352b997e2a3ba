"""Writing into a run folder: a file is there whole or as it was (`data.whole_files`), and is no reason to end a run.

- What grows gets whole lines or none. What the disk does not take is kept in memory and tried again with what follows.
- Nothing is written through a symbolic link: a link in a file's place is replaced by a file, its target left alone.
"""

import errno
import json
import logging
import os
import stat
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from prelude.data.errors import UserError, cause_of
from prelude.data.whole_files import OURS_ALONE, remove, sync_to_disk, write_whole

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


def save_file(tensors: "dict[str, Tensor]", path: Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors' own, whose files only their owner may read, with the permissions that `open` gives a new file.

    Tensors that share memory, which it refuses, are written one by one.
    """
    import safetensors.torch  # here, so that who writes no tensors starts without torch

    remove(path)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | OURS_ALONE, 0o666))
    permissions = stat.S_IMODE(path.stat().st_mode)
    places = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    alone = {n: t if places[t.untyped_storage().data_ptr()] == 1 else t.clone() for n, t in tensors.items()}
    safetensors.torch.save_file(alone, path, metadata)
    path.chmod(permissions)


def make_folder(path: Path) -> None:
    """Makes `path` unless it is there. Raises OSError for a symbolic link: what is written would land elsewhere."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    path.mkdir(exist_ok=True)


def refuse_unwritable(folder: Path) -> None:
    """Before hours of work for what --out could not take then. Raises UserError."""
    place = folder.absolute()
    there = next(known for known in (place, *place.parents) if os.path.lexists(known))
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError:
        raise UserError(f"--out {folder} is no folder that can be written; choose another.") from None


def refuse_to_overwrite(path: str | Path, option: str) -> None:
    """Raises UserError where something is in the place of a file to be written, or its folder takes none."""
    path = Path(path)
    if os.path.lexists(path):
        raise UserError(f"{path} exists; remove it, or write another {option}.")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(
            f"{path} cannot be written, as there is no folder {folder}; make it, or write another {option}."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written, as {folder} is not writable; write another {option}.")


def refuse_no_png(path: str, option: str) -> None:
    """The same of a picture to be written, which has to be a PNG."""
    if not path.lower().endswith(".png"):
        raise UserError(f"{option} {path} does not end in .png; write {os.path.splitext(path)[0]}.png.")
    refuse_to_overwrite(path, option)


def reason(error: OSError) -> str:
    """Why the disk did not take it, in a few words."""
    if error.errno == errno.ELOOP:
        return "it is a symbolic link, and nothing is written through one"
    return cause_of(error)


def remedy(error: OSError, otherwise: str) -> str:
    """What to do about a place that cannot be written: a full disk is not left for another place, least of all by a run
    that lies there."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "free space there, and start the same command again" if full else otherwise


class Tolerant:
    """`with Tolerant(name):` an OSError inside is told, and not raised; further ones are silent until it works again.

    name: what could not be written.
    """

    def __init__(self, name: Path | str):
        self.name, self.failing = name, False

    def __enter__(self) -> "Tolerant":
        return self

    def __exit__(self, kind, error, traceback) -> bool:
        if not isinstance(error, OSError):
            self.failing = self.failing and error is not None
            return False
        if not self.failing:
            self.failing = True
            log.warning("%s cannot be written (%s); the run goes on without", self.name, reason(error))
        return True


class Growing:
    """A file that grows by whole pieces. Never raises OSError: what could not be written waits for the next piece."""

    def __init__(self, path: Path):
        self.path, self.waiting, self.tolerant = Path(path), [], Tolerant(path)

    def append(self, piece: bytes, keep: bool = True) -> None:
        """keep: whether a piece that the disk does not take is worth the memory until it does."""
        self.waiting.append(piece)
        self._try()
        if self.waiting and not keep:
            self.waiting.pop()

    def sync(self) -> None:
        """Brings what was written, and the file's name, to the disk."""
        self._try()
        with suppress(OSError) if self.waiting else self.tolerant:  # one failure is told once
            if self.path.exists():
                sync_to_disk(self.path)
                sync_to_disk(self.path.parent)

    def _try(self) -> None:
        if self.waiting:
            with self.tolerant:
                self._write(b"".join(self.waiting))
                self.waiting = []

    def _write(self, content: bytes) -> None:
        descriptor = _open_to_append(self.path)
        try:
            before = os.fstat(descriptor).st_size
            try:
                while content:
                    content = content[os.write(descriptor, content) :]
            except OSError:
                os.ftruncate(descriptor, before)  # a full disk takes half a line
                raise
        finally:
            os.close(descriptor)


class Lines(Growing):
    """JSON objects, one a line, each with the `step` that it belongs to."""

    def start(self, step: int) -> None:
        """Leaves out what comes after `step`: a run that goes on from there writes it again."""
        with self.tolerant:
            if not os.path.lexists(self.path):
                return
            if self.path.exists() and not self.path.is_file():
                raise OSError(errno.EINVAL, "no regular file", str(self.path))
            content = self.path.read_bytes()
            lines = content.splitlines(keepends=True)
            steps = [_step_of(line) for line in lines]
            if damaged := sum(found is None and line.endswith(b"\n") for found, line in zip(steps, lines, strict=True)):
                log.warning("%s: %d damaged lines are left out", self.path, damaged)
            kept = [line for found, line in zip(steps, lines, strict=True) if found is not None and found <= step]
            text = b"".join(line if line.endswith(b"\n") else line + b"\n" for line in kept)
            if text != content or self.path.is_symlink():
                write_whole(self.path, text)

    def recount(self, step: int, batch: int, batch_now: int) -> None:
        """Tells the steps up to `step`, of `batch` samples each, in steps of `batch_now`; leaves out what comes after.

        The lines as they were stay beside the file, and are what is counted anew: a start may end before its first
        checkpoint, and be given again with this batch, another one, or that of before.
        """
        with self.tolerant:
            kept = self.path.with_name(f"{self.path.stem}-before-{step:08d}-of-{batch}{self.path.suffix}")
            if not kept.is_file():
                if batch == batch_now:
                    return
                write_whole(kept, self.path.read_bytes() if self.path.is_file() else b"")
            if self.path.is_file():
                lines = [line for line in read_lines(kept) if line["step"] <= step]
                told = [json.dumps(line | {"step": line["step"] * batch // batch_now}) + "\n" for line in lines]
                write_whole(self.path, "".join(told).encode())

    def add(self, record: dict) -> None:
        self.append(json.dumps(record).encode() + b"\n")

    def read(self) -> list[dict]:
        """The records, those that wait for the disk with them. Of a file that cannot be read none, which is told."""
        known: list[dict] = []
        with self.tolerant:
            known = read_lines(self.path)
        return [*known, *map(json.loads, self.waiting)]


def read_lines(path: Path) -> list[dict]:
    """The JSON objects with a `step` in a file of lines. What a crash cut short or a disk damaged is left out."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if _step_of(line) is not None]


def _step_of(line: bytes) -> int | None:
    """The step of a line; None where it is damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def _open_to_append(path: Path) -> int:
    # Non-blocking: a pipe in a file's place would wait for a reader.
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | OURS_ALONE
    try:
        return os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP or not path.is_symlink():
            raise
    path.unlink()
    return os.open(path, flags, 0o666)
