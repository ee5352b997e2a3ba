"""The files of a folder that is packed, wherever in it they lie."""

import os

from prelude.data.errors import UserError
from prelude.data.image_files import OF_THE_FILE


def files_within(folder: str, extension: str) -> list[str]:
    """Files of this kind at any depth, sorted, but for hidden ones. Links are followed, but for those that lead back
    into the folder: `latest` is another of its own.

    Raises UserError for a link that leads to nothing, and OSError where the disk or the network is the reason that
    something cannot be read.
    """
    real, found = os.path.realpath(folder), []
    for inside, folders, files in os.walk(folder, followlinks=True, onerror=_raise_of_the_disk):
        shown = [name for name in folders if not name.startswith(".")]
        folders[:] = [name for name in shown if not _leads_back(os.path.join(inside, name), real)]
        found += [os.path.join(inside, name) for name in files if name.endswith(extension) and not name.startswith(".")]
    if lost := next((name for name in sorted(found) if not os.path.exists(name)), None):
        raise UserError(f"{lost} is a link to nothing; remove it, or bring back what it led to.")
    return sorted(found)


def _raise_of_the_disk(error: OSError) -> None:
    if error.errno not in OF_THE_FILE:
        raise error


def _leads_back(path: str, root: str) -> bool:
    """Whether it is a link to a folder within the root, or to one that holds the link itself."""
    if not os.path.islink(path):
        return False
    target, parent = os.path.realpath(path), os.path.realpath(os.path.dirname(path))
    return any(os.path.commonpath([above, below]) == above for above, below in ((root, target), (target, parent)))
