"""Mean and variance of the window around each pixel (the target of Swin V2's SimMIM, arXiv 2111.09883 and its code).

- A window is cut to the image: what lies outside enters neither the mean nor the count.
- Sums are differences of running sums, in float64: a window costs the same at any size, and bright flat areas, whose
  variance is lost in single precision, keep it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_EPSILON = 1e-6  # added to a window's variance


@torch.no_grad()
def window_statistics(images: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """(mean, scale) of each pixel's window, so that target = (image - mean) / scale; each of the images' shape.

    images: (B, C, H, W), channels apart. window: its side in pixels, odd. The variance is the unbiased one, and the
    scale the root of it plus 1e-6.
    """
    shift = images.double().mean((2, 3), keepdim=True)
    centred = images.double() - shift
    sums = [_window_sums(_window_sums(values, window).mT, window).mT for values in (centred, centred.square())]
    rows, columns = (_window_counts(side, window, images.device) for side in images.shape[2:])
    count = rows[:, None] * columns  # (H, W)
    mean, square = (total / count for total in sums)
    variance = ((square - mean.square()) * (count / (count - 1))).clamp(min=0)
    return (mean + shift).to(images.dtype), (variance + _EPSILON).sqrt().to(images.dtype)


def _window_sums(values: Tensor, window: int) -> Tensor:
    """(..., W), each the sum over the window around it along the last dimension."""
    running = F.pad(values.cumsum(-1), (1, 0))
    first, last = _ends(values.shape[-1], window, values.device)
    return running[..., last] - running[..., first]


def _window_counts(side: int, window: int, device: torch.device) -> Tensor:
    first, last = _ends(side, window, device)
    return (last - first).double()


def _ends(side: int, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each place's window: the first place in it, and the first behind it."""
    places = torch.arange(side, device=device)
    return (places - window // 2).clamp(min=0), (places + window // 2 + 1).clamp(max=side)
