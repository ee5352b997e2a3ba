"""Which split (train, test, …) a file of a source is of, as names of files and folders tell, and the choice of one."""

import functools
import glob
import itertools
import os
import re
from collections.abc import Iterable, Sequence

from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.data.packing.source import ALL, SourceOptions

_WORD = r"(training|train|testing|test|val|valid|validation|dev)(?=[^a-z]|$)"
_FIRST, _WITHIN = re.compile(r"(?:split=)?" + _WORD), re.compile(r"[-_.]" + _WORD)
_COMMON = ("", "data", "dataset", "set", "image", "images", "imgs", "split")  # behind it, and no `test tube`


def split_of(file: str, within: bool = True) -> str:
    """As the file's name tells, or else the folder that is next to it; "" where none does.

    within: whether a word in the midst of a name tells, where the name begins with none, as of
    `imagenet1k-train-0000.tar`; one of a folder where nothing else does.
    """
    *folders, name = file.split(os.sep)
    folders.reverse()
    inside = _split_within if within else lambda part: ""
    told = (split_in(name), inside(name), *map(split_in, folders), *map(inside, folders))
    return next(filter(None, told), "")


def split_in(part: str) -> str:
    """The split that one name tells, as `train2017` does; "" where it tells none."""
    found = _FIRST.match(part.lower())
    return found[1] if found else ""


def _split_within(part: str) -> str:
    found = _WITHIN.search(part.lower())
    return found[1] if found else ""


def splits_of(path: str, files: Sequence[str], within: bool = True) -> list[str]:
    """Of each file of the source `path` (a folder, a file or a pattern); "" where it tells none. within: as of
    `split_of`."""
    folder = _plain_folder(path)
    return [split_of(os.path.relpath(file, folder), within) for file in files]


def are_several(splits: Iterable[str]) -> bool:
    """Whether two have a name, and not the same, whatever lies beside; one alone may be a class called `test`."""
    return len(set(splits) - {""}) > 1


def place_of_split(names: Sequence[str], asked: str) -> int | None:
    """Which part of the paths tells their split: the number of a folder from the top, or -1 for the file.

    Several splits are told where all names tell one, or where folders of one level are called `train` and like another
    one, whatever lies beside: test images must not become training's over a stray file.
    names: relative paths with `/`. asked: a split, for which a part that tells it alone counts, too. None where none
    tells any.
    """
    parts = _folders_by_place(names)
    told = {place: set(map(split_in, found)) for place, found in parts.items()}
    told[-1] = {split_in(name.rpartition("/")[2]) for name in names}
    by_all = [place for place, found in told.items() if found and "" not in found]
    several = [place for place in by_all if are_several(told[place])]
    beside = [place for place, found in parts.items() if _are_train_and_other(found)]
    some = [place for place, found in told.items() if any(found)]
    of_asked = [[place for place in group if asked in told[place]] for group in (by_all, some)]
    groups = [several, beside, *of_asked, by_all, some] if asked else [several, beside]
    return next(itertools.chain.from_iterable(groups), None)


def _folders_by_place(names: Sequence[str]) -> dict[int, set[str]]:
    """What folders are called at each place from the top; with "" where a name has none there."""
    found: dict[int, set[str]] = {}
    paths = [folder.split("/") if folder else [] for folder in {name.rpartition("/")[0] for name in names}]
    for path in paths:
        for place, folder in enumerate(path):
            found.setdefault(place, set()).add(folder)
    least = min(map(len, paths), default=0)
    return {place: called if place < least else called | {""} for place, called in found.items()}


def splits_at(place: int, names: Sequence[str]) -> list[str]:
    """The split of each name as this part of it tells; "" where it tells none, or the name has no folder there."""
    split = functools.cache(split_in)  # folders are few
    if place < 0:
        return [split_in(name.rpartition("/")[2]) for name in names]
    return [split(name.split("/", place + 1)[place]) if name.count("/") > place else "" for name in names]


def _are_train_and_other(folders: Iterable[str]) -> bool:
    """Classes may be called `test` and `dev`; without the one that is trained on nothing can go into it."""
    kinds: dict[str, set[bool]] = {}  # by what follows the word: `train images` and `test images` are of one
    for folder in folders:
        if found := _FIRST.match(folder.lower()):
            kinds.setdefault(_without_common_words(folder[found.end() :]), set()).add(found[1].startswith("train"))
    return any(len(found) > 1 for found in kinds.values())


def _without_common_words(rest: str) -> str:
    return " ".join(word for word in re.split("[^a-z]+", rest.lower()) if word not in _COMMON)


def of_one_split(
    path: str, names: Sequence[str], splits: Sequence[str], options: SourceOptions, what: str, notes: list[str]
) -> Sequence[int]:
    """The numbers of those of the source `path` that are of the split asked for; all where none is and they are not of
    several, where all are asked for, or where a packing goes on that was begun with all.

    names: of images, shards or rows (`what` in a word), and `splits` of each. What is to be told is added to `notes`.
    Raises UserError where a split is to be asked for, or another one.
    """
    several = are_several(splits)
    if options.split == ALL or (not options.split and (options.whole or not several)):
        if several:
            begun = "" if options.split else ", as this packing was begun"
            notes.append(f"the splits {', '.join(_named(splits))} are packed as one{begun}")
        return range(len(names))
    split = one_split(path, splits, options.split)
    if untold := [name for name, told in zip(names, splits, strict=True) if not told]:
        tell = "tells" if len(untold) == 1 else "tell"
        notes.append(f"without {counted(len(untold), what)} that {tell} no split, such as {untold[0]}")
    return [number for number, told in enumerate(splits) if told == split]


def one_split(path: str, splits: Iterable[str], asked: str) -> str:
    """The one that was asked for. Raises UserError where it is not among `splits`, those of the source `path`."""
    named = _named(splits)
    if asked in named:
        return asked
    if not named:
        raise UserError(
            f"--split {asked} has no effect on {path}, which names no split; leave it out, or write --name {asked}."
        )
    raise UserError(f"{path} holds the splits {', '.join(named)}; write --split with one of them, or {ALL}, as one.")


def _named(splits: Iterable[str]) -> list[str]:
    return sorted(set(splits) - {""})


def _plain_folder(path: str) -> str:
    """The folder, or that of a pattern before its first wildcard; of a file, the one that it lies in."""
    if os.path.isdir(path):
        return path
    folder = path if glob.has_magic(path) and not os.path.exists(path) else os.path.dirname(path)
    while glob.has_magic(folder):
        folder = os.path.dirname(folder)
    return folder or "."
