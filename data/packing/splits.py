"""Which split (train, test, …) a file of a source is of, as names of files and folders tell, and the choice of one."""

import glob
import os
import re
from collections.abc import Sequence

from prelude.data.errors import UserError

_SPLIT = re.compile(r"(?:split=)?(train|test|val|valid|validation|dev)(?=[^a-z]|$)")


def split_of(file: str) -> str:
    """As the file's name tells, or else the folder that is next to it; "" where none does."""
    return next(filter(None, map(split_in, reversed(file.split(os.sep)))), "")


def split_in(part: str) -> str:
    """The split that one name tells, as `train2017` does; "" where it tells none."""
    found = _SPLIT.match(part.lower())
    return found[1] if found else ""


def by_split(path: str, files: Sequence[str]) -> dict[str, list[str]]:
    """The files of the source `path` (a folder, a file or a pattern), in their order; "" has those that tell none."""
    found: dict[str, list[str]] = {}
    for file in files:
        found.setdefault(split_of(os.path.relpath(file, _plain_folder(path))), []).append(file)
    return found


def are_several(splits: Sequence[str]) -> bool:
    """Whether all have a name, and not the same: a class may be called `test`, too, beside others."""
    return len(set(splits)) > 1 and all(splits)


def place_of_split(names: Sequence[str], asked: bool) -> int | None:
    """Which part of all paths tells their split: the number of a folder from the top, or -1 for the file.

    names: relative paths with `/`. asked: whether one that all of them share counts, too. None where no part does.
    """
    depth = min((name.count("/") for name in names), default=0)
    told = {place: found for place in (*range(depth), -1) if (found := _told_at(place, names))}
    several = next((place for place, found in told.items() if len(found) > 1), None)
    return next(iter(told), None) if several is None and asked else several


def _told_at(place: int, names: Sequence[str]) -> set[str]:
    """Empty where one name tells none there; most folders end at their first one."""
    found = set()
    for name in names:
        split = split_in(name.split("/")[place])
        if not split:
            return set()
        found.add(split)
    return found


def one_split(path: str, splits: Sequence[str], asked: str) -> str:
    """The one that was asked for. Raises UserError where it is not among `splits`, those of the source `path`."""
    if asked in splits and asked:
        return asked
    if not any(splits):
        raise UserError(
            f"--split {asked} has no effect on {path}, which names no split; leave it out, or write --name {asked}."
        )
    raise UserError(f"{path} holds the splits {', '.join(filter(None, splits))}; write --split with one of them.")


def as_one(splits: Sequence[str]) -> str:
    """What is noted of several that a packing goes on with, which was begun when they were not told apart."""
    return f"the splits {', '.join(splits)} are packed as one, as this packing was begun"


def _plain_folder(path: str) -> str:
    """The folder, or that of a pattern before its first wildcard; of a file, the one that it lies in."""
    if os.path.isdir(path):
        return path
    folder = path if glob.has_magic(path) and not os.path.exists(path) else os.path.dirname(path)
    while glob.has_magic(folder):
        folder = os.path.dirname(folder)
    return folder or "."
