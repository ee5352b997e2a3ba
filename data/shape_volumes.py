"""Volumes made on the spot, as the pictures of `data.shapes` are: labelled, grey, `.npy` members of shards.

Each volume shows one solid (a ball, a box or a cylinder) of a patterned stuff in an empty room, turned, shifted and
scaled. The label is the kind of pattern. Outline, place, direction, pitch and phase of the pattern, brightness, sign of
its contrast and the slope of the light are drawn independently of it, so raw voxels say little.

- Sample `index` of a split is a function of (seed, split, index, size) alone.
- Every six consecutive samples hold each class once.
- What lies outside of the solid is 0, as outside of a body. Inside there is noise.
"""

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from prelude.data.errors import UserError
from prelude.data.shapes import SPLITS, Draws, check, tar_of, written_once

CLASSES = ("layers", "rods", "balls", "shells", "checks", "waves")
SOLIDS = ("ball", "box", "cylinder")

_VERSION = 1  # raised whenever a voxel or a member changes
_STREAM = 104729  # of the seed: apart from the pictures' draws
_CHUNK = 16  # volumes made at once


def make(split: str, indices: np.ndarray, seed: int = 0, size: tuple[int, int, int] = (32, 32, 16)):
    """Volumes (N, H, W, Z) uint8 and labels (N,) int64."""
    indices = np.asarray(indices, np.int64)
    labels = indices % len(CLASSES)
    draws = Draws(seed + _STREAM, SPLITS.index(split), indices)
    axes = [(np.arange(side, dtype=np.float32) + 0.5) / side - 0.5 for side in size]
    grid = np.stack(np.broadcast_arrays(*np.ix_(*axes)))  # (3, H, W, Z), in volume widths from the centre
    voxel = 1 / max(size)

    place = np.stack([draws.between(-0.1, 0.1) for _ in range(3)], -1)  # (N, 3)
    at = grid[None] - place[..., None, None, None]  # (N, 3, H, W, Z)
    cover = _solid(draws.below(len(SOLIDS)), np.einsum("nij,nj...->ni...", _turns(draws), at), draws, voxel)
    pattern = _pattern(labels, np.einsum("nij,nj...->ni...", _turns(draws), at), draws, voxel)
    contrast = draws.between(0.12, 0.22) * np.where(draws.between(0, 1) < 0.5, -1, 1)
    light = sum(_along(draws.between(-0.15, 0.15)) * grid[axis] for axis in range(3))
    tone = _along(draws.between(0.4, 0.6)) + _along(contrast) * pattern + light
    values = cover * (tone + 0.04 * _grains(indices, seed, split, size))
    return (np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8), labels


def write_volumes(
    folder: str | Path,
    split: str,
    num_samples: int,
    seed: int = 0,
    size: tuple[int, int, int] = (32, 32, 16),
    samples_per_shard: int = 500,
) -> list[Path]:
    """Writes `volumes-SPLIT-000000.tar`, ... into `folder`, each sample a `.npy` and its `.cls`; returns the shards.

    Nothing is written when the same volumes are already there. Raises UserError as `shapes.write_shards` does.
    """
    check(split, num_samples, seed, max(size), samples_per_shard)
    if min(size) < 8:
        raise UserError(f"Volumes of shapes cannot be made with {min(size)} voxels along an axis; write 8 or more.")
    wanted = {"version": _VERSION, "num_samples": num_samples, "seed": seed, "size": list(size)}
    made = partial(_shard, split, seed=seed, size=size)
    return written_once(Path(folder), f"volumes-{split}", wanted, samples_per_shard, made)


def _shard(split: str, start: int, stop: int, seed: int, size: tuple[int, int, int]) -> bytes:
    def samples() -> Iterator[dict]:
        for first in range(start, stop, _CHUNK):
            indices = np.arange(first, min(first + _CHUNK, stop))
            for index, volume, label in zip(indices, *make(split, indices, seed, size), strict=True):
                member = io.BytesIO()
                np.save(member, volume)
                yield {"__key__": f"{split}-{index:06d}", "npy": member.getvalue(), "cls": b"%d" % label}

    return tar_of(samples())


def _solid(kind: np.ndarray, at: np.ndarray, draws: Draws, voxel: float) -> np.ndarray:
    """How much of each voxel it fills, (N, H, W, Z) in [0, 1]."""
    size, x, y, z = draws.between(0.3, 0.42), *np.moveaxis(at, 1, 0)
    round_ = np.sqrt(x**2 + y**2)
    depth = np.select(
        [_along(kind == 0) > 0, _along(kind == 1) > 0],
        [_along(size) - np.sqrt(round_**2 + z**2), _along(0.8 * size) - np.abs(at).max(1)],
        np.minimum(_along(0.8 * size) - round_, _along(size) - np.abs(z)),
    )
    return np.clip(0.5 + depth / voxel, 0, 1)


def _pattern(labels: np.ndarray, at: np.ndarray, draws: Draws, voxel: float) -> np.ndarray:
    """Of each sample's class, (N, H, W, Z) from -1 to 1."""
    period = draws.between(0.24, 0.34)
    phases = np.stack([draws.between(0, 1) for _ in range(3)], -1)  # (N, 3), in periods
    turned = at / _along(period)[:, None] + phases[..., None, None, None]
    centre = np.stack([draws.between(-0.3, 0.3) for _ in range(3)], -1)[..., None, None, None]
    radius = np.sqrt(((at - centre) ** 2).sum(1)) / _along(period)
    inside = np.empty(radius.shape, np.float32)
    for label, kind in enumerate(CLASSES):
        of = labels == label
        inside[of] = _inside(kind, turned[of], radius[of])
    return np.clip(2 * inside * _along(period) / voxel, -1, 1)  # edges about a voxel wide


def _inside(kind: str, at: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """How deep a point lies inside the figures of a pattern, in periods. at: (n, 3, H, W, Z)."""
    u, v, w = np.moveaxis(at - np.floor(at) - 0.5, 1, 0)
    match kind:
        case "layers":
            return 0.25 - np.abs(u)
        case "rods":
            return 0.38 - np.hypot(u, v)
        case "balls":
            return 0.45 - np.sqrt(u**2 + v**2 + w**2)
        case "shells":
            return 0.25 - np.abs(radius - np.floor(radius) - 0.5)
        case "checks":
            sides = np.stack([0.25 - np.abs(side) for side in (u, v, w)])
            return np.sign(sides).prod(0) * np.abs(sides).min(0)
        case "waves":  # the gyroid
            x, y, z = np.moveaxis(2 * np.pi * at / 1.5, 1, 0)
            return (np.sin(x) * np.cos(y) + np.sin(y) * np.cos(z) + np.sin(z) * np.cos(x)) / 6
    raise ValueError(kind)


def _turns(draws: Draws) -> np.ndarray:
    """(N, 3, 3) rotations, uniform over all, from quaternions (Shoemake 1992)."""
    share, one, two = draws.between(0, 1), 2 * np.pi * draws.between(0, 1), 2 * np.pi * draws.between(0, 1)
    a, b = np.sqrt(1 - share), np.sqrt(share)
    x, y, z, w = a * np.sin(one), a * np.cos(one), b * np.sin(two), b * np.cos(two)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows, np.float32), 2, 0)


def _grains(indices: np.ndarray, seed: int, split: str, size: tuple[int, int, int]) -> np.ndarray:
    """(N, H, W, Z) float32 from -1 to 1, independent from voxel to voxel."""
    voxels = np.arange(int(np.prod(size)), dtype=np.int64)
    of_voxels = Draws(seed + 2 * _STREAM, SPLITS.index(split), (indices[:, None] * len(voxels) + voxels).ravel())
    return of_voxels.between(-1, 1).reshape(len(indices), *size)


def _along(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)[:, None, None, None]
