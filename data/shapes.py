"""The embedded data set: labelled pictures made on the spot, so that nothing has to be downloaded.

Each picture shows one large shape cut from a patterned cloth, turned, shifted, scaled and often partly hidden,
with a few small shapes strewn about. The label is the kind of pattern. The outline, the place, the colours, the
direction of contrast, the pitch and the phase of the pattern and the light are drawn independently of it, so raw
pixels say little: what tells the kinds apart is how neighbouring patches continue one another.

- Sample `index` of a split is a function of (seed, split, index, image_size) alone: a data set of 2,000 starts
  with the data set of 1,000. Every draw is a counter-based hash, so no generator has a state to keep.
- Every ten consecutive samples hold each class once.
- A mask says what each pixel shows most of: the ground, the cloth by its kind, a strewn shape, or the bar. It comes
  from how much of the pixel each layer covers, before JPEG.
- `write_shards` writes the same bytes each time, and never leaves a half-written shard under its final name.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset import TarWriter

from prelude.data.errors import UserError, cause_of
from prelude.data.kept_files import keep

CLASSES = ("vertical", "horizontal", "diagonal", "zigzag", "rings", "checks", "grid", "bricks", "dots", "hoops")
SPLITS = ("train", "test")
MASKED = ("ground", *CLASSES, "strewn", "bar")  # what the numbers in a mask mean

_VERSION = 2  # raised whenever a pixel or a member changes, so that older shards are written anew
_CHUNK = 250  # pictures painted at once: large enough for numpy, small enough for the cache
_NUM_STREWN = 2
_OUTLINES = np.array([3, 4, 5, 6, 60])  # corners of the large shape; sixty make a disc


def write_shards(
    folder: str | Path, split: str, num_samples: int, seed: int = 0, image_size: int = 32, samples_per_shard: int = 500
) -> list[Path]:
    """Writes `SPLIT-000000.tar`, ... into `folder`, each sample a `.jpg`, its `.cls`, and its mask as a `.png`;
    returns the shards in order.

    Nothing is written when the same data set is already there; another made-up one of the same split is replaced.
    Raises UserError for an unknown split, a count, seed or size that cannot be drawn, and where shards of other images
    have these names.
    """
    check(split, num_samples, seed, image_size, samples_per_shard)
    wanted = {"version": _VERSION, "num_samples": num_samples, "seed": seed, "image_size": image_size}
    made = partial(_shard, split, seed=seed, image_size=image_size)
    return written_once(Path(folder), split, wanted, samples_per_shard, made)


def written_once(
    folder: Path, name: str, wanted: dict, samples_per_shard: int, made: Callable[[int, int], bytes]
) -> list[Path]:
    """Shards `name`-N.tar, unless those that are there were made as `wanted` says. made: a shard of samples from the
    first number up to the second. Raises UserError where shards of that name were made by something else, and where
    nothing can be written."""
    record = folder / f"{name}.json"  # has sizes last: where they are those of the shards, these are complete
    num_samples = wanted["num_samples"]
    starts = range(0, num_samples, samples_per_shard)
    shards = [folder / f"{name}-{number:06d}.tar" for number in range(len(starts))]
    before, there = recorded(record), sorted(folder.glob(f"{name}-*.tar"))
    if before == {**wanted, "sizes": sizes_of(shards)}:
        return shards
    others = [*there, record] if record.exists() else there
    if others and not (isinstance(before, dict) and {"version", "num_samples"} <= before.keys()):
        raise UserError(f"{others[0]} is there already and is no made-up data; write another folder.")
    try:
        keep(record, json.dumps(wanted).encode())
        for stale in set(there) - set(shards):
            stale.unlink(missing_ok=True)
        for shard, start in zip(shards, starts, strict=True):
            keep(shard, made(start, min(start + samples_per_shard, num_samples)))
        keep(record, json.dumps({**wanted, "sizes": sizes_of(shards)}).encode())
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({cause_of(error)}); make room there, or write another folder."
        ) from None
    return shards


def paint(split: str, indices: np.ndarray, seed: int = 0, image_size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """The pictures (N, H, W, 3) uint8 and labels (N,) int64 of samples `indices` of a split."""
    return paint_with_masks(split, indices, seed, image_size)[:2]


def paint_with_masks(
    split: str, indices: np.ndarray, seed: int = 0, image_size: int = 32
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same, and the masks (N, H, W) uint8, places in `MASKED`."""
    indices = np.asarray(indices, dtype=np.int64)
    labels = indices % len(CLASSES)
    draws = Draws(seed, SPLITS.index(split), indices)
    axis = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size - 0.5
    x, y = np.broadcast_arrays(axis[None, None, :], axis[None, :, None])  # (1, H, W), in image widths from the centre

    canvas = draws.tone(0.15, 0.85)[:, None, None] + _light(draws, x, y, 0.5)[..., None]  # (N, H, W, 3)
    contrast = draws.between(0.15, 0.3) * np.where(draws.between(0, 1) < 0.5, -1, 1)
    contrast = contrast[:, None] + 0.08 * draws.colour()  # (N, 3)
    cloth = draws.tone(0.2, 0.8)[:, None, None] + _light(draws, x, y, 0.4)[..., None]
    cloth = cloth + _pattern(draws, labels, x, y, image_size)[..., None] * contrast[:, None, None]
    corners = _OUTLINES[draws.below(len(_OUTLINES))]
    covers = [_polygon(draws, corners, x, y, 0.12, (0.4, 0.52), image_size)]
    _lay(canvas, covers[0], cloth)

    for _ in range(_NUM_STREWN):
        cover = _polygon(draws, _OUTLINES[draws.below(len(_OUTLINES))], x, y, 0.5, (0.04, 0.08), image_size)
        covers.append(cover)
        _lay(canvas, cover, draws.tone(0.2, 0.8)[:, None, None])
    covers.append(_bar(draws, x, y, image_size))
    _lay(canvas, covers[-1], draws.tone(0.2, 0.8)[:, None, None])
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8), labels, _mask(covers, labels)


def _mask(covers: list[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """(N, H, W) uint8 places in `MASKED`. covers: (N, H, W) in [0, 1], of the cloth, the strewn shapes and the bar,
    from the ground up; each shows as far as those above leave it."""
    seen, left = [], np.ones_like(covers[0])
    for cover in reversed(covers):
        seen.append(cover * left)
        left = left * (1 - cover)
    bar, *strewn, cloth = seen
    shown = np.stack([left, cloth, sum(strewn), bar]).argmax(0)  # (N, H, W)
    first = len(CLASSES) + 1
    numbers = np.stack(
        [np.zeros_like(labels), 1 + labels, np.full_like(labels, first), np.full_like(labels, first + 1)]
    )
    return np.take_along_axis(numbers[:, :, None, None], shown[None], 0)[0].astype(np.uint8)


def _pattern(draws: "Draws", labels: np.ndarray, x: np.ndarray, y: np.ndarray, image_size: int) -> np.ndarray:
    """The cloth of each sample's class, (N, H, W) from -1 to 1, up to 20 degrees off the upright."""
    turn, period = draws.between(-0.35, 0.35), draws.between(0.19, 0.28)
    along, across = _column(np.cos(turn) / period), _column(np.sin(turn) / period)
    u = along * x + across * y + _column(draws.between(0, 2))  # in periods
    v = along * y - across * x + _column(draws.between(0, 2))
    centre_x, centre_y = _column(draws.between(-0.5, 0.5)), _column(draws.between(-0.5, 0.5))
    radius = np.hypot(x - centre_x, y - centre_y) / _column(period) + _column(draws.between(0, 1))
    inside = np.empty(u.shape, np.float32)
    for label, kind in enumerate(CLASSES):
        of = labels == label
        inside[of] = _inside(kind, u[of], v[of], radius[of])
    return np.clip(2 * inside * _column(period) * image_size, -1, 1)  # edges one pixel wide


def _inside(kind: str, u: np.ndarray, v: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """How deep a point lies inside the figures of a pattern, in periods; negative outside. Arrays of one shape."""
    du, dv = _to_middle(u), _to_middle(v)
    match kind:
        case "vertical":
            return 0.25 - np.abs(du)
        case "horizontal":
            return 0.25 - np.abs(dv)
        case "diagonal":
            return (0.25 - np.abs(_to_middle(u + v))) * 0.7
        case "zigzag":
            return (0.25 - np.abs(_to_middle(v + np.abs(du)))) * 0.7
        case "rings":
            return 0.25 - np.abs(_to_middle(radius))
        case "checks":
            column, row = 0.25 - np.abs(du), 0.25 - np.abs(dv)
            return np.sign(column * row) * np.minimum(np.abs(column), np.abs(row))
        case "grid":
            return np.maximum(0.13 - np.abs(du), 0.13 - np.abs(dv))
        case "bricks":  # upright joints two periods apart, shifted by one period from course to course
            joint = 2 * _to_middle(u / 2 + 0.5 * (np.floor(v) % 2))
            return np.maximum(0.13 - np.abs(joint), np.abs(dv) - 0.37)
        case "dots":
            return 0.32 - np.hypot(du, dv)
        case "hoops":
            return 0.1 - np.abs(np.hypot(du, dv) - 0.27)
    raise ValueError(kind)


def _to_middle(t: np.ndarray) -> np.ndarray:
    """From the middle of the period that holds t to t, in [-0.5, 0.5)."""
    return t - np.floor(t) - 0.5


def _polygon(draws, corners, x, y, reach, sizes, image_size) -> np.ndarray:
    """How much of each pixel a turned regular polygon covers, (N, H, W) in [0, 1].

    corners: (N,); reach: how far the centre strays from the middle; sizes: range of the radius of the disc of the
    same area. Both in image widths.
    """
    place_x, place_y = draws.between(-reach, reach), draws.between(-reach, reach)
    dx, dy = x - _column(place_x), y - _column(place_y)
    sector = 2 * np.pi / corners
    apothem = draws.between(*sizes) * np.sqrt(np.pi / (corners * np.tan(sector / 2)))
    angle = (np.arctan2(dy, dx) + _column(draws.between(0, 2 * np.pi))) % _column(sector) - _column(sector / 2)
    return np.clip(0.5 + (_column(apothem) - np.hypot(dx, dy) * np.cos(angle)) * image_size, 0, 1)


def _bar(draws: "Draws", x: np.ndarray, y: np.ndarray, image_size: int) -> np.ndarray:
    """A bar right across two pictures in five, (N, H, W) in [0, 1]."""
    turn, offset = draws.between(0, np.pi), draws.between(-0.3, 0.3)
    half_width = np.where(draws.between(0, 1) < 0.4, draws.between(0.03, 0.06), -1.0)
    distance = np.abs(_column(np.cos(turn)) * x + _column(np.sin(turn)) * y - _column(offset))
    return np.clip(0.5 + (_column(half_width) - distance) * image_size, 0, 1)


def _light(draws: "Draws", x: np.ndarray, y: np.ndarray, strength: float) -> np.ndarray:
    """A slope of brightness, (N, H, W)."""
    return _column(draws.between(-strength, strength)) * x + _column(draws.between(-strength, strength)) * y


def _lay(canvas: np.ndarray, cover: np.ndarray, paint: np.ndarray) -> None:
    """Lays `paint` over (N, H, W, 3) `canvas` where `cover` (N, H, W) says so, in place."""
    canvas += cover[..., None] * (paint - canvas)


def _column(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)[:, None, None]


class Draws:
    """Uniform draws for N samples: draw number k of a sample is a hash of (seed, split, index, k)."""

    def __init__(self, seed: int, split: int, indices: np.ndarray):
        key = np.array([len(SPLITS) * seed + split], dtype=np.uint64)
        self._state = _mix(_mix(key) + indices.astype(np.uint64))  # (N,)
        self._count = 0

    def between(self, low: float, high: float) -> np.ndarray:
        """(N,) float32."""
        self._count += 1
        bits = _mix(self._state + np.uint64(self._count)) >> np.uint64(40)
        return (low + (high - low) * (bits * 2.0**-24)).astype(np.float32)

    def below(self, count: int) -> np.ndarray:
        """(N,) int64 in 0..count-1."""
        return np.minimum(self.between(0, count).astype(np.int64), count - 1)

    def colour(self) -> np.ndarray:
        """(N, 3) float32 in [-1, 1]."""
        return np.stack([self.between(-1, 1) for _ in range(3)], -1)

    def tone(self, low: float, high: float) -> np.ndarray:
        """(N, 3) float32: a grey between `low` and `high`, tinted."""
        return self.between(low, high)[:, None] + 0.22 * self.colour()


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64: a step of the counter, then the finaliser. Arrays of uint64 wrap around silently."""
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def check(split: str, num_samples: int, seed: int, image_size: int, samples_per_shard: int) -> None:
    if split not in SPLITS:
        raise UserError(f"The shapes have no split {split!r}; write one of: {', '.join(SPLITS)}.")
    for name, value, least in (
        ("num_samples", num_samples, 1),
        ("seed", seed, 0),
        ("image_size", image_size, 16),
        ("samples_per_shard", samples_per_shard, 1),
    ):
        if value < least:
            raise UserError(f"The shapes cannot be painted with {name}={value}; write {least} or more.")


def _shard(split: str, start: int, stop: int, seed: int, image_size: int) -> bytes:
    def samples() -> Iterator[dict]:
        for first in range(start, stop, _CHUNK):
            indices = np.arange(first, min(first + _CHUNK, stop))
            painted = paint_with_masks(split, indices, seed, image_size)
            for index, picture, label, mask in zip(indices, *painted, strict=True):
                members = {"jpg": jpeg_of(picture), "cls": b"%d" % label, "png": png_of(mask)}
                yield {"__key__": f"{split}-{index:06d}", **members}

    return tar_of(samples())


def tar_of(samples: Iterable[dict]) -> bytes:
    """The same bytes whenever and by whomever it is made."""
    out = io.BytesIO()
    with TarWriter(out, encoder=False, mtime=0, user="", mode=0o644) as tar:
        for sample in samples:
            tar.write(sample)
    return out.getvalue()


def jpeg_of(picture: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


def png_of(mask: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(mask).save(out, "PNG")
    return out.getvalue()


def recorded(record: Path) -> dict | None:
    try:
        return json.loads(record.read_text())
    except (OSError, ValueError):
        return None


def sizes_of(shards: list[Path]) -> list[int]:
    return [shard.stat().st_size if shard.is_file() else -1 for shard in shards]
