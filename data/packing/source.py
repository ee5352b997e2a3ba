"""What a source of images is to those who pack it.

- A source lists its images once, in an order of its own, and reads any of them by number, in any process.
- Its `stamp` changes with anything that could change a packed byte, as far as that is seen without reading all images.
- What is no good is left out with a reason, never dropped.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from prelude.data.errors import RunStopped, UserError, cause_of
from prelude.data.image_files import OF_THE_FILE, PassedOver
from prelude.data.packing.labels import Labels, is_missing

ALL = "all"  # splits of a source, as one
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,90}")


class LeftOut(Exception):
    """An image that cannot be packed. The message is a short reason, one of few, so that reasons can be counted."""


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read; each is an option of the command with the same name."""

    image: str = ""  # column, array or member of the image
    label: tuple[str, ...] = ()  # columns, array, member or folder of the label; ("none",) for none
    label_separator: str = ""  # between the labels of one column
    group: str = ""  # field whose values keep together
    fields: tuple[str, ...] = ()  # that are kept beside the labels
    split: str = ""  # of a source that has several; `ALL` of them
    root: str = ""  # of relative paths
    classes: tuple[str, ...] | None = None  # names in the order of their numbers, where they are given
    whole: bool = False  # with all splits, as one that was begun when these were not told apart

    def allow(self, what: str, *names: str) -> None:
        """Raises UserError where another option was given: it would have no effect on `what`."""
        for option in fields(self):
            if option.name not in (*names, "classes", "whole") and getattr(self, option.name) != option.default:
                flag = option.name.replace("_", "-")
                raise UserError(f"--{flag} has no effect on {what}; leave it out.")

    @property
    def one_split(self) -> str:
        """The one that was asked for, if one was."""
        return "" if self.split == ALL else self.split

    @property
    def unlabelled(self) -> bool:
        return self.label == ("none",)


class Source:
    """N images. A subclass fills what is below and defines `read`."""

    what = "images"  # in words, for messages

    def __init__(self) -> None:
        self.names: list[str] = []  # where each image comes from; unique
        self.keys: list[str] | None = None  # of the packed samples; None: made of the names
        self.labels: Labels | None = None
        self.fields: list[dict] | None = None  # JSON values of each image
        self.groups: list[str | None] | None = None  # None: a group of its own
        self.blocks: list[int] | None = None  # first images of blocks that are dear to read; None: each is at hand
        self.passed_over: list[PassedOver] = []  # known from the listing alone
        self.notes: list[str] = []  # what was understood, in sentences
        self.stamps: list[str] = []  # sizes and times of change

    def read(self, number: int) -> tuple[bytes, str]:
        """(content, extension) of an image. Raises LeftOut."""
        raise NotImplementedError

    def members(self, number: int) -> dict[str, bytes]:
        """Further members of a sample, by extension, that are packed as they are."""
        return {}

    def stamp(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        label_values = self.labels.values if self.labels else []
        classes = self.labels.classes if self.labels else []
        for part in (self.names, self.stamps, label_values, classes, self.fields or [], self.groups or []):
            digest.update(b"\0")
            for item in part:
                digest.update(json.dumps(item, default=str).encode() + b"\n")
        return digest.hexdigest()

    def all_keys(self) -> list[str]:
        return self.keys or [key_of(name) for name in self.names]


def key_of(name: str) -> str:
    """A sample's key: the start of the file's name, for people, and a hash of all of it, so that it is unique.

    No dots, which would end it, and nothing but ASCII letters, digits, `_` and `-`.
    """
    stem = os.path.splitext(name.rpartition("/")[2])[0]
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:40].strip("_-") or "image"
    return f"{readable}-{hashlib.blake2b(name.encode('utf-8', 'surrogateescape'), digest_size=8).hexdigest()}"


def kept_keys(keys: Sequence[str], names: Sequence[str]) -> list[str]:
    """Keys that samples already have, where they are unique and plain; else those that `key_of` makes."""
    counts = Counter(keys)
    return [
        key if counts[key] == 1 and _KEY.fullmatch(key) else key_of(name) for key, name in zip(keys, names, strict=True)
    ]


def read_file(path: str) -> bytes:
    """Raises LeftOut where the file is the reason, RunStopped where the disk or the network is."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        if error.errno not in OF_THE_FILE:
            raise unreadable(path, error) from error
        raise LeftOut(f"cannot be read: {cause_of(error)}") from error


def unreadable(path: str, error: OSError) -> RunStopped:
    """The disk or the network is the reason, so that leaving images out would lose what is sound."""
    return RunStopped(
        f"{path} cannot be read ({cause_of(error)}); mend the disk, and give the same command again, which "
        f"goes on from there."
    )


def damaged(path: str, error: Exception, reason: str) -> LeftOut | RunStopped:
    """Of what a library could not read: whether the bytes are the reason, or the disk or the network, whose errors
    alone have a number."""
    if number := getattr(error, "errno", None):
        return unreadable(path, OSError(number, os.strerror(number)))
    return LeftOut(reason)


def stamp_of(path: str) -> str:
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns}"


def short_names(paths: Sequence[str]) -> list[str]:
    """Paths without the folders that all of them share."""
    shared = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return [os.path.relpath(os.path.abspath(path), shared) for path in paths]


def strings(values: Iterable) -> list[str | None]:
    """Group values as text, as they are written but for spaces around them; None, NaN and blanks are no group."""
    return [None if is_missing(value) else str(value).strip() or None for value in values]
