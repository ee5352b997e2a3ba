"""Multi-block masks of I-JEPA (arXiv 2301.08243, section 3): one large context block, several target blocks.

- The size of blocks is a function of (run, step): the same for the global batch, on every rank and in every
  micro-batch. Where a sample's blocks lie is a function of its own seed. The number of ranks changes nothing.
- A block may lie anywhere, last row and column included; its area and its aspect ratio are drawn apart.
- Context and targets share no patch.
- Context has the same length in every sample of a step. The length follows from the sizes alone: the one that
  127 of 128 draws reach, about what the shortest of 128 images has. A draw that falls short is replaced by the next
  of a few; what is too long is cut to a uniformly random subset. So the shortest image of a batch is never looked
  for, and the host never waits for the device.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from prelude.pretrain.draws import random_bits, uniform

SIZE_STREAM, CORNER_STREAM, SUBSET_STREAM = 111, 112, 113  # of pretrain.draws
_NUM_ATTEMPTS = 4  # placements drawn for each sample; one falls short with probability 1/128, all with 4e-9
_NUM_SIMULATED = 4096
_SHARE_TOO_SHORT = 1 / 128
_LEAST_SHARE = 0.05  # of all patches, that a target block and the context must have: 10 of 196, as officially

Size = tuple[int, int]  # (rows, columns), in patches


@dataclass(frozen=True)
class BlockSizes:
    """Of one optimizer step."""

    target: Size
    context: Size


@dataclass(frozen=True)
class BlockMasks:
    """B samples, M target blocks each; all indices in raster order and ascending."""

    context: Tensor  # (B, K) int64
    targets: Tensor  # (B, M, T) int64


@dataclass(frozen=True)
class MultiBlock:
    """Draws the masks of a run. `salt` is the run's own number, the same on all ranks."""

    grid: Size
    num_targets: int = 4
    target_scale: tuple[float, float] = (0.15, 0.2)  # area of a target block, as a share of the image
    target_aspect: tuple[float, float] = (0.75, 1.5)  # height / width
    context_scale: tuple[float, float] = (0.85, 1.0)  # area of the context block before targets are cut out
    salt: int = 0

    def sizes(self, step: int) -> BlockSizes:
        """Target scale, target aspect and context scale are three independent uniform draws."""
        scale, aspect, context = step_draws(self.salt, step, 3, SIZE_STREAM)
        return self._sizes(
            between(self.target_scale, scale), between(self.target_aspect, aspect), between(self.context_scale, context)
        )

    def draw(self, seeds: Tensor, step: int) -> BlockMasks:
        """seeds: (B,) int64; every sample's masks depend on its own seed and the step."""
        sizes = self.sizes(step)
        length = context_length(self.grid, self.num_targets, sizes)
        placement = _place(seeds, self.grid, self.num_targets, sizes, _NUM_ATTEMPTS)
        enough = placement.num_free >= length  # (B, attempts)
        # The first attempt that leaves enough; where none does, the one that leaves most, filled up below.
        chosen = torch.where(enough.any(1), enough.int().argmax(1), placement.num_free.argmax(1))  # (B,)
        sample = torch.arange(len(seeds), device=seeds.device)
        context = _random_subset(seeds, placement.in_context[sample, chosen], placement.free[sample, chosen], length)
        targets = rectangles(placement.target_corners[sample, chosen], sizes.target, self.grid)
        return BlockMasks(context, targets)

    def problem(self) -> str | None:
        """Why these scales cannot work on this grid, in words; None where they can."""
        least = math.ceil(_LEAST_SHARE * self.grid[0] * self.grid[1])
        ends = [self._sizes(scale, aspect, 0.0).target for scale in self.target_scale for aspect in self.target_aspect]
        smallest = min(rows * columns for rows, columns in ends)
        if smallest < least:
            return f"makes target blocks of {smallest} patches where {least} are the least"
        context = block_size(self.grid, self.context_scale[0], self.grid[0] / self.grid[1])
        left = min(context_length(self.grid, self.num_targets, BlockSizes(target, context)) for target in set(ends))
        if left < least:
            return f"leaves {left} patches of context where {least} are the least"
        return None

    def _sizes(self, target_scale: float, target_aspect: float, context_scale: float) -> BlockSizes:
        return BlockSizes(
            target=block_size(self.grid, target_scale, target_aspect),
            # Shaped as the image, so that the whole of an oblong one can be context.
            context=block_size(self.grid, context_scale, self.grid[0] / self.grid[1]),
        )


def block_size(grid: Size, scale: float, aspect: float) -> Size:
    """(rows, columns) of a block of `scale` times the grid's area, aspect = height / width, within the grid."""
    area = math.floor(grid[0] * grid[1] * scale)
    rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    return min(max(rows, 1), grid[0]), min(max(columns, 1), grid[1])


@cache
def context_length(grid: Size, num_targets: int, sizes: BlockSizes) -> int:
    """K: patches of context that all but 1/128 of placements leave free, counted over 4096 fixed ones."""
    placement = _place(torch.arange(_NUM_SIMULATED), grid, num_targets, sizes, 1)
    return int(placement.num_free.flatten().kthvalue(round(_NUM_SIMULATED * _SHARE_TOO_SHORT) + 1).values.numpy())


def step_draws(salt: int, step: int, count: int, stream: int) -> list[float]:
    """`count` uniform numbers in [0, 1) that belong to an optimizer step of a run, whatever the rank."""
    return uniform(torch.tensor([salt + step]), count, stream)[0].numpy().tolist()


def between(limits: tuple[float, float], share: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * share


def draw_corners(seeds: Tensor, count: int, size: Size, grid: Size, stream: int) -> Tensor:
    """(top, left) of `count` blocks a seed, uniform over all places within the grid. (B,) to (B, count, 2)."""
    bits = random_bits(seeds, 2 * count, stream).view(len(seeds), count, 2)
    return torch.stack([bits[..., 0] % (grid[0] - size[0] + 1), bits[..., 1] % (grid[1] - size[1] + 1)], dim=-1)


def inside(corners: Tensor, size: Size, grid: Size) -> Tensor:
    """Which patches a block covers. corners: (..., 2). Returns (..., N) bool in raster order."""
    spans = []
    for axis in (0, 1):
        place, first = torch.arange(grid[axis], device=corners.device), corners[..., axis, None]
        spans.append((place >= first) & (place < first + size[axis]))
    return (spans[0][..., :, None] & spans[1][..., None, :]).flatten(-2)


@dataclass(frozen=True)
class _Placement:
    """A attempts a sample."""

    target_corners: Tensor  # (B, A, M, 2)
    in_context: Tensor  # (B, A, N) bool: inside the context block
    free: Tensor  # (B, A, N) bool: the same and outside all targets

    @property
    def num_free(self) -> Tensor:
        return self.free.sum(-1)  # (B, A)


def _place(seeds: Tensor, grid: Size, num_targets: int, sizes: BlockSizes, num_attempts: int) -> _Placement:
    # One draw a block; targets come first, so that an attempt is the same whatever the number of attempts.
    targets = draw_corners(seeds, num_attempts * num_targets, sizes.target, grid, CORNER_STREAM)
    targets = targets.unflatten(1, (num_attempts, num_targets))  # (B, A, M, 2)
    contexts = draw_corners(seeds, num_attempts, sizes.context, grid, CORNER_STREAM + 10)  # (B, A, 2)
    in_context = inside(contexts, sizes.context, grid)
    return _Placement(targets, in_context, in_context & ~inside(targets, sizes.target, grid).any(2))


def _random_subset(seeds: Tensor, in_context: Tensor, free: Tensor, length: int) -> Tensor:
    """`length` of the free patches, drawn uniformly; should they not suffice, covered ones of the block follow.

    in_context, free: (B, N) bool. Returns (B, length) int64, ascending.
    """
    noise = random_bits(seeds, free.shape[1], SUBSET_STREAM) >> 4  # below 2**59: the rank of a patch comes first
    later = (~free).long() + (~in_context).long()  # 0 free, 1 covered by a target, 2 outside the block
    return (noise + later * 2**59).argsort(dim=1, stable=True)[:, :length].sort(dim=1).values


def rectangles(corners: Tensor, size: Size, grid: Size) -> Tensor:
    """Patches of each block in raster order. corners: (B, M, 2). Returns (B, M, rows * columns) int64."""
    rows = corners[..., 0, None] + torch.arange(size[0], device=corners.device)  # (B, M, rows)
    columns = corners[..., 1, None] + torch.arange(size[1], device=corners.device)  # (B, M, columns)
    return (rows[..., :, None] * grid[1] + columns[..., None, :]).flatten(-2)
