"""Volumes cut into patches: boxes of voxels in raster order, the depth fastest; within a patch the channel fastest."""

import torch
from einops import rearrange
from torch import Tensor

Size = tuple[int, int, int]  # (height, width, depth)


def gather_cubes(volumes: Tensor, patch_size: Size, ids: Tensor) -> Tensor:
    """The voxels of some patches, read straight from the volumes without laying out the others.

    volumes: (B, C, H, W, Z). ids: (B, K) in raster order. Returns (B, K, C, p_h, p_w, p_d).
    """
    height, width, depth = patch_size
    grid = volumes.unflatten(4, (-1, depth)).unflatten(3, (-1, width)).unflatten(2, (-1, height))
    columns, depths = grid.shape[4], grid.shape[6]  # of (B, C, rows, p_h, columns, p_w, depths, p_d)
    sample = torch.arange(len(volumes), device=volumes.device)[:, None]
    return grid[sample, :, ids // (columns * depths), :, ids // depths % columns, :, ids % depths]


def cut(volumes: Tensor, patch_size: Size) -> Tensor:
    """(B, C, H, W, Z) to (B, L, p_h * p_w * p_d * C)."""
    height, width, depth = patch_size
    return rearrange(volumes, "b c (r h) (k w) (s d) -> b (r k s) (h w d c)", h=height, w=width, d=depth)


def join(patches: Tensor, patch_size: Size, grid: Size) -> Tensor:
    """The inverse of `cut`; grid is (rows, columns, depths)."""
    (height, width, depth), (rows, columns, depths) = patch_size, grid
    return rearrange(
        patches,
        "b (r k s) (h w d c) -> b c (r h) (k w) (s d)",
        r=rows, k=columns, s=depths, h=height, w=width, d=depth,
    )  # fmt: skip
