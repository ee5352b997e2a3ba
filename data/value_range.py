"""Which values of images with more than 8 bits a channel are black and white.

- X-ray, CT and microscopy use 12 or 14 of the 16 bits of their files: taken for 16, such images are almost black.
- `auto` is found by sampling images from all over an index, and is a number of whole bits, so that train and test
  shards of one kind agree on it.
"""

import logging
from collections.abc import Iterator
from typing import Literal

import numpy as np

from prelude.data.decode import BadImage, deep_values
from prelude.data.remote_shards import read_some
from prelude.data.waiting import in_threads

log = logging.getLogger(__name__)

ValueRange = tuple[float, float]  # stored values that become black and white
_SAMPLED = 64
_DARK = 1 / 4  # of the range: what is never brighter than that


def resolved(index, value_range: ValueRange | Literal["auto"] | None) -> ValueRange | None:
    """What "auto" is for an index; (0, 255) at least. None, for all of 16 bits, where no image has more than 8."""
    if value_range != "auto":
        return None if value_range is None else (float(value_range[0]), float(value_range[1]))
    highest = max(_highest_values(index), default=None)
    return None if highest is None else (0.0, _whole_bits(highest))


def tell_if_dark(index) -> None:
    """Logs a warning where images stay dark because they use the lower part of 16 bits only."""
    if index.value_range is not None:
        return
    highest = max(_highest_values(index), default=None)
    if highest is not None and highest < _DARK * 65535:
        log.warning(
            "images in %s and the rest have 16 bits and values up to %d only, so all stay dark (at most %d of 255); "
            "write data.range=[0,%.0f], or data.range=auto",
            index.paths[0], highest, highest // 256, _whole_bits(highest),
        )  # fmt: skip


def _highest_values(index) -> Iterator[int]:
    """Of the sampled images that have more than 8 bits."""
    samples = np.unique(np.linspace(0, index.num_samples - 1, _SAMPLED).astype(np.int64))

    def values_of(sample: int) -> np.ndarray | None:
        try:
            return deep_values(read_some(index.shard_of(sample), *index.images[sample].tolist()))
        except (OSError, BadImage):
            return None  # reading for training says what is wrong

    for values in in_threads(values_of, samples.tolist(), lambda sample: f"an image in {index.shard_of(sample)}"):
        if values is not None and values.dtype.kind != "f":
            yield int(values.max())


def _whole_bits(highest: int) -> float:
    return 2.0 ** max(highest.bit_length(), 8) - 1
