"""The device's half of a volume: flipped, standardised, and sometimes noisy."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prelude.data.batch import Batch, VolumePlan
from prelude.pretrain.draws import normal, uniform

FLIP_STREAM, NOISY_STREAM, NOISE_STREAM = 171, 172, 173  # of pretrain.draws
NOISE_STD = 0.1  # of a standardised voxel
_LEAST_STD = 1e-6


@dataclass(frozen=True)
class Volumes:
    unit: Tensor  # (B, C, H, W, Z) float32 in [0, 1], flipped
    standardised: Tensor  # the same shape; what an encoder sees


def volumes(batch: Batch, plan: VolumePlan) -> Volumes:
    """What each sample's seed makes of it."""
    unit = _flipped(batch.views[0].contiguous(), batch.seeds, plan.flip).float() / 255
    values = standardised(unit)
    return Volumes(unit, _noisy(values, batch.seeds, plan.noise) if plan.noise else values)


def standardised(unit: Tensor) -> Tensor:
    """Voxels that are not 0 at mean 0 and variance 1 over a volume's channel; 0 stays 0, as what lies outside of a body
    is stored. (B, C, H, W, Z) to the same."""
    inside = unit > 0
    count = inside.sum((2, 3, 4), keepdim=True).clamp(min=1)
    mean = unit.sum((2, 3, 4), keepdim=True) / count  # of those that are not 0, as the others add nothing
    centred = torch.where(inside, unit - mean, 0.0)
    std = (centred.square().sum((2, 3, 4), keepdim=True) / count).sqrt()
    return centred / std.clamp(min=_LEAST_STD)


def _flipped(voxels: Tensor, seeds: Tensor, probability: float) -> Tensor:
    """Along each of the three axes by itself."""
    flips = uniform(seeds, 3, FLIP_STREAM) < probability  # (B, 3)
    for axis in range(3):
        voxels = torch.where(flips[:, axis, None, None, None, None], voxels.flip(2 + axis), voxels)
    return voxels


def _noisy(values: Tensor, seeds: Tensor, probability: float) -> Tensor:
    """Gaussian noise on all voxels of the volumes that it falls on."""
    noise = normal(seeds, math.prod(values.shape[1:]), NOISE_STREAM).view_as(values)
    falls = (uniform(seeds, 1, NOISY_STREAM) < probability)[:, :, None, None, None]  # (B, 1, 1, 1, 1)
    return torch.where(falls, values + NOISE_STD * noise, values)
