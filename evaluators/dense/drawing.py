"""Tiles of a sheet: images as an encoder sees them, and what is said of their places over or beside them."""

import io
from colorsys import hsv_to_rgb

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from prelude.evaluators.dense.masks import IGNORED

TILE, GAP = 96, 6  # pixels
MAX_BYTES = 150_000  # of a PNG within a page; above, it gets a palette, and smaller if need be
FILE_BYTES = 5_000_000  # of one that is a file of its own
PAPER, INK = (255, 255, 255), (24, 24, 24)
# From dark to bright evenly, for those who see few colours too: close to matplotlib's inferno.
HEAT = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))
_GOLDEN = 0.6180339887  # of the circle of hues, from one class to the next
_OVER = 0.65  # of the heat, over the image in grey


def tile(pixels: Tensor) -> Image.Image:
    """(3, H, W) uint8 within a square of TILE pixels."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    return _squared(image.resize(*_fitted(image.size)))


def heat(pixels: Tensor, values: Tensor, limits: tuple[float, float] | None = None) -> Image.Image:
    """values: (h, w), in colour over the image (3, H, W) in grey. limits: what is darkest and brightest, by default the
    least and the most of these values."""
    low, high = limits or (values.min().item(), values.max().item())
    scaled = ((values - low) / max(high - low, 1e-12)).clamp(0, 1).numpy()
    stops = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(scaled, stops, [stop[c] for stop in HEAT]) for c in range(3)], -1)
    grey = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).convert("L").convert("RGB")
    grey = grey.resize(*_fitted(grey.size))
    over = Image.fromarray(colours.round().astype(np.uint8)).resize(grey.size, Image.Resampling.NEAREST)
    return _squared(Image.blend(grey, over, _OVER))


def cells(colours: Tensor, size: tuple[int, int]) -> Image.Image:
    """colours: (h, w, 3) uint8, one for each place of an image of `size` (height, width)."""
    image = Image.fromarray(colours.numpy())
    return _squared(image.resize(_fitted((size[1], size[0]))[0], Image.Resampling.NEAREST))


def class_colours(classes: Tensor) -> Tensor:
    """(h, w) uint8 class numbers to (h, w, 3) uint8: hues that stay apart however many there are, and black for what
    counts for nothing."""
    table = [hsv_to_rgb(n * _GOLDEN % 1, 0.55 + 0.15 * (n % 3), 0.95 - 0.2 * (n // 3 % 2)) for n in range(256)]
    colours = (255 * torch.tensor(table)).round().to(torch.uint8)
    colours[IGNORED] = 0
    return colours[classes.long()]


def mark(square: Image.Image, size: tuple[int, int], place: tuple[int, int], grid: tuple[int, int]) -> None:
    """A frame, white within black, around a place (row, column) of a grid over an image of `size` in its tile."""
    width, height = _fitted((size[1], size[0]))[0]
    left, top = (TILE - width) // 2, (TILE - height) // 2
    box = [
        left + place[1] * width // grid[1],
        top + place[0] * height // grid[0],
        left + (place[1] + 1) * width // grid[1] - 1,
        top + (place[0] + 1) * height // grid[0] - 1,
    ]
    draw = ImageDraw.Draw(square)
    for by, colour in ((2, (0, 0, 0)), (1, PAPER), (0, (0, 0, 0))):
        draw.rectangle([box[0] - by, box[1] - by, box[2] + by, box[3] + by], None, colour)


def to_png(page: Image.Image, max_bytes: int = MAX_BYTES) -> bytes:
    """With a palette where it would be large otherwise, and at half the size if that is not enough."""
    for attempt in (page, page.quantize(256), page.reduce(2).quantize(256)):
        file = io.BytesIO()
        attempt.save(file, "PNG", optimize=True)
        if len(file.getvalue()) <= max_bytes:
            break
    return file.getvalue()


def _fitted(size: tuple[int, int]) -> tuple[tuple[int, int], Image.Resampling]:
    """(width, height) that fits a tile, and how to get there: small images are enlarged without smoothing."""
    enlarge = max(size) <= TILE
    scale = TILE // max(size) if enlarge and TILE % max(size) == 0 else TILE / max(size)
    fitted = tuple(max(round(side * scale), 1) for side in size)
    return fitted, Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS


def _squared(image: Image.Image) -> Image.Image:
    square = Image.new("RGB", (TILE, TILE), PAPER)
    square.paste(image, ((TILE - image.width) // 2, (TILE - image.height) // 2))
    return square
