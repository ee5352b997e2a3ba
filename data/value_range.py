"""Which values of images with more than 8 bits a channel are black and white, and whether images can be read at all.

- X-ray, CT and microscopy use 12 or 14 of the 16 bits of their files: taken for 16, such images are almost black.
- `auto` is found by sampling images from all over an index, and is a number of whole bits, or 0 to 1 for floating point
  values that lie there, so that train and test shards of one kind agree on it.
- Images are looked at as training reads them: with all pages of a TIFF that are channels, and up to `max_pixels`. Of
  several data sets as many are looked at of each, and each is named that stays dark.
- What no image of a sample can be read as is told once and before anything is trained, with what to write.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from prelude.data.counting import counted
from prelude.data.decode import BadImage, OtherChannels, ValueRange, decode, deep_values
from prelude.data.errors import UserError
from prelude.data.own_white import is_scaled
from prelude.data.remote_shards import read_some
from prelude.data.waiting import in_threads

log = logging.getLogger(__name__)

_SAMPLED, FEW = 64, 8
_DARK = 1 / 4  # of the range: what is never brighter than that


def resolved(index, value_range: ValueRange | Literal["auto"] | None) -> ValueRange | None:
    """What "auto" is for an index; (0, 255) at least. None, for all of 16 bits, where no image has more than 8.

    Raises UserError where values say too little.
    """
    if value_range != "auto":
        return None if value_range is None else (float(value_range[0]), float(value_range[1]))
    found = [one for _, begin, end in _sets(index) for one in _extremes(index, index.channels, begin, end)]
    if not found:
        return None
    lowest, highest = min(low for low, _, _ in found), max(high for _, high, _ in found)
    if all(kind == "u" for _, _, kind in found):
        return 0.0, _whole_bits(int(highest))
    if all(kind == "f" for _, _, kind in found) and 0 <= lowest and highest <= 1:
        return 0.0, 1.0
    raise UserError(
        f"data.range=auto cannot be found: values in {index.named} go from {lowest:g} to {highest:g}, "
        f"and may go further; write data.range=[{lowest:g},{highest:g}] (of an evaluation "
        f"--range {lowest:g},{highest:g}), or the range that is meant."
    )


def may_be_found(value_range: Sequence[float] | None) -> bool:
    """Whether a range is one that "auto" can come to."""
    if value_range is None:
        return True
    low, high = value_range
    return low == 0 and (high == 1 or (high >= 255 and high == _whole_bits(int(high))))


def tell_if_dark(index, channels: int | None = None) -> None:
    """Logs a warning where images stay dark because they use the lower part of 16 bits only; of several data sets, the
    lower part of the range that they share.

    channels: with which they are read, None for what the index says.
    """
    if index.value_range is not None and not index.parts:
        return  # one that was given is meant, and one that was found fits
    black, white = index.value_range or (0.0, 65535.0)
    highest: dict[str, int] = {}
    for name, begin, end in _sets(index):
        found = _extremes(index, channels or index.channels, begin, end, with_scaled=index.value_range is not None)
        if values := [int(high) for _, high, kind in found if kind == "u"]:
            highest[name] = max(values)
    limit = black + _DARK * (white - black)
    whole = _whole_bits(max(highest.values(), default=0))
    remedy = f"write data.range=[0,{whole:.0f}], or data.range=auto"
    if any(value >= limit for value in highest.values()):
        remedy = f"a data.range is one for all of data.mix, so write these images anew with values up to {white:.0f}"
    for name, value in highest.items():
        if value < limit:
            shown = value // 256 if index.value_range is None else max(255 * (value - black) / (white - black), 0)
            log.warning(
                "images in %s have 16 bits and values up to %d only, so all stay dark (at most %d of 255); %s",
                name, value, shown, remedy,
            )  # fmt: skip


def refuse_other_images(index, channels: int) -> None:
    """Raises UserError where a few images are all sound and none of them can be read as it is asked for: with this many
    channels, and in 8 bits unless there is a range."""
    refused, values = None, None
    for image in some_images(index, FEW):
        try:
            decode(image, value_range=index.value_range, channels=channels, max_pixels=index.max_pixels)
            return
        except OtherChannels as error:
            refused = refused or error
        except BadImage as error:
            if not str(error).endswith("no data.range"):
                continue
            values = values or (str(error).split()[0], deep_values(image, channels, index.max_pixels))
    if refused:
        there = counted(refused.there, "channel")
        raise UserError(
            f"Images in {index.named} have {there}, and {channels} are "
            f"asked for; write data.channels={refused.there} with data.mean and data.std of as many values, or take an "
            f"encoder of as many."
        )
    if values:
        dtype, found = values
        raise UserError(
            f"Images in {index.named} hold {dtype} values (one from {np.nanmin(found):g} to {np.nanmax(found):g}), "
            f"and nothing says which are black and white; write data.range=[LOW,HIGH]."
        )


def channels_of(index) -> int:
    """3 where a few images can be RGB; else as many as the first of them that cannot has."""
    for image in some_images(index, FEW):
        try:
            decode(image, value_range=index.value_range, max_pixels=index.max_pixels)
            return 3
        except OtherChannels as error:
            return error.there
        except BadImage:
            continue
    return 3


def _sets(index) -> list[tuple[str, int, int]]:
    """How each of several data sets is named, and where it lies among the samples; or the one that there is."""
    parts = [(f"data.mix.{part.name}", part.begin, part.end) for part in index.parts]
    return parts or [(index.named, 0, index.num_samples)]


def _extremes(
    index, channels: int | None, begin: int, end: int, with_scaled: bool = True
) -> Iterator[tuple[float, float, str]]:
    """The lowest and the highest value, and the kind of number, of those that have more than 8 bits among the images
    that are sampled from there; of those whose file says what is white, and which no range is needed for, where
    `with_scaled` says so."""
    for image in some_images(index, _SAMPLED, begin, end):
        try:
            values = deep_values(image, channels, index.max_pixels)
            scaled = values is not None and not with_scaled and is_scaled(image, index.max_pixels)
        except BadImage:
            continue  # reading for training says what is wrong
        if values is None or scaled:
            continue
        kind = values.dtype.kind
        values = values[np.isfinite(values)] if kind == "f" else values
        if values.size:
            yield float(values.min()), float(values.max()), kind


def some_images(index, count: int, begin: int = 0, end: int | None = None) -> Iterator[bytes]:
    """The bytes of images from all over an index, or from one sample up to another, as far as they can be read."""
    last = (index.num_samples if end is None else end) - 1
    samples = np.unique(np.linspace(begin, last, count).astype(np.int64))

    def bytes_of(sample: int) -> bytes | None:
        try:
            return read_some(index.shard_of(sample), *index.images[sample].tolist())
        except (OSError, BadImage):
            return None  # reading for training says what is wrong

    for image in in_threads(bytes_of, samples.tolist(), lambda sample: f"an image in {index.shard_of(sample)}"):
        if image is not None:
            yield image


def _whole_bits(highest: int) -> float:
    return 2.0 ** max(highest.bit_length(), 8) - 1
