"""The files of a folder that is packed, wherever in it they lie."""

import itertools
import os

from prelude.data.errors import UserError
from prelude.data.image_files import OF_THE_FILE
from prelude.data.packing.splits import splits_of


def files_within(folder: str, extension: str) -> list[str]:
    """Files of this kind at any depth, sorted, but for hidden ones. What links give a second name to is there once, by
    one that tells its split, or else by its own.

    Raises UserError for a link that leads to nothing, and OSError where the disk or the network is the reason that
    something cannot be read.
    """
    found = []
    for inside, folders, files in os.walk(folder, followlinks=True, onerror=_raise_of_the_disk):
        shown = [name for name in folders if not name.startswith(".")]
        folders[:] = [name for name in shown if not _leads_to_itself(os.path.join(inside, name), folder)]
        found += [os.path.join(inside, name) for name in files if name.endswith(extension) and not name.startswith(".")]
    if lost := next((name for name in sorted(found) if not os.path.exists(name)), None):
        raise UserError(f"{lost} is a link to nothing; remove it, or bring back what it led to.")
    return _once_each(folder, sorted(found))


def _raise_of_the_disk(error: OSError) -> None:
    if error.errno not in OF_THE_FILE:
        raise error


def _leads_to_itself(path: str, folder: str) -> bool:
    """Whether it is a link to one of the folders in which it lies, from `folder` down, or above that."""
    if not os.path.islink(path):
        return False
    target, parts = os.path.realpath(path), os.path.relpath(os.path.dirname(path), folder).split(os.sep)
    above = map(os.path.realpath, itertools.accumulate(parts, os.path.join, initial=folder))
    return any(os.path.commonpath([target, each]) == target for each in above)


def _once_each(folder: str, files: list[str]) -> list[str]:
    """A file under several names that tell other splits keeps one of each."""
    root, taken = os.path.realpath(folder), {}
    named = [(os.path.realpath(file), file, split) for file, split in zip(files, splits_of(folder, files), strict=True)]
    named.sort(key=lambda each: each[0] != os.path.join(root, os.path.relpath(each[1], folder)))
    for real, file, split in named:
        taken.setdefault(real, {}).setdefault(split, file)
    told = ([file for split, file in names.items() if split] or names.values() for names in taken.values())
    return sorted(itertools.chain.from_iterable(told))
