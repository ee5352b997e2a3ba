"""A file is there whole or as it was: what replaces it is written beside its place, brought to the disk, and renamed.
A reader, a kill or a power cut meet the old file or the new one.

- Nothing is written through a symbolic link: a link in a file's place is replaced by a file, its target left alone.
- New files have the permissions that the umask gives.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

OURS_ALONE = os.O_NOFOLLOW | os.O_CLOEXEC


def write_whole(path: str | Path, content: str | bytes, draft: Path | None = None, synced: bool = True) -> None:
    """Puts `content` in the place of `path` in one operation. draft: where it is written first, `.tmp-NAME` beside it
    unless given; writers that may meet need a name each, such as `own_draft`. synced: False where it costs more than to
    make the file anew after a power cut. Raises OSError, and the old file is then as it was."""
    with whole(Path(path), draft, synced) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def own_draft(path: Path) -> Path:
    """That no other writer has, on this machine or another."""
    return path.with_name(f".tmp-{path.name}.{os.getpid()}.{secrets.token_hex(4)}")


@contextmanager
def whole(path: Path, draft: Path | None = None, synced: bool = True) -> Iterator[BinaryIO]:
    """`write_whole` of what is written to the file that this gives. What is raised meanwhile leaves the old file as it
    was."""
    draft = draft or path.with_name(f".tmp-{path.name}")
    remove(draft)
    try:
        with created(draft, synced) as file:  # the replaced file could else come up empty after a power cut
            yield file
        os.replace(draft, path)
    except BaseException:
        with suppress(OSError):
            remove(draft)
        raise
    if synced:
        sync_to_disk(path.parent)


@contextmanager
def created(path: Path, synced: bool = True) -> Iterator[BinaryIO]:
    """A new file; if `synced`, its bytes are on the disk when the context ends. Raises OSError where something has its
    name."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | OURS_ALONE, 0o666)
    with open(descriptor, "wb") as file:
        yield file
        if synced:
            file.flush()
            os.fsync(descriptor)


def remove(path: Path) -> None:
    """A file, a folder with all that is in it, or a link and not what it leads to; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_to_disk(path: Path) -> None:
    """Returns when the disk itself, and not only the operating system, has the bytes of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
