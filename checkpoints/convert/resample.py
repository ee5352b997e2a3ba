"""Weights of an encoder for other images: position tables for another grid, patch projections for another patch or
number of channels.

A table is resampled as the code does that the weights were published with; timm's way differs from some by up to 0.3
on a rough table:

| rule | of | how |
|---|---|---|
| `sincos` | I-JEPA, DSeq-JEPA | computed anew by its formula, which knows every grid |
| `plain` | MAE, `transformers` ViT, ViTMAE and DINOv2 | bicubic to the size, no antialias |
| `offset` | DINO, DINOv2 | bicubic by the scale (target + 0.1) / grid, no antialias |
| `corners` | torchvision | bicubic to the size, corners aligned, no antialias |
| `timm` | timm, DINOv2 with registers | bicubic to the size, antialiased |
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from prelude.pretrain.position import sincos_table

RULES = {
    "sincos": "by its formula",
    "plain": "bicubic",
    "offset": "bicubic, by the scale (target + 0.1) / grid",
    "corners": "bicubic, corners aligned",
    "timm": "bicubic, antialiased",
}


def resample_table(table: Tensor, grid: tuple[int, int], target: tuple[int, int], rule: str, prefix: int) -> Tensor:
    """The table of another grid of patches; rows of prefix tokens stay.

    table: (1, prefix + rows * columns, D) in raster order. grid, target: (rows, columns). Returns the same with
    target's number of rows.
    """
    kept, rows = table[:, :prefix], table[:, prefix:]
    width = table.shape[2]
    if rule == "sincos":
        resampled = sincos_table(width, target)[None]
    else:
        maps = rows.float().unflatten(1, grid).permute(0, 3, 1, 2)  # (1, D, rows, columns)
        if rule == "offset":
            scale = tuple((new + 0.1) / old for new, old in zip(target, grid, strict=True))
            how = {"scale_factor": scale}  # the scale itself decides where samples lie, not the size that comes out
        else:
            how = {"size": target, "antialias": rule == "timm", "align_corners": rule == "corners"}
        resampled = F.interpolate(maps, mode="bicubic", **how).permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([kept, resampled.to(table.dtype)], dim=1)


def resample_patches(weight: Tensor, target: tuple[int, int]) -> Tensor:
    """A patch projection for patches of another size (FlexiViT, arXiv 2212.08013, section 3.4).

    With B the matrix that resizes a patch (bicubic, antialiased), the new weights are the pseudo-inverse of B's
    transpose times the old: for larger patches the response to a resized patch is that to the patch; for smaller
    ones it is as near as least squares get.

    weight: (D, C, p_h, p_w). Returns (D, C, *target), computed in float64.
    """
    size = tuple(weight.shape[2:])
    basis = torch.eye(size[0] * size[1], dtype=torch.float64).view(-1, 1, *size)
    resized = F.interpolate(basis, size=target, mode="bicubic", antialias=True, align_corners=False)
    matrix = resized.flatten(1)  # (p_h * p_w, target's): the transpose of B
    new = weight.double().flatten(2) @ torch.linalg.pinv(matrix).T
    return new.unflatten(2, target).to(weight.dtype)


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """A first convolution for another number of channels, by timm's rule.

    To one channel: the sum over channels, so that grey images answer as before. Else: channels repeated in turn or
    cut off, times old / new; the sum over channels is kept only where `channels` is a multiple of the old number.

    weight: (D, C, h, w). Returns (D, channels, h, w).
    """
    old = weight.shape[1]
    if channels == 1:
        return weight.sum(1, keepdim=True)
    turns = -(-channels // old)
    return weight.repeat(1, turns, 1, 1)[:, :channels] * (old / channels)
