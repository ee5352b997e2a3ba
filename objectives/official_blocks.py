"""The multi-block masks that the released I-JEPA code draws (facebookresearch/ijepa, commit 52c1ae9), for parity.

What it does and the paper does not, reproduced: a block's last possible place is left out, so that the last row and
column of patches are never used; a block is at most one patch smaller than the grid, so that on 14 x 14 the context
block is always the same 13 x 13 square in the top left corner; one number drives area and aspect ratio of a target;
the context of a rank's micro-batch is cut to that of its poorest image by keeping the lowest indices.

The last of these makes masks depend on how the global batch is shared by ranks, and makes the host wait for the
device once a step. Draws come from seeds as everywhere, not from the released code's generators.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prelude.objectives.blocks import (
    CORNER_STREAM,
    SIZE_STREAM,
    BlockMasks,
    BlockSizes,
    Size,
    between,
    draw_corners,
    inside,
    rectangles,
    step_draws,
)

_MORE_THAN = 10  # patches that a target block, and each context, must have
_TRIES = 20  # of a context block, before one more target may be overlapped


@dataclass(frozen=True)
class OfficialMultiBlock:
    """As `prelude.objectives.blocks.MultiBlock`, with the released code's sizes, places and truncation."""

    grid: Size
    num_targets: int = 4
    target_scale: tuple[float, float] = (0.15, 0.2)
    target_aspect: tuple[float, float] = (0.75, 1.5)
    context_scale: tuple[float, float] = (0.85, 1.0)
    salt: int = 0

    def sizes(self, step: int) -> BlockSizes:
        target, context = step_draws(self.salt, step, 2, SIZE_STREAM)
        return BlockSizes(self.target_size(target), self.context_size(context))

    def target_size(self, share: float) -> Size:
        """share: the one number in [0, 1) behind both area and aspect ratio."""
        return _official_size(self.grid, between(self.target_scale, share), between(self.target_aspect, share))

    def context_size(self, share: float) -> Size:
        return _official_size(self.grid, between(self.context_scale, share), 1.0)

    def draw(self, seeds: Tensor, step: int) -> BlockMasks:
        sizes = self.sizes(step)
        corners = self._corners(seeds, self.num_targets, sizes.target, CORNER_STREAM)  # (B, M, 2)
        covered = inside(corners, sizes.target, self.grid).cumsum(1) > 0  # (B, M, N): by the first 1 .. M targets
        # After every 20 tries the last of the targets that still count is given up.
        counting = torch.cat([covered.flip(1), torch.zeros_like(covered[:, :1])], dim=1)  # (B, M + 1, N)
        places = self._corners(seeds, counting.shape[1] * _TRIES, sizes.context, CORNER_STREAM + 10)
        contexts = inside(places, sizes.context, self.grid)  # (B, tries, N)
        free = contexts & ~counting.repeat_interleave(_TRIES, dim=1)
        chosen = (free.sum(-1) > _MORE_THAN).int().argmax(1)  # (B,)
        free = free[torch.arange(len(seeds), device=seeds.device), chosen]  # (B, N)
        shortest = int(free.sum(-1).min())
        lowest = (~free).int().argsort(dim=1, stable=True)[:, :shortest]
        return BlockMasks(lowest, rectangles(corners, sizes.target, self.grid))

    def problem(self) -> str | None:
        """The released code draws again, without end, until a block has more than ten patches."""
        smallest = min(math.prod(self.target_size(share / 200)) for share in range(200))
        if smallest <= _MORE_THAN:
            return f"makes target blocks of {smallest} patches, for which the official sampler never ends (11 or more)"
        context = math.prod(self.context_size(0.0))
        if context <= _MORE_THAN:
            return f"leaves a context block of {context} patches, for which the official sampler never ends"
        return None

    def _corners(self, seeds: Tensor, count: int, size: Size, stream: int) -> Tensor:
        """The last place in either direction is left out, as if the grid were one row and one column smaller."""
        return draw_corners(seeds, count, size, (self.grid[0] - 1, self.grid[1] - 1), stream)


def _official_size(grid: Size, scale: float, aspect: float) -> Size:
    area = int(grid[0] * grid[1] * scale)
    rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    return min(rows, grid[0] - 1), min(columns, grid[1] - 1)
