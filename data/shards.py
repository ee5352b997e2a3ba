"""A data set of tar shards: which files it is, and where each sample lies in them.

- A folder of images, read in place, is one shard; see `image_folder`. One behind a URL is read as a file, too; see
  `remote_shards`.
- `data.shards` is a path, a pattern with braces (`{000..099}`), `*` or `?`, several of them joined by `::`, or a list;
  braces, `::` and `${...}` are expanded by webdataset. A name that exists as it is written is taken as it is.
- A sample's id is its place in the index: shard after shard, in the order of the tar.
- The fingerprint is a hash of names, sizes, offsets and samples of the images' bytes, not of folders and times: a data
  set that is moved or copied is still the same, one whose images were written again in place is not.
- A command (`pipe:`) is taken only by those who say that it may be run.
"""

import copy
import functools
import hashlib
import json
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from prelude.data.counting import counted
from prelude.data.decode import MAX_PIXELS, ValueRange
from prelude.data.errors import UserError
from prelude.data.image_folder import ImageFolder
from prelude.data.kept_files import remembered
from prelude.data.kept_index import Shard, load_all
from prelude.data.labels import extension_of, label_name
from prelude.data.patterns import expand, is_remote
from prelude.data.places import Chained, Column, Places, Taken
from prelude.data.remote_shards import RemoteShard, named, remote_shards, shard_name
from prelude.data.tar_index import SEVERAL, keys_by_offset
from prelude.data.value_range import resolved
from prelude.data.waiting import called, moved

_TAKEN_AT_ONCE = 2**20  # samples of a subset whose shards are looked up
_COMMAND = re.compile(r"\s*pipe:", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """One of several data sets: where it lies among the samples of an index, and how often it is drawn from."""

    name: str
    weight: float  # relative to those of the others
    begin: int
    end: int
    num_shards: int
    fingerprint: str

    @property
    def num_samples(self) -> int:
        return self.end - self.begin


class ShardIndex:
    """The samples of uncompressed tar shards, local or in a store. `images` and `labels`, (N, 2) of offset and size,
    lie in files that are mapped; see `kept_index`.

    shards: see the module. label: where a sample's label is, see `labels`, or "" for none; it changes neither ids nor
    fingerprint. value_range: the stored values of images with more than 8 bits that become black and white, "auto" to
    find them, None for all of 16 bits. max_pixels: of an image; see `decode`. Both are part of the fingerprint where
    they are given. image: extension of the image's member, such as `left.jpg`; "" for any. channels: with which images
    will be read, where that is known; it decides which pages of a TIFF a range is found among.

    Raises UserError where nothing matches, a shard is missing, unreadable, compressed or a stream, or no shard holds
    an image, and RunStopped where a store does not give one. Damage inside a shard does not raise: see `problems`.
    """

    _name_of = staticmethod(shard_name)  # in fingerprints

    def __init__(
        self,
        shards: str | list[str],
        label: str = "",
        value_range: ValueRange | Literal["auto"] | None = None,
        max_pixels: int = MAX_PIXELS,
        image: str = "",
        channels: int | None = None,
    ):
        self.paths = tuple(indexable_shards(shards))
        self.images_named = (image.lower().removeprefix("."),) * len(self.paths)  # by shard
        self.parts: tuple[Part, ...] = ()  # of several data sets, see `joined`
        self._taken: np.ndarray | Column | None = None  # of a subset: its samples' places among all of these shards
        self._joined: Sequence[ShardIndex] = ()  # of several data sets: their indexes
        self.classes: tuple[str, ...] = ()  # names in the order of their numbers, where labels are text
        self._read(label_name(label))
        if not self.num_samples:
            raise UserError(self._nothing_found(shards))
        self.max_pixels, self.channels = max_pixels, channels
        self.value_range = resolved(self, value_range)
        self.fingerprint = self._fingerprint()

    def _read(self, label: str) -> None:
        """The places of images and labels, of all of these shards or of the subset."""
        self.label = label
        if self._joined:
            self._chain([index.with_label(label) for index in self._joined])
        else:
            kept = load_all(self.paths, extension_of(label), self.images_named)
            self.images, self.labels = (
                kept.images,
                kept.labels,
            )  # labels: (0, 2) without a label, -1 where there is none
            self.counts = np.array([shard.count for shard in kept.shards], np.int64)  # (num_shards,)
            told = zip(self.paths, kept.shards, strict=True)
            self.problems = {path: shard.problems for path, shard in told if shard.problems}
            self.unended = tuple(path for path, shard in zip(self.paths, kept.shards, strict=True) if not shard.ended)
            self.num_lost = int(_lost(kept.shards).sum())
            self._contents = [*zip((shard.content for shard in kept.shards), kept.label_contents, strict=True)]
            self._identity = kept.identity
        self.ends = np.cumsum(self.counts)
        if self._taken is not None:
            self._take(self._taken)

    def _chain(self, indexes: Sequence["ShardIndex"]) -> None:
        """The tables of several, one after the other."""
        self.images = Chained([index.images for index in indexes])
        labelled = all(len(index.labels) for index in indexes)
        self.labels = Chained([index.labels for index in indexes]) if labelled else np.empty((0, 2), np.int64)
        self.counts = np.concatenate([index.counts for index in indexes])
        self._contents = [content for index in indexes for content in index._contents]
        known = all(index._identity for index in indexes)
        self._identity = " ".join(index._identity for index in indexes) if known else ""

    def _take(self, sample_ids: np.ndarray | Column) -> None:
        self.counts = np.zeros(self.num_shards, np.int64)
        for begin in range(0, len(sample_ids), _TAKEN_AT_ONCE):
            shards = np.searchsorted(self.ends, sample_ids[begin : begin + _TAKEN_AT_ONCE], side="right")
            self.counts += np.bincount(shards, minlength=self.num_shards)
        self.images = Taken(self.images, sample_ids)
        self.labels = Taken(self.labels, sample_ids) if len(self.labels) else self.labels
        self.ends = np.cumsum(self.counts)
        self._identity = ""

    @property
    def num_samples(self) -> int:
        return len(self.images)

    @property
    def identity(self) -> str:
        """Changes with what is in the index; "" where it is not kept, so that nothing made of it is either."""
        return self._identity

    @property
    def num_shards(self) -> int:
        return len(self.paths)

    @property
    def named(self) -> str:
        """Its shards, in a sentence."""
        return named(self.paths)

    @property
    def num_problems(self) -> int:
        """Members and samples that could not be indexed, over all shards. One of them may have cost many samples:
        `num_lost` says about how many are missing.
        """
        return sum(map(len, self.problems.values()))

    def first_problem(self) -> str:
        """What is wrong, and where, in a few words."""
        for shard, problems in self.problems.items():
            return f"{problems[0].reason}, {problems[0].where} in {shard}"
        return f"no end marker, and fewer samples than others, in {self.unended[0]}"

    def shard_of(self, sample_id: int) -> str:
        """The path of the shard that holds a sample."""
        return self.paths[int(np.searchsorted(self.ends, sample_id, side="right"))]

    def key(self, sample_id: int) -> str:
        """A sample's key in its shard, or where it lies in one that cannot be asked. Walks the shard's headers: for
        people to read, not for every sample."""
        path, offset = self.shard_of(sample_id), int(self.images[sample_id, 0])
        if isinstance(path, RemoteShard) and not path.is_here():
            return f"byte {offset}"
        try:
            return called(lambda: keys_in(path).get(offset, "?"), f"the headers of {path}")
        except (OSError, UserError):  # it may be for this that a name is asked for: the shard is gone, or another file
            return f"byte {offset}"

    def with_label(self, label: str) -> "ShardIndex":
        """The same samples, with the places of another label."""
        label = label_name(label)
        if label in ("", self.label):
            return self
        other = copy.copy(self)
        other.classes = ()
        other._read(label)
        return other

    def with_classes(self, names: Sequence[str]) -> "ShardIndex":
        """The same samples; labels that are text have the numbers of their places among these names."""
        other = copy.copy(self)
        other.classes = tuple(names)
        return other

    def with_range(
        self,
        value_range: ValueRange | Literal["auto"] | None,
        max_pixels: int = MAX_PIXELS,
        channels: int | None = None,
    ) -> "ShardIndex":
        """The same data set, with other values for black and white, and another limit. channels: where they become
        known."""
        other = copy.copy(self)
        other.max_pixels, other.channels = max_pixels, channels or self.channels
        other.value_range = resolved(other, value_range)
        other.fingerprint = other._fingerprint()
        return other

    def subset(self, sample_ids: np.ndarray | Column) -> "ShardIndex":
        """The data set of these samples alone, numbered anew from 0 in the order of the tar, with a fingerprint of
        its own. sample_ids: (n,) int64, growing, at least one.
        """
        part = copy.copy(self)
        part._taken = sample_ids if self._taken is None else self._taken[sample_ids]
        part._take(sample_ids)
        part.parts = ()
        part.fingerprint = part._fingerprint()
        return part

    @classmethod
    def joined(
        cls,
        indexes: Mapping[str, "ShardIndex"],
        weights: Mapping[str, float],
        value_range: ValueRange | Literal["auto"] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> "ShardIndex":
        """Several data sets as one, in this order, by name; `parts` says where each lies. They have the same label."""
        whole = copy.copy(next(iter(indexes.values())))
        whole._joined, whole._taken = tuple(indexes.values()), None
        whole.paths = tuple(path for index in whole._joined for path in index.paths)
        whole.images_named = tuple(name for index in whole._joined for name in index.images_named)
        whole.problems = {path: found for index in whole._joined for path, found in index.problems.items()}
        whole.unended = tuple(dict.fromkeys(path for index in whole._joined for path in index.unended))
        whole.num_lost = sum(index.num_lost for index in whole._joined)
        whole._chain(whole._joined)
        whole.ends = np.cumsum(whole.counts)
        ends = np.cumsum([index.num_samples for index in whole._joined]).tolist()
        whole.parts = tuple(
            Part(name, weights[name], end - index.num_samples, end, index.num_shards, index.fingerprint)
            for (name, index), end in zip(indexes.items(), ends, strict=True)
        )
        return whole.with_range(value_range, max_pixels)

    def label_fingerprint(self) -> str:
        """The same of the labels, which are no part of `fingerprint`."""
        labels = [label for _, label in self._contents]
        return self._digest(f"labels {extension_of(self.label)}", self.labels, labels)

    def layout_fingerprint(self) -> str:
        """Of names, sizes and offsets alone: what runs of 0.1 took for the fingerprint. With a `value_range` or
        `max_pixels` that is given, which they did not have, it is no such thing.
        """
        if self._read_as():
            return self.fingerprint
        return self._digest("layout", self.images, None)

    def as_written(self) -> "ShardIndex":
        """The same with the fingerprints that there were first, by which a folder has the name that its path ends with
        as it is written (`photos/` none at all), and a remote shard that of its URL (`a%20b.tar`)."""
        if all(_end_of(path) == shard_name(path) for path in self.paths):
            return self
        other = copy.copy(self)
        other._name_of = _end_of
        pairs = zip(self.parts, self._joined, strict=False)  # a subset has no parts
        other.parts = tuple(replace(part, fingerprint=index.as_written().fingerprint) for part, index in pairs)
        other.fingerprint = other._fingerprint()
        return other

    def _fingerprint(self) -> str:
        seen_as = self._read_as()
        return self._digest(f"images{seen_as}", self.images, [image + seen_as for image, _ in self._contents])

    def _digest(self, what: str, places: Places | np.ndarray, contents: list[str] | None) -> str:
        """what: a name for it."""
        names = [self._name_of(path) for path in self.paths]
        if names != [_end_of(path) for path in self.paths]:
            what += " by names of files"  # what is remembered without that is by those of `as_written`
        words = f"the index of {self.named}"
        return remembered(self._identity, what, lambda: _digest(names, places, self.counts, contents), words)

    def _read_as(self) -> str:
        """What decides pixels beside the images; "" where nothing was said."""
        limit = "" if self.max_pixels == MAX_PIXELS else f" max_pixels={self.max_pixels}"
        return ("" if self.value_range is None else f" {self.value_range}") + limit

    def _nothing_found(self, shards) -> str:
        found = [problem for problems in self.problems.values() for problem in problems]
        first = f" (the first problem: {found[0].reason}, {found[0].where})" if found else ""
        there = f"data.shards={shards!r} matches {counted(len(self.paths), 'file')} on {socket.gethostname()}"
        if any(problem.reason == SEVERAL for problem in found):
            return (
                f"{there} whose samples hold several images{first}; say which is meant by its extension, as "
                "data.image=left.jpg."
            )
        if name := next(filter(None, self.images_named), ""):
            return f"{there} without a single .{name} member{first}; correct data.image, or leave it out."
        return (
            f"{there} without a single image{first}; write tar files whose members are named like 000123.jpg, or make "
            "them of what is there: prelude shards pack SOURCE --to DIR."
        )


def keys_in(path: str) -> dict[int, str]:
    """The keys of a shard by the offset of an image. A remote one is fetched for it."""
    return path.keys_by_offset() if isinstance(path, ImageFolder) else keys_by_offset(path)


def expand_shards(shards: str | list[str], allow_commands: bool = False) -> list[str]:
    """Local paths and URLs, in order; they exist, as far as they are files, and those of a store are `RemoteShard`s.

    allow_commands: whether `pipe:` may be among them, behind which a shell runs what a file, or somebody else's recipe,
    says. Raises UserError naming the pattern and this host, and RunStopped for what a store does not give.
    """
    found = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        found += called(functools.partial(expand, pattern), f"the folder of data.shards={pattern!r}")
    commands = [url for url in found if is_command(url)]
    if commands and not allow_commands:
        raise UserError(
            f"{commands[0]!r} is a command that a shell would run; if you trust it, write data.allow_commands=true on "
            f"the command line, or else name files."
        )
    if not found:
        raise UserError(
            "data.shards is empty; write the path of a tar file, or a pattern such as /data/{000..099}.tar."
        )
    return remote_shards(found)


def indexable_shards(shards: str | list[str]) -> list[str]:
    """Paths, in order, of shards that must be files, here or in a store. Raises UserError as `expand_shards`, and for
    commands and other streams."""
    paths = expand_shards(shards, allow_commands=True)  # none is run: it is refused here
    for path in paths:
        if is_stream(path):
            raise UserError(f"{path} is not a local file and cannot be indexed; copy it to a disk.")
    return paths


def is_stream(path: str) -> bool:
    """Whether an expanded path can only be read from its beginning to its end."""
    return is_remote(path) and not isinstance(path, RemoteShard)


def is_command(url: str) -> bool:
    return bool(_COMMAND.match(url))


def _end_of(path: str) -> str:
    """The name that a shard had at first."""
    if isinstance(path, RemoteShard):
        return path.first_name
    return os.path.basename(path) if isinstance(path, ImageFolder) else shard_name(path)


def _digest(names: list[str], places: Places | np.ndarray, counts: np.ndarray, contents: list[str] | None) -> str:
    """places: (N, 2) of all shards, or (0, 2). contents: a hash of each shard, None to leave them out."""
    digest, begin = hashlib.blake2b(digest_size=16), 0
    for i, (name, count) in enumerate(zip(names, counts.tolist(), strict=True)):
        of_shard = places[begin : begin + count]
        content = [] if contents is None else [contents[i]]
        digest.update(json.dumps([name, len(of_shard), *content]).encode())
        digest.update(np.ascontiguousarray(of_shard, "<i8").tobytes())
        begin += count
        moved()
    return digest.hexdigest()


def _lost(shards: Sequence[Shard]) -> np.ndarray:
    """(num_shards,) about how many samples are missing from each shard.

    What was cut off leaves no trace in a shard: it is taken for what the others have more.
    """
    told = np.array([sum(problem.lost for problem in shard.problems) for shard in shards])
    counts = np.array([shard.count for shard in shards])
    whole = [shard.count for shard in shards if shard.ended and not shard.problems]
    cut = np.array([not shard.ended or bool(shard.problems and not shard.count) for shard in shards])
    usual = int(np.median(whole)) if whole else 0
    return np.where(cut, np.maximum(told, usual - counts), told)
