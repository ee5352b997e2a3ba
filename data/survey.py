"""What the images of a data set are like: sizes, channels, depths, colours, classes, damage and duplicates.

- Means and standard deviations are those of pixels in [0, 1] after decoding, every image counting alike.
- Byte-identical images have one hash of their bytes; near-identical ones a perceptual hash that differs in few of 64
  bits (`imagehash`'s pHash). Nothing is taken for a duplicate that was not decoded.
"""

import hashlib
import importlib.util
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image

from prelude.data.class_names import plain_reader
from prelude.data.decode import BadImage, decode
from prelude.data.open_files import OpenFiles
from prelude.data.packing.images import form_of
from prelude.data.shards import ShardIndex

NEAR_BITS = 3
"""Of the 64 of a perceptual hash, in which near-identical images differ at most."""

_VALUES = np.arange(256) / 255
_CHUNK = 1024


class _Seen(NamedTuple):
    """One image."""

    sample: int
    reason: str | None = None  # why it cannot be decoded
    form: tuple | None = None  # format, channels, bits, frames
    size: tuple[int, int] = (0, 0)  # height, width
    mean: np.ndarray | None = None  # (C,) of its pixels
    square: np.ndarray | None = None  # (C,) mean of the squares
    label: str | None = None
    digest: bytes = b""
    perceptual: int | None = None


@dataclass
class Survey:
    num_images: int = 0  # that could be decoded
    undecodable: list[tuple[int, str]] = field(default_factory=list)  # (sample, reason)
    forms: Counter = field(default_factory=Counter)  # (format, channels, bits, frames)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (height, width)
    classes: Counter = field(default_factory=Counter)  # images by label
    mean: np.ndarray | float = 0.0  # (C,)
    std: np.ndarray | float = 0.0  # (C,)
    identical: list[list[int]] = field(default_factory=list)  # groups of samples
    near: list[tuple[int, int]] = field(default_factory=list)  # pairs that are not identical
    looked_for_near: bool = False


def survey(
    index: ShardIndex,
    samples: np.ndarray,
    *,
    channels: int = 3,
    threads: int = 1,
    duplicates: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> Survey:
    """Reads and decodes `samples` (ids) of an index, with so many channels; labels are those of the index.

    duplicates: whether to look for them, which takes 24 bytes of memory an image. progress: called after each image.
    """
    files, near = OpenFiles(index.paths), duplicates and importlib.util.find_spec("imagehash") is not None
    read_label = plain_reader(index) if index.label and (index.labels[:, 0] >= 0).any() else None
    found, square = Survey(looked_for_near=near), 0.0
    digests, hashes = defaultdict(list), {}
    look = lambda sample: _look(index, files, read_label, sample, channels, duplicates, near)  # noqa: E731
    for seen in _in_chunks(look, samples.tolist(), threads):
        progress()
        if seen.reason:
            found.undecodable.append((seen.sample, seen.reason))
            continue
        found.num_images += 1
        found.forms[seen.form] += 1
        found.sizes.append(seen.size)
        found.mean, square = found.mean + seen.mean, square + seen.square
        if seen.label is not None:
            found.classes[seen.label] += 1
        if duplicates:
            digests[seen.digest].append(seen.sample)
            if seen.perceptual is not None and len(digests[seen.digest]) == 1:
                hashes[seen.sample] = seen.perceptual
    if found.num_images:
        found.mean /= found.num_images
        found.std = np.sqrt(np.maximum(square / found.num_images - found.mean**2, 0))
    found.identical = [group for group in digests.values() if len(group) > 1]
    found.near = near_pairs(list(hashes), np.array(list(hashes.values()), np.uint64))
    return found


def near_pairs(samples: Sequence[int], hashes: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of samples whose hashes (n,) uint64 differ in NEAR_BITS at most; of several with one hash, the first stands
    for all and is paired with each of the others.

    Of NEAR_BITS + 1 parts of such hashes one is the same, so that only images with a part in common are compared.
    """
    hashes, first_with, which = np.unique(hashes, return_index=True, return_inverse=True)
    alike = [(int(first_with[w]), n) for n, w in enumerate(which.tolist()) if first_with[w] != n]
    pairs = set()
    width = 64 // (NEAR_BITS + 1)
    for part in range(NEAR_BITS + 1):
        values = (hashes >> np.uint64(part * width)) & np.uint64(2**width - 1)
        order = np.argsort(values, kind="stable")
        starts = np.flatnonzero(np.diff(values[order])) + 1
        for members in np.split(order, starts):
            for place, first in enumerate(members[:-1].tolist()):
                others = members[place + 1 :]
                differing = np.bitwise_count(hashes[others] ^ hashes[first])
                pairs |= {(min(first, o), max(first, o)) for o in others[differing <= NEAR_BITS].tolist()}
    differing = [tuple(sorted((int(first_with[a]), int(first_with[b])))) for a, b in pairs]
    return sorted((samples[a], samples[b]) for a, b in alike + differing)


def spread(num_samples: int, count: int) -> np.ndarray:
    """(n,) int64: `count` ids evenly over a data set, or all of a smaller one."""
    return np.unique(np.linspace(0, num_samples - 1, min(count, num_samples)).astype(np.int64))


def _in_chunks(look, samples: list[int], threads: int) -> Iterator[_Seen]:
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(samples), _CHUNK):
            yield from pool.map(look, samples[start : start + _CHUNK])


def _look(
    index: ShardIndex, files: OpenFiles, read_label, sample: int, channels: int, duplicates: bool, near: bool
) -> _Seen:
    shard = int(np.searchsorted(index.ends, sample, side="right"))
    try:
        content = files.read(shard, *index.images[sample].tolist())
        pixels = decode(content, value_range=index.value_range, channels=channels, max_pixels=index.max_pixels)
        form = form_of(content)
    except BadImage as error:
        return _Seen(sample, str(error))
    label = None
    if read_label and index.labels[sample, 0] >= 0:
        try:
            label = str(read_label.plain(files.read(shard, *index.labels[sample].tolist())))
        except BadImage:
            pass  # it is counted as unlabelled
    mean, square = _moments(pixels)
    return _Seen(
        sample, None, (form.format, form.channels, form.bits, form.frames), pixels.shape[:2], mean, square,
        label, hashlib.blake2b(content, digest_size=16).digest() if duplicates else b"",
        _perceptual(pixels) if near else None,
    )  # fmt: skip


def _moments(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and mean of the squares of each channel, in [0, 1], each (C,)."""
    if pixels.dtype != np.uint8:
        values = pixels.reshape(-1, pixels.shape[2]).astype(np.float64) / 255
        return values.mean(0), np.square(values).mean(0)
    counts = np.stack(
        [np.bincount(channel.ravel(), minlength=256) for channel in pixels.transpose(2, 0, 1)]
    )  # (C, 256)
    shares = counts / counts.sum(1, keepdims=True)
    return shares @ _VALUES, shares @ _VALUES**2


def _perceptual(pixels: np.ndarray) -> int:
    import imagehash

    if pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        pixels = pixels.mean(2).astype(np.uint8)
    bits = imagehash.phash(Image.fromarray(pixels)).hash.ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
