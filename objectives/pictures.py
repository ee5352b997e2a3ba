"""Images side by side, and what draws them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from PIL import Image
from torch import Tensor, nn

_GAP = 2  # pixels between two images


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode, and back to what each part was in: one rank alone draws, so that statistics of a batch would wait for
    the others, and be moved."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def sheet(images: Tensor) -> Image.Image:
    """(rows, columns, 3, H, W) uint8 as one image with white lines between."""
    rows, columns, _, height, width = images.shape
    page = torch.full((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), 255, dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            top, left = row * (height + _GAP), column * (width + _GAP)
            page[top : top + height, left : left + width] = images[row, column].permute(1, 2, 0).cpu()
    return Image.fromarray(page.numpy())
