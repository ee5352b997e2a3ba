"""Which files of a folder are images, and how folders say what an image shows.

- Names are relative to the folder and sorted, so that a listing does not depend on the file system.
- Links to files and folders are followed; a link to a folder that holds it is not.
- What is passed over is listed with the reason: an image that is lost, or a file that is none.
"""

import errno
import os
import stat
from dataclasses import dataclass, field
from typing import NamedTuple

from prelude.data.errors import UserError, cause_of

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "tif", "tiff", "gif", "pgm", "pbm", "jp2", "avif")
"""In order of preference: a sample with `jpg` and `png` is an image with, most likely, a mask."""

ARRAY_EXTENSION = "npy"
"""Of arrays, which are images where there are no others: beside those they are labels, masks or features."""

MAX_IMAGE_BYTES = 256 * 2**20

OF_THE_FILE = (
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG,
)  # fmt: skip
"""Failures of which a file, or its name, is the reason. Any other is the disk's or the network's: to take it for the
file's would lose what is sound."""

DESKTOP_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
DESKTOP_FOLDERS = {
    "__macosx", ".appledouble", ".trashes", ".spotlight-v100", ".fseventsd", ".temporaryitems", ".thumbnails",
    ".ipynb_checkpoints", ".git", "@eadir", "$recycle.bin", "system volume information", "lost+found",
}  # fmt: skip

_ALIASES = {"jpe": "jpg", "jfif": "jpg"}


class PassedOver(NamedTuple):
    where: str  # the name of the file, or what else says where it is
    reason: str  # one of few, so that reasons can be counted
    is_image: bool  # whether an image is lost by it; else it is a file that is none, or a remark


@dataclass
class FolderListing:
    """The images of a folder at any depth: relative names with `/`, sorted; bytes; times of change in ns."""

    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    passed_over: list[PassedOver] = field(default_factory=list)


def list_images(root: str) -> FolderListing:
    """Raises OSError where the folder itself cannot be read, and where the disk or the network is the reason that
    something in it cannot."""
    listing = FolderListing()
    found: list[tuple[str, os.stat_result]] = []
    top = os.stat(root)
    waiting = [("", ((top.st_dev, top.st_ino),))]  # folders to read, with those that they lie in
    while waiting:
        inside, above = waiting.pop()
        try:
            entries = list(os.scandir(os.path.join(root, inside) if inside else root))
        except OSError as error:
            if not inside or error.errno not in OF_THE_FILE:
                raise
            listing.passed_over.append(PassedOver(inside, f"folder cannot be read: {cause_of(error)}", True))
            continue
        for entry in entries:
            name = f"{inside}/{entry.name}" if inside else entry.name
            if entry.name.startswith(".") or entry.name.lower() in DESKTOP_FILES | DESKTOP_FOLDERS:
                listing.passed_over.append(PassedOver(name, "hidden, or a system's own file", False))
                continue
            status = _status(entry, name, listing)
            if status is None:
                continue
            if stat.S_ISDIR(status.st_mode):
                identity = (status.st_dev, status.st_ino)
                if identity in above:
                    listing.passed_over.append(PassedOver(name, "link to a folder that holds it", False))
                else:
                    waiting.append((name, (*above, identity)))
            elif _is_image(name, status, listing):
                found.append((name, status))
    if any(image_extension_of(name) != ARRAY_EXTENSION for name, _ in found):
        arrays = [name for name, _ in found if image_extension_of(name) == ARRAY_EXTENSION]
        listing.passed_over += [PassedOver(name, "an array beside images", False) for name in arrays]
        found = [(name, status) for name, status in found if image_extension_of(name) != ARRAY_EXTENSION]
    for name, status in sorted(found, key=lambda item: item[0]):
        listing.names.append(name)
        listing.sizes.append(status.st_size)
        listing.times.append(status.st_mtime_ns)
    listing.passed_over.sort()
    return listing


def image_extension_of(name: str) -> str:
    """`jpg` of `a/b.JPG`, `npy` of an array; "" where the name is not an image's."""
    extension = os.path.splitext(name)[1].lower().removeprefix(".")
    extension = _ALIASES.get(extension, extension)
    return extension if extension in IMAGE_EXTENSIONS or extension == ARRAY_EXTENSION else ""


def folders_of(names: list[str], which: str, root: str) -> list[str] | None:
    """The folder that names each image's class: `parent`, in which it lies, or `top`, the first below the root.

    which: "" takes what both agree on. None where no image lies in a folder. Raises UserError where the two differ, and
    for an image beside the folders of others.
    """
    tops = [name.partition("/")[0] if "/" in name else "" for name in names]
    parents = [name.rpartition("/")[0].rpartition("/")[2] for name in names]
    if not any(tops):
        return None
    if which == "" and tops != parents:
        first = next(name for name, top, parent in zip(names, tops, parents, strict=True) if top != parent)
        raise UserError(
            f"{root} has folders within folders ({first!r}), so it is not clear which of them is the class; write "
            f"--label parent (the folder of the image), --label top (the first one), or pack it with --label none."
        )
    if not all(tops):
        raise UserError(
            f"{root} has images beside its class folders ({names[tops.index('')]!r}); move it into a folder, or pack "
            f"with --label none."
        )
    return tops if which == "top" else parents


def _status(entry: os.DirEntry, name: str, listing: FolderListing) -> os.stat_result | None:
    try:
        return entry.stat()
    except OSError as error:
        if error.errno not in OF_THE_FILE:
            raise
        reason = "broken link" if entry.is_symlink() else f"cannot be read: {cause_of(error)}"
        listing.passed_over.append(PassedOver(name, reason, bool(image_extension_of(name))))
        return None


def _is_image(name: str, status: os.stat_result, listing: FolderListing) -> bool:
    reason = None
    if not image_extension_of(name):
        reason = "no image by its name"
    elif not stat.S_ISREG(status.st_mode):
        reason = "not a regular file"
    elif status.st_size == 0:
        reason = "empty image"
    elif status.st_size > MAX_IMAGE_BYTES:
        reason = "image too large"
    if reason:
        listing.passed_over.append(PassedOver(name, reason, reason != "no image by its name"))
    return reason is None
