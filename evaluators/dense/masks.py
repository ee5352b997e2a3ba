"""Masks: a class number for each pixel, in a member beside the image, cut and resized as the encoder's view is.

- A mask is a PNG (or any image of one channel) whose values, or places in a palette, are class numbers from 0 to 254.
  255 counts for nothing, as in Pascal VOC, Cityscapes and ADE20K; other numbers do so where they are named.
- It has the size of its image. Resized to the view it keeps to its numbers: the nearest pixel is taken. A mask of
  defects keeps what would fall between these pixels, since one of them makes its image a defective one; an image whose
  defects all lie outside of the view is neither that nor a good one.
"""

import random
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from prelude.data.batch import View
from prelude.data.counting import counted
from prelude.data.decode import BadImage
from prelude.data.errors import UserError
from prelude.data.labels import some
from prelude.data.members import label_members
from prelude.data.shards import ShardIndex
from prelude.data.stored import open_image, values_of
from prelude.data.views import draw
from prelude.evaluators.embedding.samples import pixels_of
from prelude.evaluators.features.labels import Labels

IGNORED = 255
LOOKED_AT = 16  # samples whose image and mask are compared in size
_ONE_CHANNEL = ("1", "L", "P", "I", "I;16", "I;16B")


def mask_labels(index: ShardIndex) -> Labels:
    """Which samples have a mask. Raises UserError where none has, and where it is the image itself."""
    _refuse_images(index)
    known = torch.from_numpy(index.labels[:, 0] >= 0)
    if not known.any():
        raise UserError(
            f"No sample in {index.named} has a .{index.label} member with a mask; write --label with "
            "the extension of the masks, such as png beside .jpg images, or mask.png."
        )
    return Labels(torch.zeros(index.num_samples, dtype=torch.uint8), known)


def every_sample(index: ShardIndex) -> Labels:
    """For masks of defects, which images without one do not have. Raises UserError where it is the image itself."""
    _refuse_images(index)
    return Labels(torch.zeros(index.num_samples, dtype=torch.uint8), torch.ones(index.num_samples, dtype=torch.bool))


def masks_of(
    index: ShardIndex,
    sample_ids: Tensor,
    view: View,
    ignored: Collection[int] = (),
    channels: int = 3,
    of_defects: bool = False,
) -> tuple[Tensor, int, int]:
    """(n, H, W) uint8 as the view shows the images, how many could not be read, and how many have defects of which the
    view shows none. These two are `IGNORED` all over.

    ignored: class numbers that count for nothing. of_defects: a mask is 1 wherever it is not 0, and an image without
    one is 0 all over. Raises UserError for masks that are none, that have another size than
    their images, or classes above 254.
    """
    ids = sample_ids.tolist()
    _check_sizes(index, ids, channels)
    found = torch.full((len(ids), *view.size), IGNORED, dtype=torch.uint8)
    unreadable = unseen = 0
    for row, content in enumerate(label_members(index, ids)):
        if content is None and of_defects:
            found[row] = 0
            continue
        try:
            mask = read_mask(content, index.max_pixels) if content is not None else None
        except BadImage:
            mask = None
        if mask is None:
            unreadable += 1
            continue
        if of_defects:
            defects = _defects_as_seen(mask != 0, view)
            if defects is None:
                unseen += 1
            else:
                found[row] = torch.from_numpy(defects)
            continue
        seen = _as_seen(mask, view)
        if seen.max() > IGNORED or seen.min() < 0:
            raise UserError(
                f"The .{index.label} member of sample {index.key(ids[row])} holds class {seen.max()}; write masks with "
                "class numbers from 0 to 254, and 255 for what counts for nothing."
            )
        for number in ignored:
            seen = np.where(seen == number, IGNORED, seen)
        found[row] = torch.from_numpy(seen.astype(np.uint8))
    if unreadable == len(ids):
        raise UserError(
            f"None of the {counted(len(ids), f'.{index.label} member')} of {index.named} is an image; write "
            "--label with the extension of the masks, such as png."
        )
    return found, unreadable, unseen


def read_mask(content: bytes, max_pixels: int) -> np.ndarray:
    """(h, w) integers. Raises BadImage for what is no image, and UserError for colours."""
    opened = open_image(content, max_pixels)
    if opened.mode not in _ONE_CHANNEL:
        raise UserError(
            f"A mask has {counted(len(opened.getbands()), 'channel')} ({opened.mode}), and colours are no class "
            f"numbers; write "
            "masks as PNGs of one channel, or with a palette."
        )
    return values_of(content, opened).astype(np.int64)


def _defects_as_seen(defects: np.ndarray, view: View) -> np.ndarray | None:
    """(H, W) bool: the nearest pixels; where they miss every defect of the view's box, those in which defects lie. None
    where there are defects, and none of them in the box."""
    seen = _as_seen(defects, view)
    if seen.any() or not defects.any():
        return seen
    top, left, height, width = _box(defects, view)
    rows, columns = defects[top : top + height, left : left + width].nonzero()
    if not len(rows):
        return None
    seen[rows * view.size[0] // height, columns * view.size[1] // width] = True
    return seen


def _box(mask: np.ndarray, view: View) -> tuple[int, int, int, int]:
    return draw(view, *mask.shape, random.Random(0))[0]  # a centre crop draws nothing


def _as_seen(mask: np.ndarray, view: View) -> np.ndarray:
    """(H, W): the nearest pixels of the view's box."""
    top, left, height, width = _box(mask, view)
    rows, columns = (
        first + ((np.arange(count) + 0.5) * side / count).astype(np.int64)
        for first, side, count in ((top, height, view.size[0]), (left, width, view.size[1]))
    )
    return mask[rows[:, None], columns]


def _refuse_images(index: ShardIndex) -> None:
    if (index.labels[:, 0] == index.images[:, 0]).any():
        raise UserError(
            f"The .{index.label} members of {index.named} are the images themselves; write --label "
            f"with the extension of the masks, such as mask.{index.label}, or --image with that of the images."
        )


def _check_sizes(index: ShardIndex, ids: Sequence[int], channels: int) -> None:
    few = [ids[place] for place in some(np.arange(len(ids)))[:: max(len(ids[:64]) // LOOKED_AT, 1)]]
    for sample, size, content in zip(
        few, _sizes(index, few, channels), label_members(index, few, peek=True), strict=True
    ):
        try:
            mask = read_mask(content, index.max_pixels) if content is not None else None
        except BadImage:
            continue
        if size is not None and mask is not None and mask.shape != size:
            raise UserError(
                f"The mask of sample {index.key(sample)} has {mask.shape[0]}x{mask.shape[1]} pixels, and its image "
                f"{size[0]}x{size[1]}; write masks of their images' size."
            )


def _sizes(index: ShardIndex, ids: Sequence[int], channels: int) -> Iterator[tuple[int, int] | None]:
    """(height, width) of images, None for one that cannot be read."""
    for pixels in pixels_of(index, ids, channels):
        yield None if isinstance(pixels, str) else pixels.shape[:2]
