"""The pixels of a patch or cell as a target: of mean 0 and variance 1 within it (arXiv 2111.06377, section 3), or as
they are; and what of it is left to a model that ignores the image."""

import torch
from torch import Tensor

_EPSILON = 1e-6  # added to a patch's variance, so that a flat patch has target 0


def target_statistics(pixels: Tensor, standardised: bool = True) -> tuple[Tensor, Tensor]:
    """(mean, scale) of each patch, so that target = (pixels - mean) / scale.

    pixels: (B, R, P), the P values of a patch. Returns (B, R, 1) each; 0 and 1 where the target is plain pixels.
    """
    if not standardised:
        return torch.zeros_like(pixels[..., :1]), torch.ones_like(pixels[..., :1])
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True, correction=1)  # unbiased, as in the official code
    return mean, (variance + _EPSILON).sqrt()


def about_mean(target: Tensor, standardised: bool) -> Tensor:
    """The target (B, R, ...) less one prediction for every patch of every image: the batch's mean, or 0 where patches
    are standardised."""
    return target if standardised else target - target.mean((0, 1))
