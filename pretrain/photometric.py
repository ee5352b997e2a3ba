"""Colour augmentation of a whole batch on the device, every sample with draws of its own.

- What happens to a sample is a function of its seed and the view's number alone: parameters, and the order of the
  jitter's four operations. Neither a worker, a rank nor the rest of the batch can change it.
- Each operation equals torchvision's on a single float image: exact HSV hue, blur with reflected borders.
- Images that are no RGB have no hue, saturation or grey version, and are refused with them; their contrast is that of
  each channel around its own mean, as torchvision's is of one channel.
- Order as in BYOL (arXiv 2006.07733, appendix B): jitter, grey, blur, solarise.
- Always float32, also under autocast, and the host never waits for an accelerator.
- On a CPU images are done one by one, with the same draws: each stays in the processor's cache through all its
  operations, and what does not happen to it costs nothing.
"""

import itertools
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
    if one_by_one(images):
        return HostAugment(photometric, seeds, view)(images, 0)
    drawn = draw(photometric, seeds, view)
    with torch.autocast(images.device.type, enabled=False):
        if photometric.jitter:
            images = _jitter(images, drawn)
        if photometric.grey:
            images = _where(drawn.grey, lambda x: luma(x).expand_as(x), images)
        if photometric.blur:
            radius = _radius(photometric, images)
            images = _where(drawn.blur, lambda x, sigma: gaussian_blur(x, sigma, radius), images, drawn.sigma)
        if photometric.solarise:
            threshold = photometric.solarise_threshold
            images = _where(drawn.solarise, lambda x: torch.where(x >= threshold, 1 - x, x), images)
    return images


def one_by_one(images: Tensor) -> bool:
    """Whether images are changed one by one: where no device takes them all at once."""
    return images.device.type == "cpu" and not is_counting()


class HostAugment:
    """`augment` on the host, for some of a batch's images at a time. seeds: (B,) int64, of all."""

    def __init__(self, photometric: Photometric, seeds: Tensor, view: int):
        drawn = draw(photometric, seeds, view)
        self.photometric = photometric
        self.happens = torch.stack([drawn.jitter, drawn.grey, drawn.blur, drawn.solarise], dim=1).tolist()
        factors = [drawn.brightness, drawn.contrast, drawn.saturation, drawn.hue]
        self.factors = torch.stack(factors, dim=1).tolist()
        self.orders, self.sigmas = drawn.order.tolist(), drawn.sigma.tolist()

    @torch.no_grad()
    def __call__(self, images: Tensor, first: int) -> Tensor:
        """images: (b, C, H, W), those of the batch from number `first` on. All operations on each in turn."""
        radius = _radius(self.photometric, images)
        result = torch.empty_like(images, memory_format=torch.contiguous_format)
        with torch.autocast("cpu", enabled=False):
            for image, changed, nth in zip(images.split(1), result.split(1), itertools.count(first), strict=False):
                changed.copy_(self._one(image, nth, radius))
        return result

    def _one(self, image: Tensor, nth: int, radius: int) -> Tensor:
        jitter, grey, blur, solarise = self.happens[nth]
        if jitter:
            for operation in sorted(range(4), key=self.orders[nth].__getitem__):
                image = _jitter_one(image, operation, self.factors[nth][operation])
        if grey:
            image = luma(image).expand_as(image)
        if blur:
            image = _blur_one(image, self.sigmas[nth], radius)
        if solarise:
            image = torch.where(image >= self.photometric.solarise_threshold, 1 - image, image)
        return image


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

    Hue is a place on the hexagon of six colours, where channel n is least + chroma * clamp(d - 1, 0, 1): d is how far
    n + 6 hue is from 2 on a circle of 6, and n = 5, 3, 1 for red, green and blue.
    """
    red, green, blue = images.unbind(dim=1)  # (B, H, W)
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least
    on_green, on_blue = torch.add(blue - red, chroma, alpha=2), torch.add(red - green, chroma, alpha=4)
    sextant = torch.where(value == red, green - blue, torch.where(value == green, on_green, on_blue))
    sextant = sextant.div_(chroma.clamp(min=1e-12)).add_(6 * turn[:, None, None])  # a grey pixel has no hue to turn
    offset = torch.arange(3, -2, -2, device=images.device)[:, None, None]  # 5, 3, 1, less the 2
    place = sextant[:, None] + offset  # (B, 3, H, W)
    distance = place.sub_((place / 6).round_(), alpha=6).abs_()
    return torch.addcmul(least[:, None], chroma[:, None], distance.sub_(1).clamp_(0, 1))


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


def _jitter_one(image: Tensor, operation: int, strength: float) -> Tensor:
    """Brightness, contrast, saturation or hue (0 to 3) of one image, (1, C, H, W)."""
    has_colours = image.shape[1] == 3
    if operation == 3:
        return turn_hue(image, image.new_full((1,), strength)) if has_colours and strength else image
    if strength == 1:
        return image
    changed = image * strength
    if operation == 1:
        mean = luma(image).mean() if has_colours else image.mean(dim=(-2, -1), keepdim=True)
        changed.add_(mean, alpha=1 - strength)
    elif operation == 2:
        changed.add_(luma(image) if has_colours else image, alpha=1 - strength)
    return changed.clamp_(0, 1)


def _blur_one(image: Tensor, sigma: float, radius: int) -> Tensor:
    """`gaussian_blur` of one image, (1, C, H, W), by shifted sums: for few channels cheaper than a convolution. With
    no more taps than its own `sigma` needs: what lies beyond weighs 6e-7."""
    height, width = image.shape[-2:]
    radius = min(math.ceil(5 * sigma), radius)
    taps = (-0.5 * (torch.arange(-radius, radius + 1) / sigma).square()).softmax(dim=0).tolist()
    padded = F.pad(image, (radius,) * 4, mode="reflect")
    rows = padded[:, :, :height] * taps[0]
    for shift, tap in enumerate(taps[1:], start=1):
        rows.add_(padded[:, :, shift : shift + height], alpha=tap)
    blurred = rows[..., :width] * taps[0]
    for shift, tap in enumerate(taps[1:], start=1):
        blurred.add_(rows[..., shift : shift + width], alpha=tap)
    return blurred


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
    """`operation` on the samples in `mask` (B,), the others as they are. Every sample is computed, because choosing
    rows would make the host wait for an accelerator."""
    return torch.where(_per_image(mask), operation(images, *parameters), images)


def _radius(photometric: Photometric, images: Tensor) -> int:
    return min(math.ceil(_TAIL * photometric.blur_sigma[1]), min(images.shape[-2:]) - 1)


def _factor(strength: float, u: Tensor) -> Tensor:
    low = max(0.0, 1 - strength)
    return low + (1 + strength - low) * u


def _per_image(parameter: Tensor) -> Tensor:
    return parameter[:, None, None, None]
