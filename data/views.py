"""From an image's bytes to the crops of a view plan: decoded once, cut and resized in uint8, or in floating point where
images have more than 8 bits and a range.

- Box and flip of view v are a function of (seed, v) and the image's size alone: neither the other views of the
  plan, nor a rank, a worker or the time can change them.
- Resizing is torch's antialiased kernel, which in uint8 agrees with PIL's to within rounding, written straight into
  the caller's memory; a crop that already has the view's size is copied unchanged.
- Flip, normalisation and colour are the device's work, see `pretrain.images`. The one exception is RandAugment and its
  kin, which the papers define by PIL's operations.
- Safe from any number of threads; nothing is kept between calls.
"""

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from prelude.data.auto_augment import augment
from prelude.data.batch import View, ViewPlan
from prelude.data.decode import MAX_PIXELS, ValueRange, decode

AUGMENT_DRAWS = 2**15  # of view_generator: apart from those of boxes, whose number depends on the image
Box = tuple[int, int, int, int]  # top, left, height, width in pixels of the source image


def read_views(
    image: bytes,
    plan: ViewPlan,
    seed: int,
    out: Sequence[np.ndarray],
    value_range: ValueRange | None = None,
    max_pixels: int = MAX_PIXELS,
) -> tuple[np.ndarray, np.ndarray]:
    """Decode `image` and write its views into `out`. value_range, max_pixels: as `decode` takes them.

    out: one (H, W, C) C-contiguous array for each view of the plan, of that view's size; uint8, or float32 where there
    is a `value_range`.
    Returns boxes (V, 4) int32 as top, left, height, width in the decoded image, and flips (V,) bool.
    The pixels are not flipped. Raises data.decode.BadImage.
    """
    pixels = decode(image, value_range=value_range, channels=plan.channels, max_pixels=max_pixels)
    boxes, flips = write_views([pixels], plan, [seed], [[view] for view in out], [0])
    return boxes[0], flips[0]


def write_views(
    images: Sequence[np.ndarray],
    plan: ViewPlan,
    seeds: Sequence[int],
    out: Sequence[Sequence[np.ndarray]],
    rows: Sequence[int],
    partners: Sequence[np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Write the views of N decoded images, that of image n and view v into `out[v][rows[n]]`; `out` as above.

    partners: N decoded images that the plan's partner views are cut from; None where it has none.
    Returns boxes (N, V, 4) int32 and flips (N, V) bool.
    """
    generator = random.Random(0)  # seeded anew for each view: making one costs as much as two views' draws
    drawn, places = [], []
    for image, partner, seed, row in zip(images, partners or images, seeds, rows, strict=True):
        for v, view in enumerate(plan.views):
            source = partner if view.partner else image
            generator.seed(_view_seed(seed, v))
            drawn.append(draw(view, *source.shape[:2], generator))
            places.append((source, seed, row, v))
    for (image, seed, row, v), (box, _) in zip(places, drawn, strict=True):
        view, target = plan.views[v], out[v][row]
        _write_crop(image, box, view.interpolation, target)
        if view.augment is not None:
            target[:] = augment(target, view.augment, view_generator(seed, v + AUGMENT_DRAWS))
    shape = len(images), len(plan.views)
    boxes = np.array([box for box, _ in drawn], np.int32).reshape(*shape, 4)
    return boxes, np.array([flip for _, flip in drawn], np.bool_).reshape(shape)


def view_generator(seed: int, v: int) -> random.Random:
    """The source of view v's draws. Any 64-bit seed: the two halves of the range stay distinct."""
    return random.Random(_view_seed(seed, v))


def _view_seed(seed: int, v: int) -> int:
    return (seed % 2**64) << 16 | v


def draw(view: View, height: int, width: int, generator: random.Random) -> tuple[Box, bool]:
    """The view's box in an image of height x width pixels, and whether it is flipped.

    Only `random()` is called, whose sequence Python guarantees across versions; the flip comes first, so that
    it does not depend on the image's size.
    """
    flip = generator.random() < view.flip
    if view.crop == "center":
        return _center_box(view, height, width), flip
    return _random_resized_box(view, height, width, generator), flip


def _random_resized_box(view: View, height: int, width: int, generator: random.Random) -> Box:
    """The box of Inception's crop (Szegedy et al. 2015), with the tries and the fallback of torchvision."""
    uniform = generator.random
    smallest, largest = view.scale
    low, high = math.log(view.ratio[0]), math.log(view.ratio[1])
    for _ in range(10):
        area = height * width * (smallest + (largest - smallest) * uniform())
        ratio = math.exp(low + (high - low) * uniform())
        box_width = round(math.sqrt(area * ratio))
        box_height = round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int((height - box_height + 1) * uniform())
            left = int((width - box_width + 1) * uniform())
            return top, left, box_height, box_width

    # The image is too long or too flat: the largest centred box with an allowed aspect ratio.
    ratio = min(max(width / height, min(view.ratio)), max(view.ratio))
    box_height = min(height, max(1, round(width / ratio)))
    box_width = min(width, max(1, round(height * ratio)))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _center_box(view: View, height: int, width: int) -> Box:
    pixels_per_pixel = min(height / view.size[0], width / view.size[1])
    box_height = max(1, round(view.size[0] * pixels_per_pixel * view.crop_share))
    box_width = max(1, round(view.size[1] * pixels_per_pixel * view.crop_share))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _write_crop(pixels: np.ndarray, box: Box, interpolation: str, out: np.ndarray) -> None:
    """pixels: (H, W, C); out: (h, w, C) of the same type, filled with the box resized to it."""
    top, left, height, width = box
    crop = pixels[top : top + height, left : left + width]
    if crop.shape == out.shape:
        out[:] = crop
        return
    # The kernel would copy a part of an image too, more slowly.
    source, target = _as_image(np.ascontiguousarray(crop)), _as_image(out)
    if interpolation in _RESIZE_INTO:
        _RESIZE_INTO[interpolation](source, out.shape[:2], False, out=target)
    else:
        target.copy_(F.interpolate(source, out.shape[:2], mode=interpolation, antialias=True))
    if out.dtype != np.uint8:
        np.clip(out, 0, 255, out=out)  # bicubic weights go below 0; in uint8 the kernel itself clips


def _as_image(array: np.ndarray) -> torch.Tensor:
    """(H, W, C) array as a (1, C, H, W) channels_last tensor on the same memory. Turned by numpy, whose calls cost a
    third of torch's: on small images that is felt."""
    return torch.from_numpy(array.transpose(2, 0, 1)[None])


def _find_resize_into() -> dict:
    """The kernels under `F.interpolate`, which can write into given memory; empty where torch has renamed them."""
    pixel = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
    try:
        found = {
            "bicubic": torch._C._nn._upsample_bicubic2d_aa,
            "bilinear": torch._C._nn._upsample_bilinear2d_aa,
        }
        for kernel in found.values():
            kernel(pixel, (1, 1), False, out=pixel.clone())
    except (AttributeError, TypeError):
        return {}
    return found


_RESIZE_INTO = _find_resize_into()
