"""Fixed position tables: what tells a token where its patch lies, without anything to learn."""

import torch
from torch import Tensor


def sincos_table(width: int, grid: tuple[int, int]) -> Tensor:
    """The two-dimensional sine and cosine table of MAE and I-JEPA (arXiv 2111.06377, 2301.08243).

    The first half of a row encodes the patch's column, the second half its row. Each half is the sines of
    `coordinate * 10000 ** (-k / (width / 4))` for k = 0 .. width / 4 - 1, then the cosines; coordinates are
    the integers 0, 1, 2, ... of the grid. Computed in double precision and rounded once.

    width: a multiple of 4. grid: (rows, columns). Returns (rows * columns, width) float32, in raster order.
    """
    if width % 4:
        raise ValueError(f"a sine and cosine table needs a width that 4 divides, not {width}")
    y, x = _coordinates(grid)
    return torch.cat([_codes(x, width // 2), _codes(y, width // 2)], dim=1).float()


def volume_table(width: int, grid: tuple[int, int, int]) -> Tensor:
    """The same for a volume: a row encodes the patch's column, row and depth, in this order.

    The first two take a = 2 * (width // 6) numbers each, depth the width - 2 a that are left.

    width: even, 6 or more. grid: (rows, columns, depths). Returns (rows * columns * depths, width) float32, in raster
    order, the depth fastest.
    """
    if width % 2 or width < 6:
        raise ValueError(f"a table for volumes needs an even width of 6 or more, not {width}")
    y, x, z = _coordinates(grid)
    part = 2 * (width // 6)
    return torch.cat([_codes(x, part), _codes(y, part), _codes(z, width - 2 * part)], dim=1).float()


def _coordinates(grid: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Of each place of a grid, in raster order: one (L, 1) float64 for each axis."""
    sides = (torch.arange(side, dtype=torch.float64) for side in grid)
    return tuple(axis.reshape(-1, 1) for axis in torch.meshgrid(*sides, indexing="ij"))


def _codes(coordinate: Tensor, width: int) -> Tensor:
    """(L, 1) to (L, width): sines of growing wavelengths, then cosines."""
    half = width // 2
    angles = coordinate * 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
