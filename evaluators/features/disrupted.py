"""Images whose global shape is gone and whose local texture is not: tiles of a grid, permuted.

- A grid of k x k tiles is permuted at random, twice. A tile lies in three different places in the image and its two
  disruptions: no two of them have a tile in common, which alone would make them alike.
- Seams are blended: near them the image is a blurred copy of itself. The image as it was is blended along the same
  grid, so that the blur itself tells nothing apart.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from prelude.pretrain.draws import random_bits

STREAM = 211  # of pretrain.draws
SEAM = 0.06  # of a tile's side: how far the blur reaches


def triplets(images: Tensor, seeds: Tensor, tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    """(original, disrupted, disrupted otherwise), each (B, C, H, W), of images whose sides `tiles` divides.

    seeds: (B,), which decide the permutations.
    """
    first, second = (permuted(images, order, tiles) for order in derangements(seeds, tiles * tiles))
    return tuple(blended(one, tiles) for one in (images, first, second))


def derangements(seeds: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Two (B, count) permutations without a fixed point, which differ everywhere: along a random cycle of the places,
    each takes the tile of the one before, or of the one after. count: 3 or more."""
    cycle = random_bits(seeds, count, STREAM).argsort(1)
    first, second = (torch.empty_like(cycle).scatter_(1, cycle, cycle.roll(by, 1)) for by in (1, -1))
    return first, second


def permuted(images: Tensor, order: Tensor, tiles: int) -> Tensor:
    """Place p shows tile order[p], in raster order."""
    height, width = (side // tiles for side in images.shape[2:])
    cut = images.unflatten(3, (tiles, width)).unflatten(2, (tiles, height)).permute(0, 2, 4, 1, 3, 5)
    cut = cut.flatten(1, 2)  # (B, k * k, C, h, w)
    moved = cut.gather(1, order[:, :, None, None, None].expand_as(cut)).unflatten(1, (tiles, tiles))
    return moved.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def blended(images: Tensor, tiles: int) -> Tensor:
    """Blurred near the inner seams of the grid."""
    height, width = images.shape[2:]
    reach = max(SEAM * height / tiles, 0.5)  # pixels
    near = torch.maximum(_near(height, tiles, reach)[:, None], _near(width, tiles, reach)[None]).to(images)  # (H, W)
    taps = torch.tensor([0.25, 0.5, 0.25]).to(images)
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None]
    blurred = F.conv2d(F.conv2d(padded, taps.view(1, 1, 3, 1)), taps.view(1, 1, 1, 3))[:, 0].view_as(images)
    return images + near * (blurred - images)


def _near(side: int, tiles: int, reach: float) -> Tensor:
    """(side,) 1 at a seam, falling to 0; from the middle of each pixel."""
    place = torch.arange(side) + 0.5
    seams = torch.arange(1, tiles) * (side / tiles)
    if not len(seams):
        return torch.zeros(side)
    distance = (place[:, None] - seams).abs().amin(1)
    return torch.exp(-0.5 * ((distance - 0.5).clamp(min=0) / reach).square())
