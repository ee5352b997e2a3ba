"""Volumes: `.npy` members of shards, (H, W, Z), or with channels (H, W, Z, C) or (C, H, W, Z).

- Axes are rows, columns and slices as they are stored. A volume is resampled to the plan's size by linear weights,
  which are widened where it shrinks, as those of images are; one that has that size is copied.
- Values of 8 bits stay as they are. All others need to be told which are black and white, and are floating point on the
  same scale of 0 to 255.
- Flips, noise and standardisation are the device's work, see `pretrain.volumes`.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from prelude.data.arrays import volume_of_npy
from prelude.data.batch import VolumePlan
from prelude.data.counting import counted
from prelude.data.decode import BadImage, OtherChannels, ValueRange, on_8_bits
from prelude.data.errors import UserError
from prelude.data.source import MicroBatchBuffers
from prelude.data.stored import MAX_PIXELS
from prelude.data.value_range import FEW, some_images

_NO_RANGE = "no data.volumes.range"


def decode_volume(
    volume: bytes, channels: int = 1, value_range: ValueRange | None = None, max_voxels: int = MAX_PIXELS
) -> np.ndarray:
    """(H, W, Z, channels): uint8, or with a `value_range` float32 from 0 to 255. Raises BadImage."""
    values = volume_of_npy(volume, channels, max_voxels)
    if value_range is None and values.dtype not in (np.uint8, np.bool_):
        raise BadImage(f"{values.dtype} values, {_NO_RANGE}")
    voxels = on_8_bits(values, value_range)
    return voxels if value_range is None else voxels.astype(np.float32, copy=False)


def resample(voxels: np.ndarray, out: np.ndarray) -> None:
    """voxels: (H, W, Z, C). out: (h, w, z, C) of the same type, which is filled."""
    if voxels.shape == out.shape:
        out[...] = voxels
        return
    (rows, columns, slices), channels = out.shape[:3], out.shape[3]
    planes = torch.from_numpy(np.ascontiguousarray(voxels.transpose(3, 2, 0, 1), np.float32))  # (C, Z, H, W)
    planes = F.interpolate(planes, (rows, columns), mode="bilinear", antialias=True)
    depths = planes.movedim(1, -1).reshape(1, channels, rows * columns, -1)
    depths = F.interpolate(depths, (rows * columns, slices), mode="bilinear", antialias=True)
    values = depths.view(channels, rows, columns, slices).movedim(0, -1)
    out[...] = (values if out.dtype == np.float32 else values.round()).numpy()


class VolumeBuffers(MicroBatchBuffers):
    """The arrays of one micro-batch of volumes."""

    plan: VolumePlan

    @staticmethod
    def sizes(plan: VolumePlan) -> list[tuple[int, ...]]:
        return [plan.size]

    def decode(self, image: bytes) -> np.ndarray:
        """(H, W, Z, C). Raises BadImage."""
        return decode_volume(image, self.plan.channels, self.value_range, self.max_pixels)

    def write(self, decoded: Sequence[tuple[int, np.ndarray, np.ndarray]], seeds: Sequence[int]) -> None:
        for row, voxels, _ in decoded:
            resample(voxels, self.pixels[0][row])


def refuse_other_volumes(index, channels: int) -> None:
    """Raises UserError where a few members are all sound and none of them can be read as it is asked for."""
    refused = None
    for member in some_images(index, FEW):
        try:
            decode_volume(member, channels, index.value_range, index.max_pixels)
            return
        except BadImage as error:
            refused = refused or error
    if isinstance(refused, OtherChannels):
        there = counted(refused.there, "channel")
        raise UserError(
            f"Volumes in {index.named} have {there}, and objective.volume_channels={channels}; write "
            f"objective.volume_channels={refused.there}."
        )
    if str(refused).endswith(_NO_RANGE):
        raise UserError(
            f"Volumes in {index.named} hold {str(refused).split()[0]} values, and nothing says which are black and "
            "white; write data.volumes.range=[LOW,HIGH]."
        )
    if str(refused) == "no array of a volume":
        raise UserError(
            f"Members of {index.named} are no volumes, which are .npy files of an array (H, W, Z), (H, W, Z, C) or "
            "(C, H, W, Z); write others as data.volumes.shards."
        )
