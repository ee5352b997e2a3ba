"""Where an image changes: the gradient map that Uni4Eye predicts beside the pixels (code: Davidczy/Uni4Eye_pp).

    grey = 0.299 R + 0.587 G + 0.114 B        of pixels in [0, 1]
    map  = (|Gx| + |Gy|) / (2 * 48)           Sobel's derivatives of 5 x 5, in [0, 1]

The border is mirrored, its own pixels not repeated. The official code rounds both derivatives to 8 bits, and in its
colour variant differentiates over channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_DERIVATIVE = (-1.0, -2.0, 0.0, 2.0, 1.0)
_SMOOTHING = (1.0, 4.0, 6.0, 4.0, 1.0)
_GREY = (0.299, 0.587, 0.114)
_MOST = 48.0  # that a derivative of values in [0, 1] can be


def grey(pixels: Tensor) -> Tensor:
    """(B, C, H, W) to (B, 1, H, W): luma of three channels, the mean of any other number."""
    weights = _GREY if pixels.shape[1] == 3 else (1 / pixels.shape[1],) * pixels.shape[1]
    return sum(weight * pixels[:, c : c + 1] for c, weight in enumerate(weights))


def gradient_map(pixels: Tensor) -> Tensor:
    """pixels: (B, C, H, W) in [0, 1], 3 or more high and wide. Returns (B, 1, H, W) in [0, 1]."""
    padded = F.pad(grey(pixels), (2, 2, 2, 2), mode="reflect")
    across = _along(_along(padded, _DERIVATIVE, -1), _SMOOTHING, -2)
    down = _along(_along(padded, _SMOOTHING, -1), _DERIVATIVE, -2)
    return (across.abs() + down.abs()) / (2 * _MOST)


def _along(values: Tensor, kernel: tuple[float, ...], dim: int) -> Tensor:
    """Five taps, without the border. Sums of shifted images: the same on every device."""
    length = values.shape[dim] - len(kernel) + 1
    taps = (weight * values.narrow(dim, place, length) for place, weight in enumerate(kernel) if weight)
    return sum(taps, start=torch.zeros((), dtype=values.dtype, device=values.device))
