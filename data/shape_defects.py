"""Pictures of the embedded data set with drawn defects, and masks that say where: for what is to find anomalies.

- The pictures are those of `data.shapes`. In every second ten of them each has one defect near its middle: a scratch, a
  blot, or a disc of the picture turned by a right angle, whose colours are right and whose pattern is not.
- A mask is 1 where a defect covers half of a pixel or more; pictures without a defect have none.
- A sample is a function of (seed, split, index, image_size) alone, as there.
"""

from pathlib import Path

import numpy as np

from prelude.data.kept_files import keep
from prelude.data.shapes import CLASSES, SPLITS, Draws, check, jpeg_of, paint, png_of, tar_of

KINDS = ("scratch", "blot", "turned")
MASK = "defect.png"  # extension of a mask's member
_STREAM = 7919  # of the seed: apart from the pictures' draws


def paint_defects(
    split: str, indices: np.ndarray, seed: int = 0, image_size: int = 32
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures (N, H, W, 3) uint8, class labels (N,) int64 and masks (N, H, W) uint8 of 0 and 1."""
    indices = np.asarray(indices, dtype=np.int64)
    pictures, labels = paint(split, indices, seed, image_size)
    draws = Draws(seed + _STREAM, SPLITS.index(split), indices)
    axis = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size - 0.5
    x, y = np.broadcast_arrays(axis[None, None, :], axis[None, :, None])
    dx, dy = (at - draws.between(-0.18, 0.18)[:, None, None] for at in (x, y))  # from the defect's middle
    turn, size = draws.between(0, np.pi), draws.between(0.0, 1.0)
    along = np.cos(turn)[:, None, None] * dx + np.sin(turn)[:, None, None] * dy
    across = np.cos(turn)[:, None, None] * dy - np.sin(turn)[:, None, None] * dx
    length, radius = 0.15 + 0.12 * size, 0.07 + 0.06 * size
    scratch = np.minimum(0.022 - np.abs(across), length[:, None, None] - np.abs(along))
    disc = radius[:, None, None] - np.hypot(dx, dy)
    kind = draws.below(len(KINDS))[:, None, None]
    depth = np.where(kind == 0, scratch, np.where(kind == 2, disc + 0.04, disc))  # a turned disc is larger
    cover = np.clip(0.5 + depth * image_size, 0, 1)
    cover[(indices // len(CLASSES)) % 2 == 0] = 0
    tone = 255 * draws.tone(0.05, 0.95).clip(0, 1)[:, None, None]
    paint_over = np.where(kind[..., None] == 2, pictures.transpose(0, 2, 1, 3)[:, ::-1].astype(np.float32), tone)
    drawn = pictures + cover[..., None] * (paint_over - pictures)
    return (drawn + 0.5).astype(np.uint8), labels, (cover >= 0.5).astype(np.uint8)


def write_defects(folder: str | Path, split: str, num_samples: int, seed: int = 0, image_size: int = 32) -> Path:
    """Writes `defects-SPLIT.tar`, each sample a `.jpg`, its `.cls` and, of a picture with a defect, its `.defect.png`.

    Raises UserError as `shapes.write_shards` does.
    """
    check(split, num_samples, seed, image_size, num_samples)
    path, samples = Path(folder) / f"defects-{split}.tar", []
    painted = paint_defects(split, np.arange(num_samples), seed, image_size)
    for index, (picture, label, mask) in enumerate(zip(*painted, strict=True)):
        members = {"jpg": jpeg_of(picture), "cls": b"%d" % label} | ({MASK: png_of(mask)} if mask.any() else {})
        samples.append({"__key__": f"defects-{split}-{index:06d}", **members})
    keep(path, tar_of(samples))
    return path
