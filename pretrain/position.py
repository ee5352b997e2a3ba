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
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in grid)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    halves = []
    for coordinate in (x, y):
        angles = coordinate.reshape(-1, 1) * frequencies  # (L, width / 4)
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1).float()
