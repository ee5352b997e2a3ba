"""Pictures of what is predicted from what: an image, and parts of its grid of patches brought out over it."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from prelude.data.counting import counted

_SIDE = 128  # least pixels of a panel's side; small images are enlarged by whole factors
_GAP = 4
_HEAD = 14  # pixels above a panel for its title
_HIDDEN = 0.18  # brightness of what is neither context nor target
_TARGET = np.array([255.0, 150.0, 0.0])  # orange
PALETTE = np.array(
    [[230, 60, 60], [70, 140, 240], [70, 200, 90], [200, 90, 220], [240, 200, 50], [90, 220, 220], [250, 150, 180]],
    dtype=float,
)
_REST = np.array([110.0, 110.0, 110.0])

Grid = tuple[int, int]
Panel = tuple[str, Image.Image]  # title and picture


def page(rows: list[list[Panel]]) -> Image.Image:
    """Panels in rows, each below its title; rows may differ in length."""
    width, height = (max(side) for side in zip(*(panel.size for row in rows for _, panel in row), strict=True))
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (columns * (width + _GAP) - _GAP, len(rows) * (height + _HEAD + _GAP) - _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        for c, (title, panel) in enumerate(row):
            left, top = c * (width + _GAP), r * (height + _HEAD + _GAP)
            draw.text((left + 2, top + 1), title, fill="black")
            sheet.paste(panel, (left, top + _HEAD))
    return sheet


def block_panels(pixels: Tensor, grid: Grid, context: list[int], targets: list[list[int]]) -> list[Panel]:
    """The image, its context, and context and target of each prediction. pixels: (3, H, W) uint8."""
    base = enlarged(pixels, grid)
    panels = [("image", _picture(base)), ("context", _picture(_shown(base, grid, context, [])))]
    for k, target in enumerate(targets, start=1):
        panels.append((f"target {k}", _picture(_shown(base, grid, context, target))))
    return panels


def region_panels(pixels: Tensor, grid: Grid, saliency: Tensor, regions: Tensor) -> list[Panel]:
    """The image, its saliency, its regions with their order, and context and target of each step.

    pixels: (3, H, W) uint8. saliency: (N,) in [0, 1]. regions: (N,) 1..n in order of importance, n + 1 the rest.
    """
    base, rid = enlarged(pixels, grid), regions.numpy()
    last = int(rid.max())
    panels = [
        ("image", _picture(base)),
        ("saliency", _picture(_heat(base, grid, saliency.numpy()))),
        (f"{counted(last - 1, 'region')} + rest", _numbered(base, grid, rid)),
    ]
    for step in range(1, last):
        context, target = np.flatnonzero(rid <= step).tolist(), np.flatnonzero(rid == step + 1).tolist()
        named = f"{step}" if step == 1 else f"1-{step}"
        title = f"step {step}: {named} -> {'rest' if step + 1 == last else step + 1}"
        panels.append((title, _picture(_shown(base, grid, context, target))))
    return panels


def enlarged(pixels: Tensor, grid: Grid) -> np.ndarray:
    """(3, H, W) uint8 to (H', W', 3) float, by a whole factor; a patch stays a whole number of pixels."""
    factor = max(-(-_SIDE // min(pixels.shape[1:])), 1)
    return pixels.permute(1, 2, 0).numpy().repeat(factor, 0).repeat(factor, 1).astype(float)


def _spread(values: np.ndarray, base: np.ndarray, grid: Grid) -> np.ndarray:
    """(N, ...) values of patches to (H', W', ...)."""
    values = values.reshape(*grid, *values.shape[1:])
    return values.repeat(base.shape[0] // grid[0], 0).repeat(base.shape[1] // grid[1], 1)


def _shown(base: np.ndarray, grid: Grid, context: Sequence[int], target: Sequence[int]) -> np.ndarray:
    """Context as it is, the target tinted and darker, the rest nearly black."""
    kind = np.zeros(grid[0] * grid[1])
    kind[list(context)] = 1
    kind[list(target)] = 2
    where = _spread(kind, base, grid)[..., None]
    tinted = 0.35 * base + 0.65 * _TARGET
    return np.where(where == 1, base, np.where(where == 2, tinted, _HIDDEN * base))


def _heat(base: np.ndarray, grid: Grid, saliency: np.ndarray) -> np.ndarray:
    """Dark blue to yellow over a grey version of the image."""
    share = _spread(saliency, base, grid)[..., None]
    colour = share * np.array([255.0, 220.0, 40.0]) + (1 - share) * np.array([30.0, 20.0, 110.0])
    return 0.35 * base.mean(-1, keepdims=True) + 0.65 * colour


def _numbered(base: np.ndarray, grid: Grid, rid: np.ndarray) -> Image.Image:
    last = int(rid.max())
    colours = np.array([_REST if k == last else PALETTE[(k - 1) % len(PALETTE)] for k in range(1, last + 1)])
    picture = _picture(0.4 * base + 0.6 * _spread(colours[rid - 1], base, grid))
    draw = ImageDraw.Draw(picture)
    height, width = base.shape[0] / grid[0], base.shape[1] / grid[1]
    for k in range(1, last):
        rows, columns = np.divmod(np.flatnonzero(rid == k), grid[1])
        if len(rows) == 0:
            continue
        # On the patch of the region that lies nearest to its middle: a bent region's middle may lie outside it.
        nearest = ((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2).argmin()
        place = ((columns[nearest] + 0.5) * width, (rows[nearest] + 0.5) * height)
        draw.text(place, str(k), fill="white", anchor="mm", stroke_width=2, stroke_fill="black")
    return picture


def _picture(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
