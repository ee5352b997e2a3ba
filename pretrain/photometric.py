"""Colour augmentation of a whole batch on the device, every sample with draws of its own.

- What happens to a sample is a function of its seed and the view's number alone: parameters, and the order of the
  jitter's four operations. Neither a worker, a rank nor the rest of the batch can change it.
- Each operation equals torchvision's on a single float image: exact HSV hue, blur with reflected borders.
- Images that are no RGB have no hue, saturation or grey version, and are refused with them; their contrast is that of
  each channel around its own mean, as torchvision's is of one channel.
- Order as in BYOL (arXiv 2006.07733, appendix B): jitter, grey, blur, solarise.
- Always float32, also under autocast, and the host never waits for an accelerator.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prelude.data.batch import Photometric
from prelude.data.errors import UserError
from prelude.pretrain.draws import uniform
from prelude.pretrain.host_waits import is_counting

PHOTOMETRIC_STREAM = 201  # of pretrain.draws; view v of a plan reads stream 201 + v
_GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as torchvision rounds them
_NUM_DRAWS = 13
_TAIL = 4.0  # standard deviations of the blur's kernel: what lies beyond weighs 6e-5, less than an 8-bit level


@dataclass(frozen=True)
class Draws:
    """What happens to each of B samples."""

    jitter: Tensor  # (B,) bool
    brightness: Tensor  # (B,) factor
    contrast: Tensor  # (B,) factor
    saturation: Tensor  # (B,) factor
    hue: Tensor  # (B,) share of a full turn
    order: Tensor  # (B, 4) int64: the place (0 first) of brightness, contrast, saturation and hue in the jitter
    grey: Tensor  # (B,) bool
    blur: Tensor  # (B,) bool
    sigma: Tensor  # (B,) pixels
    solarise: Tensor  # (B,) bool


def draw(photometric: Photometric, seeds: Tensor, view: int) -> Draws:
    """seeds: (B,) int64; view: which view of the plan, so that two views of a sample differ."""
    u = uniform(seeds, _NUM_DRAWS, PHOTOMETRIC_STREAM + view).T  # (13, B); the order of rows is part of every run
    p = photometric
    return Draws(
        jitter=u[0] < p.jitter,
        brightness=_factor(p.brightness, u[1]),
        contrast=_factor(p.contrast, u[2]),
        saturation=_factor(p.saturation, u[3]),
        hue=p.hue * (2 * u[4] - 1),
        order=u[5:9].T.argsort(dim=1, stable=True),  # a uniform permutation; its own inverse is as uniform
        grey=u[9] < p.grey,
        blur=u[10] < p.blur,
        sigma=p.blur_sigma[0] + (p.blur_sigma[1] - p.blur_sigma[0]) * u[11],
        solarise=u[12] < p.solarise,
    )


@torch.no_grad()
def augment(images: Tensor, photometric: Photometric, seeds: Tensor, view: int) -> Tensor:
    """images: (B, C, H, W) float32 in [0, 1]; seeds: (B,) int64. Returns the same shape, in [0, 1]."""
    drawn = draw(photometric, seeds, view)
    with torch.autocast(images.device.type, enabled=False):
        if photometric.jitter:
            images = _jitter(images, drawn)
        if photometric.grey:
            images = _where(drawn.grey, lambda x: luma(x).expand_as(x), images)
        if photometric.blur:
            radius = min(math.ceil(_TAIL * photometric.blur_sigma[1]), min(images.shape[-2:]) - 1)
            images = _where(drawn.blur, lambda x, sigma: gaussian_blur(x, sigma, radius), images, drawn.sigma)
        if photometric.solarise:
            threshold = photometric.solarise_threshold
            images = _where(drawn.solarise, lambda x: torch.where(x >= threshold, 1 - x, x), images)
    return images


def refuse_colours(channels: int, views: dict[str, Photometric]) -> None:
    """Raises UserError for operations that images of so many channels do not have. views: by their key in a config."""
    wanted = [
        (f"{view}.{name}", getattr(photometric, name))
        for view, photometric in views.items()
        for name in ("saturation", "hue", "grey")
        if getattr(photometric, name)
    ]
    if channels != 3 and wanted:
        key, value = wanted[0]
        raise UserError(
            f"{key}={value:g} changes the colours of RGB, and images have data.channels={channels}; write "
            f"{' '.join(f'{key}=0' for key, _ in wanted)}."
        )


# ---- the operations, each with one parameter a sample


def luma(images: Tensor) -> Tensor:
    """(B, 3, H, W) to (B, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return (_GREY_WEIGHTS[0] * red).add_(green, alpha=_GREY_WEIGHTS[1]).add_(blue, alpha=_GREY_WEIGHTS[2])


def blend(images: Tensor, factor: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """One of brightness, contrast and saturation for each sample: a mix with black, its mean grey or its grey.

    factor: (B,). contrast, saturation: (B,) bool, which of the two it is; neither means brightness. Where there are no
    colours, saturation mixes with nothing else than the image.
    """
    has_colours = images.shape[1] == 3
    grey = luma(images) if has_colours else images
    target = torch.where(_per_image(saturation), grey, 0.0)
    mean = grey.mean(dim=(-3, -2, -1) if has_colours else (-2, -1), keepdim=True)
    target = torch.where(_per_image(contrast), mean, target)
    factor = _per_image(factor)
    return (images * factor).add_((1 - factor) * target).clamp_(0, 1)


def turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turns the hue of HSV by `turn` (B,) full circles, value and saturation unchanged.

    Hue is a place on the hexagon of six colours, where channel n is least + chroma * clamp(|k - 2| - 1, 0, 1) with
    k = (n + 6 hue) mod 6, n = 5, 3, 1 for red, green and blue.
    """
    red, green, blue = images.unbind(dim=1)  # (B, H, W)
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least
    on_green, on_blue = torch.add(blue - red, chroma, alpha=2), torch.add(red - green, chroma, alpha=4)
    sextant = torch.where(value == red, green - blue, torch.where(value == green, on_green, on_blue))
    sextant = (sextant / chroma.clamp(min=1e-12)).add_(6 * turn[:, None, None])  # a grey pixel has no hue to turn
    offset = torch.arange(5, 0, -2, device=images.device)[:, None, None]  # 5, 3, 1
    k = torch.remainder(sextant[:, None] + offset, 6)  # (B, 3, H, W)
    return torch.addcmul(least[:, None], chroma[:, None], k.sub_(2).abs_().sub_(1).clamp_(0, 1))


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Separable blur with one standard deviation a sample, (B,) pixels, and a kernel of 2 * radius + 1 taps."""
    batch, channels, height, width = images.shape
    offsets = torch.arange(-radius, radius + 1, device=images.device) / sigma[:, None]
    taps = (-0.5 * offsets.square()).softmax(dim=1)  # (B, 2 * radius + 1)
    taps = taps.repeat_interleave(channels, dim=0)[:, None]  # (B * C, 1, taps)
    groups = batch * channels
    padded = F.pad(images, (radius,) * 4, mode="reflect").reshape(1, groups, height + 2 * radius, width + 2 * radius)
    rows = F.conv2d(padded, taps[..., None], groups=groups)
    return F.conv2d(rows, taps[:, :, None], groups=groups).view(batch, channels, height, width)


def _jitter(images: Tensor, drawn: Draws) -> Tensor:
    """The four operations, each sample in its own order.

    Brightness, contrast and saturation are one computation with different targets, so the order is: those that
    come before the hue, the hue, those that come after. That takes one pass of the costly hue, where testing
    every operation at every place would take four.
    """
    hue_place = drawn.order[:, 3]  # (B,)
    for place in (0, 1, 2):
        images = _blend_at(place, images, drawn, drawn.jitter & (hue_place > place))
    if images.shape[1] == 3:
        images = _where(drawn.jitter, turn_hue, images, drawn.hue)
    for place in (1, 2, 3):
        images = _blend_at(place, images, drawn, drawn.jitter & (hue_place < place))
    return images


def _blend_at(place: int, images: Tensor, drawn: Draws, mask: Tensor) -> Tensor:
    contrast, saturation = drawn.order[:, 1] == place, drawn.order[:, 2] == place
    factor = torch.where(contrast, drawn.contrast, torch.where(saturation, drawn.saturation, drawn.brightness))
    return _where(mask, blend, images, factor, contrast, saturation)


def _where(mask: Tensor, operation, images: Tensor, *parameters: Tensor) -> Tensor:
    """`operation` on the samples in `mask` (B,), the others as they are.

    Choosing rows would make the host wait for an accelerator, so there every sample is computed. On the CPU it
    costs nothing, and saves the samples that are left alone.
    """
    if not _on_host(images):
        return torch.where(_per_image(mask), operation(images, *parameters), images)
    rows = mask.nonzero().squeeze(1)
    if not len(rows):
        return images
    return images.index_copy(0, rows, operation(images[rows], *(parameter[rows] for parameter in parameters)))


def _on_host(images: Tensor) -> bool:
    return images.device.type == "cpu" and not is_counting()


def _factor(strength: float, u: Tensor) -> Tensor:
    low = max(0.0, 1 - strength)
    return low + (1 + strength - low) * u


def _per_image(parameter: Tensor) -> Tensor:
    return parameter[:, None, None, None]
