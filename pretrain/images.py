"""The device's half of a view: from crops to normalised images, flipped, shifted, recoloured and normalised."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from prelude.data.batch import Batch, View, ViewPlan
from prelude.pretrain.draws import random_bits
from prelude.pretrain.photometric import HostAugment, augment, one_by_one

_HOST_VALUES = 2**18  # numbers at a time: 1 MiB, about what a processor's cache holds
SHIFT_STREAM = 151  # of pretrain.draws; view v of a plan reads stream 151 + v


def normalise(pixels: Tensor, plan: ViewPlan) -> Tensor:
    """(B, C, H, W) in 0..255, of any type, to float32 with the plan's mean and standard deviation, in one
    multiply-add."""
    mean, std = _statistics(plan, pixels.device)
    floats = pixels.to(torch.float32, copy=True)  # a copy always, because the result overwrites it
    return torch.addcmul(-mean / std, floats, 1 / (255 * std), out=floats)


def denormalise(images: Tensor, plan: ViewPlan) -> Tensor:
    """The inverse of `normalise` for pictures: (B, C, H, W) to (B, 3, H, W) uint8, rounded and clamped.

    Its colours are as `shown` says, of `plan.shown`.
    """
    return shown(unit_pixels(images.float(), plan) * 255, plan.shown)


def unit_pixels(images: Tensor, plan: ViewPlan) -> Tensor:
    """The inverse of `normalise` in floating point: (B, C, H, W) to the same in [0, 1]."""
    mean, std = _statistics(plan, images.device)
    return images * std + mean


def shown(pixels: Tensor, channels: tuple[int, ...] = ()) -> Tensor:
    """(B, C, H, W) in 0..255, of any type, to (B, 3, H, W) uint8.

    Red, green and blue are the first three channels, or those of `channels`; one alone is grey, and of two the blue is
    black.
    """
    chosen = channels or tuple(range(min(pixels.shape[1], 3)))
    pixels = pixels[:, list(chosen)] if chosen != tuple(range(pixels.shape[1])) else pixels
    if len(chosen) == 1:
        pixels = pixels.expand(-1, 3, -1, -1)
    elif len(chosen) == 2:
        pixels = torch.cat([pixels, torch.zeros_like(pixels[:, :1])], dim=1)
    return pixels.round().clamp(0, 255).to(torch.uint8) if pixels.is_floating_point() else pixels


def images(batch: Batch, plan: ViewPlan) -> tuple[Tensor, ...]:
    """The batch's views as an encoder wants them: V tensors (B, C, H, W) float32, laid out as `as_device_likes`."""
    return tuple(as_device_likes(_image(batch, plan, v)) for v in range(len(plan.views)))


def as_device_likes(images: Tensor) -> Tensor:
    """(B, C, H, W) to the same, on a GPU with the channels last in memory: convolutions on its matrix units want them
    so, and hand them on so, whatever the layout of their weights. On a CPU never so: oneDNN 3.x corrupts memory in the
    backward pass of a strided 1x1 convolution on such images (the stems of RepVGG and MobileOne)."""
    if images.device.type == "cpu":
        return images.contiguous()
    return images.contiguous(memory_format=torch.channels_last) if images.is_cuda else images


def _image(batch: Batch, plan: ViewPlan, v: int) -> Tensor:
    view, pixels = plan.views[v], batch.views[v]
    if one_by_one(pixels):
        return _on_host(batch, plan, v)
    pixels = _placed(pixels, view, batch.flips[:, v], batch.seeds, v)
    if view.photometric is None:
        return normalise(pixels, plan)
    coloured = augment(pixels.float() / 255, view.photometric, batch.seeds, v)
    mean, std = _statistics(plan, pixels.device)
    return torch.addcmul(-mean / std, coloured, 1 / std)


def _on_host(batch: Batch, plan: ViewPlan, v: int) -> Tensor:
    """Some images at a time, which stay in the processor's cache from their crops to what is normalised."""
    view, pixels = plan.views[v], batch.views[v]
    mean, std = _statistics(plan, pixels.device)
    change = None if view.photometric is None else HostAugment(view.photometric, batch.seeds, v)
    scale = 1 / (255 * std) if change is None else 1 / std
    result = torch.empty(pixels.shape)
    at_once = max(_HOST_VALUES // max(pixels[:1].numel(), 1), 1)
    for first in range(0, len(pixels), at_once):
        some = slice(first, first + at_once)
        placed = _placed(pixels[some].contiguous(), view, batch.flips[some, v], batch.seeds[some], v).float()
        if change is not None:
            placed = change(placed / 255, first)
        torch.addcmul(-mean / std, placed, scale, out=result[some])
    return result


def _placed(pixels: Tensor, view: View, flips: Tensor, seeds: Tensor, v: int) -> Tensor:
    """Flipped and shifted."""
    pixels = torch.where(flips[:, None, None, None], pixels.flip(-1), pixels)
    return _shifted(pixels, view, seeds, v) if view.shift else pixels


def _statistics(plan: ViewPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (C, 1, 1)."""
    return _constant(tuple(plan.mean), device).view(-1, 1, 1), _constant(tuple(plan.std), device).view(-1, 1, 1)


@cache  # copying from the host anew for each view would make it wait for the device
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


def _shifted(pixels: Tensor, view: View, seeds: Tensor, v: int) -> Tensor:
    """torchvision's RandomCrop(size, padding=shift): black on all sides, then a crop at a place drawn by the seed."""
    height, width = view.size
    start = random_bits(seeds, 2, SHIFT_STREAM + v) % (2 * view.shift + 1)  # (B, 2) top and left in the padded image
    padded = F.pad(pixels, (view.shift,) * 4)
    rows = start[:, 0, None] + torch.arange(height, device=pixels.device)  # (B, H)
    columns = start[:, 1, None] + torch.arange(width, device=pixels.device)  # (B, W)
    sample = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    # Advanced indices around a slice come first in the result: (B, H, W, C)
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
