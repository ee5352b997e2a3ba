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
import glob
import hashlib
import json
import math
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from webdataset.shardlists import expand_urls

from prelude.data.decode import MAX_PIXELS, ValueRange
from prelude.data.errors import UserError
from prelude.data.image_folder import ImageFolder, open_folder
from prelude.data.kept_index import load_all
from prelude.data.labels import extension_of, label_name
from prelude.data.remote_shards import RemoteShard, is_pattern, matching, remote_shards, shard_name
from prelude.data.stores import is_stored
from prelude.data.tar_index import TarIndex, keys_by_offset
from prelude.data.value_range import resolved
from prelude.data.waiting import called

_URL = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://", re.IGNORECASE)
_MOST_NAMED = 10**7  # by the ranges of a pattern
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
    """The samples of uncompressed tar shards, local or in a store. 16 bytes of memory a sample, 32 with labels.

    shards: see the module. label: where a sample's label is, see `labels`, or "" for none; it changes neither ids nor
    fingerprint. value_range: the stored values of images with more than 8 bits that become black and white, "auto" to
    find them, None for all of 16 bits. max_pixels: of an image; see `decode`. Both are part of the fingerprint where
    they are given. image: extension of the image's member, such as `left.jpg`; "" for any.

    Raises UserError where nothing matches, a shard is missing, unreadable, compressed or a stream, or no shard holds
    an image, and RunStopped where a store does not give one. Damage inside a shard does not raise: see `problems`.
    """

    def __init__(
        self,
        shards: str | list[str],
        label: str = "",
        value_range: ValueRange | Literal["auto"] | None = None,
        max_pixels: int = MAX_PIXELS,
        image: str = "",
    ):
        self.paths = tuple(indexable_shards(shards))
        self.images_named = (image.lower().removeprefix("."),) * len(self.paths)  # by shard
        self.parts: tuple[Part, ...] = ()  # of several data sets, see `joined`
        self._taken: np.ndarray | None = None  # of a subset: its samples' places among all of these shards
        self.classes: tuple[str, ...] = ()  # names in the order of their numbers, where labels are text
        self._read(label_name(label))
        if not self.num_samples:
            raise UserError(self._nothing_found(shards))
        self.max_pixels = max_pixels
        self.value_range = resolved(self, value_range)
        self.fingerprint = self._fingerprint()

    def _read(self, label: str) -> None:
        """The places of images and labels, of all of these shards or of the subset."""
        self.label = label
        parts = load_all(self.paths, extension_of(label), self.images_named)
        self.images = np.concatenate([part.images for part in parts])  # (N, 2) int64: offset, size
        self.labels = np.concatenate([part.labels for part in parts])  # (N, 2) int64, or (0, 2) without a label
        self.counts = np.array([len(part.images) for part in parts], np.int64)  # (num_shards,)
        self.ends = np.cumsum(self.counts)
        self.problems = {path: part.problems for path, part in zip(self.paths, parts, strict=True) if part.problems}
        self.unended = tuple(path for path, part in zip(self.paths, parts, strict=True) if not part.ended)
        self.num_lost = int(_lost(parts).sum())
        self._contents = [(part.content, part.label_content) for part in parts]
        self._num_all = len(self.images)
        if self._taken is not None:
            self._take(self._taken)

    def _take(self, sample_ids: np.ndarray) -> None:
        self.counts = np.bincount(np.searchsorted(self.ends, sample_ids, side="right"), minlength=self.num_shards)
        self.images = self.images[sample_ids]
        self.labels = self.labels[sample_ids] if len(self.labels) else self.labels
        self.ends = np.cumsum(self.counts)

    @property
    def num_samples(self) -> int:
        return len(self.images)

    @property
    def num_shards(self) -> int:
        return len(self.paths)

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
        """A sample's key in its shard. Walks the shard's headers: for people to read, not for every sample."""
        path, offset = self.shard_of(sample_id), int(self.images[sample_id, 0])
        if isinstance(path, RemoteShard) and not path.is_here():
            return f"byte {offset}"
        return called(lambda: keys_in(path).get(offset, "?"), f"the headers of {path}")

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
        self, value_range: ValueRange | Literal["auto"] | None, max_pixels: int = MAX_PIXELS
    ) -> "ShardIndex":
        """The same data set, with other values for black and white, and another limit."""
        other = copy.copy(self)
        other.max_pixels = max_pixels
        other.value_range = resolved(other, value_range)
        other.fingerprint = other._fingerprint()
        return other

    def subset(self, sample_ids: np.ndarray) -> "ShardIndex":
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
        all_of = list(indexes.values())
        whole = copy.copy(all_of[0])
        whole.paths = tuple(path for index in all_of for path in index.paths)
        whole.images_named = tuple(name for index in all_of for name in index.images_named)
        whole.problems = {path: found for index in all_of for path, found in index.problems.items()}
        whole.unended = tuple(dict.fromkeys(path for index in all_of for path in index.unended))
        for table in ("images", "labels", "counts"):
            setattr(whole, table, np.concatenate([getattr(index, table) for index in all_of]))
        whole.ends = np.cumsum(whole.counts)
        whole.num_lost = sum(index.num_lost for index in all_of)
        whole._contents = [content for index in all_of for content in index._contents]
        ends = np.cumsum([index.num_samples for index in all_of]).tolist()
        whole.parts = tuple(
            Part(name, weights[name], end - index.num_samples, end, index.num_shards, index.fingerprint)
            for (name, index), end in zip(indexes.items(), ends, strict=True)
        )
        before = np.cumsum([0, *(index._num_all for index in all_of)]).tolist()
        if any(index._taken is not None for index in all_of):
            taken = [np.arange(index._num_all) if index._taken is None else index._taken for index in all_of]
            whole._taken = np.concatenate([ids + first for ids, first in zip(taken, before[:-1], strict=True)])
        whole._num_all = before[-1]
        return whole.with_range(value_range, max_pixels)

    def label_fingerprint(self) -> str:
        """The same of the labels, which are no part of `fingerprint`."""
        return _digest(self.paths, self.labels, self.ends, [label for _, label in self._contents])

    def layout_fingerprint(self) -> str:
        """Of names, sizes and offsets alone: what runs of 0.1 took for the fingerprint. With a `value_range` or
        `max_pixels` that is given, which they did not have, it is no such thing.
        """
        if self._read_as():
            return self.fingerprint
        return _digest(self.paths, self.images, self.ends, None)

    def _fingerprint(self) -> str:
        seen_as = self._read_as()
        return _digest(self.paths, self.images, self.ends, [image + seen_as for image, _ in self._contents])

    def _read_as(self) -> str:
        """What decides pixels beside the images; "" where nothing was said."""
        limit = "" if self.max_pixels == MAX_PIXELS else f" max_pixels={self.max_pixels}"
        return ("" if self.value_range is None else f" {self.value_range}") + limit

    def _nothing_found(self, shards) -> str:
        found = [problem for problems in self.problems.values() for problem in problems]
        first = f" (the first problem: {found[0].reason}, {found[0].where})" if found else ""
        return (
            f"data.shards={shards!r} matches {len(self.paths)} files on {socket.gethostname()} without a single "
            f"image{first}; write tar files whose members are named like 000123.jpg, or make them of what is there: "
            f"prelude shards pack SOURCE --to DIR."
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
        found += called(functools.partial(_expand, pattern), f"the folder of data.shards={pattern!r}")
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


def is_remote(url: str) -> bool:
    return bool(_URL.match(url))


def is_command(url: str) -> bool:
    return bool(_COMMAND.match(url))


def _digest(paths: tuple[str, ...], places: np.ndarray, ends: np.ndarray, contents: list[str] | None) -> str:
    """places: (N, 2) int64, or (0, 2). contents: a hash of each shard, None to leave them out."""
    digest = hashlib.blake2b(digest_size=16)
    of_shards = np.split(places, ends[:-1]) if len(places) else [places] * len(paths)
    for i, (path, of_shard) in enumerate(zip(paths, of_shards, strict=True)):
        content = [] if contents is None else [contents[i]]
        digest.update(json.dumps([shard_name(path), len(of_shard), *content]).encode())
        digest.update(np.ascontiguousarray(of_shard, "<i8").tobytes())
    return digest.hexdigest()


def _lost(parts: list[TarIndex]) -> np.ndarray:
    """(num_shards,) about how many samples are missing from each shard.

    What was cut off leaves no trace in a shard: it is taken for what the others have more.
    """
    told = np.array([sum(problem.lost for problem in part.problems) for part in parts])
    counts = np.array([len(part.images) for part in parts])
    whole = [len(part.images) for part in parts if part.ended and not part.problems]
    cut = np.array([not part.ended or bool(part.problems and not len(part.images)) for part in parts])
    usual = int(np.median(whole)) if whole else 0
    return np.where(cut, np.maximum(told, usual - counts), told)


# ---- patterns into paths


def _expand(pattern: str) -> list[str]:
    if isinstance(pattern, ImageFolder | RemoteShard):
        return [pattern]
    if not is_remote(pattern) and os.path.exists(pattern):
        return [_as_path(pattern, pattern)]
    if (count := _num_named(pattern)) > _MOST_NAMED:
        raise UserError(f"data.shards={pattern!r} names {count:,} files; write the numbers that there are.")
    try:
        urls = expand_urls(pattern)
    except (AssertionError, ValueError) as error:  # a variable that is not set; a brace that is not closed
        reason = str(error).replace("wds_WDS_", "WDS_") or "unbalanced braces"
        raise UserError(f"data.shards={pattern!r} cannot be expanded ({reason}); write plain paths.") from None
    return [path for url in urls for path in (_in_store(url) if _has_scheme(url) else _local(url, pattern))]


def _in_store(url: str) -> list[str]:
    return matching(url) if is_stored(url) and is_pattern(url) else [url]


def _num_named(pattern: str) -> int:
    """How many names the ranges in braces make, without making them."""
    spans = re.findall(r"\{(\d+)\.\.(\d+)\}", pattern)
    return math.prod(max(int(last) - int(first) + 1, 1) for first, last in spans)


def _has_scheme(url: str) -> bool:
    return is_remote(url) and not url.startswith("file://")


def _local(url: str, pattern: str) -> list[str]:
    path = os.path.expanduser(re.sub(r"^file:(//)?", "", url))
    if os.path.exists(path):
        return [_as_path(path, pattern)]
    if "*" in path or "?" in path:
        matches = sorted(glob.glob(path.replace("[", "[[]")))
        if matches:
            return [_as_path(match, pattern) for match in matches]
        raise UserError(f"No file matches {path!r} on {socket.gethostname()}; correct data.shards={pattern!r}.")
    raise UserError(
        f"{path} does not exist on {socket.gethostname()}; correct data.shards={pattern!r}, or copy the shard there."
    )


def _as_path(path: str, pattern: str) -> str:
    if os.path.isdir(path):
        return open_folder(path)
    if not os.path.isfile(path):
        raise UserError(
            f"{path} in data.shards={pattern!r} is a pipe or a device, and images are read by their place in a file; "
            f"write 'pipe:cat {path}' with data.num_samples=... and data.allow_commands=true, or copy the shard to a "
            f"disk."
        )
    return path
