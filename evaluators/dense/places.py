"""Features of places with masks, and the way from places to pixels and back."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prelude.evaluators.dense.masks import IGNORED
from prelude.evaluators.features.extraction import Features

ELEMENTS = 2**24  # scores of pixels held at once


@dataclass(frozen=True)
class Places(Features):
    """N images of L = rows x columns places with D features each: values are (N, L * D), labels the masks (N, H, W)
    uint8 as the encoder sees the images, `IGNORED` where a pixel counts for nothing."""

    grid: tuple[int, int] = (1, 1)  # rows, columns

    @property
    def num_places(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def each(self) -> Tensor:
        """(N * L, D) on the same memory, image after image, places in raster order."""
        return self.values.view(len(self) * self.num_places, -1)

    def rows_of(self, images: Tensor) -> Tensor:
        """The rows of `each` that belong to images (n,)."""
        return (images[:, None] * self.num_places + torch.arange(self.num_places)).flatten()


def shares(masks: Tensor, grid: tuple[int, int], num_classes: int) -> Tensor:
    """(N * L, C) float32: how much of each place's pixels is of each class; what is `IGNORED` is missing.

    masks: (N, H, W) of 0..C-1 and `IGNORED`. A pixel belongs to the place that its middle lies in.
    """
    (rows, columns), (height, width) = grid, masks.shape[1:]
    row = ((torch.arange(height) + 0.5) * rows / height).long()
    column = ((torch.arange(width) + 0.5) * columns / width).long()
    place = row[:, None] * columns + column  # (H, W)
    area = torch.bincount(place.flatten(), minlength=rows * columns).clamp(min=1)[:, None]
    found = []
    for some in masks.split(max(ELEMENTS // (height * width * 8), 1)):
        first = torch.arange(len(some))[:, None, None] * rows * columns
        bins = ((first + place) * num_classes + some)[some != IGNORED]
        counts = torch.bincount(bins, minlength=len(some) * rows * columns * num_classes)
        found.append((counts.view(-1, rows * columns, num_classes) / area).float())
    return torch.cat(found).flatten(0, 1)


def predicted(
    scores: Callable[[Tensor], Tensor], places: Places, images: Tensor, num_classes: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images n, classes (n, H, W)) of the best score after bilinear enlargement, as many at a time as memory allows.

    scores: rows of `each` (m, D) to (m, C).
    """
    size = places.labels.shape[1:]
    for some in images.split(max(ELEMENTS // (num_classes * size[0] * size[1]), 1)):
        found = scores(places.each[places.rows_of(some)]).cpu()  # (n * L, C)
        maps = found.view(len(some), *places.grid, num_classes).permute(0, 3, 1, 2)
        yield some, F.interpolate(maps, size, mode="bilinear", align_corners=False).argmax(1)
