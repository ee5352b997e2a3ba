"""Images side by side."""

import torch
from PIL import Image
from torch import Tensor

_GAP = 2  # pixels between two images


def sheet(images: Tensor) -> Image.Image:
    """(rows, columns, 3, H, W) uint8 as one image with white lines between."""
    rows, columns, _, height, width = images.shape
    page = torch.full((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), 255, dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            top, left = row * (height + _GAP), column * (width + _GAP)
            page[top : top + height, left : left + width] = images[row, column].permute(1, 2, 0).cpu()
    return Image.fromarray(page.numpy())
