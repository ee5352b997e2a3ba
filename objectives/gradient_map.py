"""Where an image changes: the gradient map that Uni4Eye predicts beside the pixels (code: Davidczy/Uni4Eye_pp).

    grey = 0.299 R + 0.587 G + 0.114 B        of pixels in [0, 1]
    map  = (|Gx| + |Gy|) / (2 * 48)           Sobel's derivatives of 5 x 5, in [0, 1]
    map  = (|Gx| + |Gy| + |Gz|) / (3 * 768)   of a volume, 5 x 5 x 5

The border is mirrored, its own pixels not repeated. The official code rounds both derivatives to 8 bits, and in its
colour variant differentiates over channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_DERIVATIVE = (-1.0, -2.0, 0.0, 2.0, 1.0)
_SMOOTHING = (1.0, 4.0, 6.0, 4.0, 1.0)
_GREY = (0.299, 0.587, 0.114)
_STEEPEST, _SMOOTHED = 3.0, 16.0  # what either kernel can make of values in [0, 1]


def grey(pixels: Tensor) -> Tensor:
    """(B, C, ...) to (B, 1, ...): luma of three channels, the mean of any other number."""
    weights = _GREY if pixels.shape[1] == 3 else (1 / pixels.shape[1],) * pixels.shape[1]
    return sum(weight * pixels[:, c : c + 1] for c, weight in enumerate(weights))


def gradient_map(pixels: Tensor) -> Tensor:
    """pixels: (B, C, H, W) or (B, C, H, W, Z) in [0, 1], 3 or more along each axis. Returns one channel in [0, 1]."""
    axes = tuple(range(-1, 1 - pixels.ndim, -1))  # from the last
    padded = F.pad(grey(pixels), (2, 2) * len(axes), mode="reflect")
    steep = []
    for across in axes:
        values = padded
        for axis in axes:
            values = _along(values, _DERIVATIVE if axis == across else _SMOOTHING, axis)
        steep.append(values.abs())
    return sum(steep[1:], start=steep[0]) / (len(axes) * _STEEPEST * _SMOOTHED ** (len(axes) - 1))


def _along(values: Tensor, kernel: tuple[float, ...], dim: int) -> Tensor:
    """Five taps, without the border. Sums of shifted images: the same on every device."""
    length = values.shape[dim] - len(kernel) + 1
    taps = (weight * values.narrow(dim, place, length) for place, weight in enumerate(kernel) if weight)
    return sum(taps, start=torch.zeros((), dtype=values.dtype, device=values.device))
