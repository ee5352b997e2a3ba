"""Which part of a source is train and which is test, as the names of its files and folders tell."""

import glob
import os
import re
from collections.abc import Iterable

from prelude.data.errors import UserError
from prelude.data.packing.source import SourceOptions

_SPLIT = re.compile(r"(?:split=)?(train|test|val|valid|validation|dev)(?=[^a-z]|$)")


def by_split(path: str, files: Iterable[str]) -> dict[str, list[str]]:
    """Files of a folder or a pattern, in their order, by what each or its nearest folder is called; "" for the rest."""
    found: dict[str, list[str]] = {}
    for file in files:
        told = map(_SPLIT.match, reversed(os.path.relpath(file, _plain_folder(path)).lower().split(os.sep)))
        found.setdefault(next((one[1] for one in told if one), ""), []).append(file)
    return found


def split_folders(folder: str) -> dict[str, str]:
    """By split, where all folders in it are called so and are two or more; empty elsewhere."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    found = {match[1]: name for name in names if (match := _SPLIT.fullmatch(name.lower()))}
    return found if 1 < len(found) == len(names) else {}


def one_split(path: str, splits: Iterable[str], options: SourceOptions, all_of_it: str = "") -> str:
    """The split that is asked for. all_of_it: how all are had together, if that can be written. Raises UserError where
    there is none of that name, and where several are and none is asked for."""
    splits = list(splits)
    if options.split in splits and options.split:
        return options.split
    if not any(splits):
        raise UserError(
            f"--split {options.split} has no effect on {path}, which names no split; leave it out, or write --name "
            f"{options.split}."
        )
    raise UserError(
        f"{path} holds the splits {', '.join(filter(None, splits))}; write --split with one of them"
        f"{f', or {all_of_it} for all' if all_of_it else ''}."
    )


def _plain_folder(path: str) -> str:
    """The folder, or that of a pattern before its first wildcard; of a file, the one that it lies in."""
    if os.path.isdir(path):
        return path
    folder = path if glob.has_magic(path) and not os.path.exists(path) else os.path.dirname(path)
    while glob.has_magic(folder):
        folder = os.path.dirname(folder)
    return folder or "."
