"""Which patches of an image are hidden.

- A mask is a function of the sample's seed alone: the same in any batch, on any rank, after any interruption.
- Exactly the same number of patches is kept in every image, so shapes never change.
- One sort a batch; the inverse permutation is a scatter.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prelude.pretrain.draws import random_bits

MASK_STREAM = 101  # of pretrain.draws: apart from every other use of a sample's seed


@dataclass(frozen=True)
class PatchMask:
    """B masks over the same number L of patches: K kept, R = L - K removed."""

    keep: Tensor  # (B, K) int64 indices of patches, in shuffled order
    removed: Tensor  # (B, R) int64 indices of the others, in shuffled order
    restore: Tensor  # (B, L) int64: where each patch stands in the order (keep, removed)

    @property
    def hidden(self) -> Tensor:
        """(B, L) bool in raster order: True where the patch is removed."""
        return self.restore >= self.keep.shape[1]


def in_squares(mask: PatchMask, side: int, columns: int) -> PatchMask:
    """The mask of patches that `mask`, one of squares of side x side patches, stands for.

    columns: of the grid of patches; `side` divides it, and the rows.
    """
    if side == 1:
        return mask
    places = torch.arange(side, device=mask.keep.device)
    within = places[:, None] * columns + places  # (side, side), from a square's first patch

    def patches(squares: Tensor) -> Tensor:
        wide = columns // side
        first = squares // wide * side * columns + squares % wide * side
        return (first[..., None, None] + within).flatten(1)

    keep, removed = patches(mask.keep), patches(mask.removed)
    order = torch.cat([keep, removed], dim=1)
    restore = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return PatchMask(keep, removed, restore)


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """K, the nearest whole number to L * (1 - mask_ratio).

    The official MAE code truncates, and loses a patch to floating point: of 100 patches at ratio 0.9 it keeps 9.
    """
    return round(num_patches * (1 - mask_ratio))


def advised_ratio(usual: float, num_cells: int, kept: Callable[[int, float], int]) -> str:
    """`objective.mask_ratio=R, or ` for a refusal: `usual`, or 0.5 where that leaves none of few cells, as no rounding
    makes 0.5 do; nothing of a single cell, of which no ratio hides a part.

    kept: (cells, mask ratio) to the number of visible cells.
    """
    if num_cells < 2:
        return ""
    return f"objective.mask_ratio={usual if 0 < kept(num_cells, usual) < num_cells else 0.5}, or "


def random_mask(noise: Tensor, num_keep: int) -> PatchMask:
    """Keeps the `num_keep` patches whose noise is smallest (MAE, arXiv 2111.06377, section 3).

    noise: (B, L) of any type that sorts; ties keep the patch that comes first.
    """
    shuffle = noise.argsort(dim=1, stable=True)  # (B, L)
    places = torch.arange(noise.shape[1], device=noise.device).expand_as(shuffle)
    restore = torch.empty_like(shuffle).scatter_(1, shuffle, places)
    return PatchMask(shuffle[:, :num_keep], shuffle[:, num_keep:], restore)


def mask_noise(seeds: Tensor, num_patches: int) -> Tensor:
    """seeds: (B,) int64. Returns (B, L) int64, independent uniform numbers for `random_mask`."""
    return random_bits(seeds, num_patches, MASK_STREAM)
