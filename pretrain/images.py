"""The device's half of a view: from uint8 crops to flipped, normalised float images."""

import torch
from torch import Tensor

from data.batch import Batch, ViewPlan


def normalise(pixels: Tensor, plan: ViewPlan) -> Tensor:
    """(B, 3, H, W) uint8 in 0..255 to float32 with the plan's mean and standard deviation, in one multiply-add."""
    mean = torch.tensor(plan.mean, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(plan.std, device=pixels.device).view(3, 1, 1)
    floats = pixels.to(torch.float32, copy=True)  # a copy always, because the result overwrites it
    return torch.addcmul(-mean / std, floats, 1 / (255 * std), out=floats)


def denormalise(images: Tensor, plan: ViewPlan) -> Tensor:
    """The inverse of `normalise`, rounded and clamped to uint8, for pictures."""
    mean = torch.tensor(plan.mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(plan.std, device=images.device).view(3, 1, 1)
    return ((images.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def images(batch: Batch, plan: ViewPlan) -> tuple[Tensor, ...]:
    """The batch's views as an encoder wants them: V tensors (B, 3, H, W) float32, flipped where drawn."""
    out = []
    for v, pixels in enumerate(batch.views):
        flipped = torch.where(batch.flips[:, v, None, None, None], pixels.flip(-1), pixels)
        out.append(normalise(flipped, plan))
    return tuple(out)
