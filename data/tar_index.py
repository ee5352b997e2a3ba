"""Where the samples of one tar shard lie: byte offsets and sizes, read from the headers alone.

- Members with one key are one sample, wherever in the shard they lie. A key is the name up to the first dot of the
  file's name, as in webdataset, and an image and its label may both have more dots: `a.left.jpg`, `a.left.cls`.
- Damage never raises and is never silent: each lost member or sample is one `Problem`, which says about how many
  samples it has cost, as far as bytes that no sound member covers tell.
- `content` is a hash over samples of the images' bytes, so that a shard which was written again in place is noticed.
- Nothing is ever extracted: a member's name is only a key, so it cannot climb out of a folder.
"""

import functools
import hashlib
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
from webdataset.tariterators import base_plus_ext

from prelude.data.errors import UserError
from prelude.data.image_files import (
    ARRAY_EXTENSION,
    DESKTOP_FILES,
    DESKTOP_FOLDERS,
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
)
from prelude.data.remote_shards import open_shard
from prelude.data.tar_headers import TAIL, Damage, Walk
from prelude.data.waiting import moved

_SAMPLED = 64  # images of a shard whose middle is part of its content's hash, beside the end of every image
MOST_LABELS = 32  # extensions of one shard that are looked for at once
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own metadata members
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
SEVERAL = "several images under one key"


class Problem(NamedTuple):
    reason: str  # one of few, so that problems can be counted
    where: str  # a key, a member's name, or a byte offset
    lost: int = 1  # about how many samples


@dataclass(frozen=True)
class TarIndex:
    images: np.ndarray  # (n, 2) int64: offset and size of each sample's image
    labels: np.ndarray  # (n, 2) int64: the same of its label, -1 where it has none; (0, 2) if no label was asked for
    problems: tuple[Problem, ...]
    ended: bool  # whether the end marker is there; without, the tar may have been cut off between two members
    content: str  # hash of samples of the images' bytes
    label_content: str  # the same of the labels


class _Place(NamedTuple):
    """A member's content, as a sample knows it."""

    offset: int
    size: int
    tail: int  # checksum of its last bytes


_NOWHERE = _Place(-1, -1, 0)


def index_tar(path: str, label: str = "", image: str = "") -> TarIndex:
    """Walks the headers of the tar at `path`. `label`: extension of the label's member, or "". `image`: that of the
    image's member where it is named (`left.jpg`), or "".

    Raises UserError for a compressed tar, which has no byte offsets, and OSError where the file cannot be read.
    """
    return _indexes(path, lambda samples: [label], image)[label]


def index_every_label(path: str, image: str = "") -> dict[str, TarIndex]:
    """By extension of the label's member, "" for none: what `index_tar` gives for each, of one walk. Of more than
    `MOST_LABELS` extensions the most frequent. Arrays that are the images of a shard are no labels here."""
    found = _indexes(path, lambda samples: ["", *_label_extensions(samples)], image)
    return {label: index for label, index in found.items() if index.content == found[""].content}


def _indexes(path: str, labels_in: Callable[[dict], list[str]], image: str) -> dict[str, TarIndex]:
    problems: list[Problem] = []
    with _Open(path) as file:
        walk = Walk(file.fd, file.size)
        samples = _samples(_named(walk, problems), problems)
        labels = labels_in(samples)
        # Which members are images depends on the label in one way only.
        seen = {
            arrays: _Images(samples, arrays, image, file.fd)
            for arrays in {label == ARRAY_EXTENSION for label in labels}
        }
    covered, indexes = file.size - sum(damage.num_bytes for damage in walk.damage), {}
    for label in labels:
        images = seen[label == ARRAY_EXTENSION]
        damage = [_told(damage, covered / len(images.places) if images.places else 0) for damage in walk.damage]
        told = tuple(problem for problem in (*damage, *problems, *images.problems) if problem)
        places = [_label_of(files, found, label) for _, files, found in images.found] if label else []
        tails = _hash([place.tail for place in places])
        indexes[label] = TarIndex(_table(images.places), _table(places), told, walk.ended, images.content, tails)
    return indexes


class _Images:
    """The images of a shard in the order of their places. arrays_are_labels: whether arrays are no images.
    named: extension of the image's member, or ""."""

    def __init__(self, samples: dict, arrays_are_labels: bool, named: str, fd: int):
        self.problems: list[Problem] = []
        images = _with_image(samples, arrays_are_labels, named, self.problems)
        self.found = sorted(((files[image], files, image) for image, files in images), key=lambda each: each[0].offset)
        self.places = [place for place, _, _ in self.found]
        middles = [_middle(fd, place) for place in self.places[:: max(len(self.places) // _SAMPLED, 1)]]
        self.content = _hash([*(place.tail for place in self.places), *middles])


def _label_extensions(samples: dict[str, dict[str, _Place]]) -> list[str]:
    """Of members that are no images, `cls` for those of `left.cls`, too; the most frequent of many."""
    counts = Counter(ext for files in samples.values() for ext in files if not is_image(ext))
    for ext, count in list(counts.items()):
        if "." in ext:
            counts[ext.rpartition(".")[2]] += count
    return [ext for ext, _ in counts.most_common(MOST_LABELS)]


def keys_by_offset(path: str) -> dict[int, str]:
    """The key of every member of a tar, by the offset of its content."""
    with _Open(path) as file:
        return {member.offset: base_plus_ext(member.name)[0] or member.name for member in Walk(file.fd, file.size)}


def samples_of(path: str, problems: list[Problem]) -> dict[str, dict[str, tuple[int, int]]]:
    """{key: {extension: (offset, size)}} of every sample of a tar, with or without an image; errors as `index_tar`."""
    with _Open(path) as file:
        walk = Walk(file.fd, file.size)
        samples = _samples(_named(walk, problems), problems)
    problems += [Problem(damage.reason, damage.where) for damage in walk.damage if damage.num_bytes]
    return {key: {ext: (place.offset, place.size) for ext, place in files.items()} for key, files in samples.items()}


def image_extension(extensions, arrays: bool = False) -> str | None:
    """Which of a sample's extensions is its image: `jpg` before `png`, both before `left.jpg`. arrays: `npy` alone."""
    known = (ARRAY_EXTENSION,) if arrays else IMAGE_EXTENSIONS
    for extension in known:
        if extension in extensions:
            return extension
    return next((ext for ext in extensions if is_image(ext, known)), None)


def passed_over(name: str) -> bool:
    """Whether a member is no part of a data set: a hidden file, what desktops leave behind, webdataset's own notes."""
    folder, _, file = name.rpartition("/")
    return file.startswith(".") or _is_of_desktops(folder) or file.lower() in DESKTOP_FILES or bool(_META.match(name))


@functools.lru_cache(1024)
def _is_of_desktops(folder: str) -> bool:
    return not DESKTOP_FOLDERS.isdisjoint(folder.lower().split("/"))


# ---- members into samples


def _named(walk: Walk, problems: list[Problem]) -> Iterable[tuple[str, str, str, _Place]]:
    """(key, extension, name, place) of every member that can be part of a sample."""
    for member in walk:
        moved()
        key, extension = base_plus_ext(member.name)
        if key is None or passed_over(member.name):
            continue
        extension = extension.lower()
        if member.is_file:
            yield key, extension, member.name, _Place(member.offset, member.size, zlib.crc32(member.tail))
        elif is_image(extension):
            problems.append(Problem("a link and not a file", member.name))


def _samples(members: Iterable, problems: list[Problem]) -> dict[str, dict[str, _Place]]:
    """Places by extension by key. A second run of neighbours under a key completes its sample, if it has what is
    missing there; else it is a sample of its own whose key is taken."""
    samples: dict[str, dict[str, _Place]] = {}
    for key, run in groupby(members, key=lambda member: member[0]):
        files: dict[str, _Place] = {}
        for _, extension, name, place in run:
            if extension in files:
                problems.append(Problem("duplicate member", name))
            else:
                files[extension] = place
        known = samples.setdefault(key, {})
        if known.keys() & files.keys() or (_has_image(known) and _has_image(files) and not all(map(is_image, files))):
            problems.append(Problem("duplicate key", key))
        else:
            known.update(files)
    return samples


def _with_image(
    samples: dict, arrays_are_labels: bool, named: str, problems: list[Problem]
) -> Iterable[tuple[str, dict]]:
    """(extension of the image, places by extension) of every sample that has one image, or the one that is named.
    Arrays are images in a shard that has no others, and only where they are not the labels."""
    arrays = not arrays_are_labels and not any(map(_has_image, samples.values()))
    known = (ARRAY_EXTENSION,) if arrays else IMAGE_EXTENSIONS
    for key, files in samples.items():
        extension = (named if named in files else None) if named else image_extension(files, arrays)
        images = 1 if named else sum(is_image(ext, known) for ext in files)
        if extension is None:
            problems.append(Problem(f"no .{named} member" if named else "no image", key))
        elif "." in extension and images > 1:  # `photo.1.jpg`, `photo.2.jpg`
            where = f"{key} (a key ends at the first dot of a file's name)"
            problems.append(Problem(SEVERAL, where, images))
        elif files[extension].size == 0 or files[extension].size > MAX_IMAGE_BYTES:
            reason = "image too large" if files[extension].size else "empty image"
            problems.append(Problem(reason, f"{key}.{extension}"))
        else:
            yield extension, files


def _label_of(files: dict, image: str, label: str) -> _Place:
    """`a.cls` before `a.left.cls`, which is that of `a.left.jpg`."""
    between = image.rpartition(".")[0]
    return files.get(label) or files.get(f"{between}.{label}") or _NOWHERE


def _has_image(extensions) -> bool:
    return any(map(is_image, extensions))


def is_image(extension: str, known: tuple[str, ...] = IMAGE_EXTENSIONS) -> bool:
    return extension.rpartition(".")[2] in known


def _table(places: list[_Place]) -> np.ndarray:
    return np.array([place[:2] for place in places], np.int64).reshape(-1, 2)


# ---- damage, content


def _told(damage: Damage, bytes_a_sample: float) -> Problem | None:
    """None where it has cost nothing and is nothing strange."""
    lost = round(damage.num_bytes / bytes_a_sample) if bytes_a_sample else 1
    if damage.reason == "nothing but an end" and not lost:
        return None
    return Problem(damage.reason, damage.where, max(lost, damage.at_least))


def _middle(fd: int, place: _Place) -> int:
    """Checksum of bytes in the middle of an image; 0 where its end is all of it."""
    if place.size <= TAIL:
        return 0
    return zlib.crc32(os.pread(fd, min(TAIL, place.size), place.offset + (place.size - TAIL) // 2))


def _hash(checksums: list[int]) -> str:
    return hashlib.blake2b(np.array(checksums, "<u4").tobytes(), digest_size=16).hexdigest()


class _Open:
    def __init__(self, path: str):
        self.path = path

    def __enter__(self) -> "_Open":
        self.fd = open_shard(self.path)
        try:
            self.size = os.fstat(self.fd).st_size
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead: headers lie far apart
            _refuse_compressed(self.path, os.pread(self.fd, 8, 0))
        except BaseException:
            os.close(self.fd)
            raise
        return self

    def __exit__(self, *_) -> None:
        os.close(self.fd)


def _refuse_compressed(path: str, start: bytes) -> None:
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"{path} is compressed with {name}, and images inside cannot be read by their byte offset; "
                f"write an uncompressed tar (images gain nothing from it)."
            )
