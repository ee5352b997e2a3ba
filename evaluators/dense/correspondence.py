"""What an encoder takes for alike, as pictures: principal components of places as colours, similarity to one place, and
where the encoder looks.

- Colours: the first three principal components of the places' features, of all shown images together, as red, green and
  blue (Oquab et al., DINOv2, 2023, figure 1, without their cut of the background). Each is scaled from its 2nd to its
  98th percentile; its sign is such that its largest weight is positive, so that a picture is the same each time.
- Similarity: the cosine with the place that is pointed at, in its own image and in the others. Features are centred by
  the mean of all places that are shown: what they have in common would make all of them alike.
- Nothing is trained, and nothing of the encoder is changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from prelude.checkpoints.sources import OpenedEncoder
from prelude.data.batch import ViewPlan
from prelude.evaluators.dense import attention
from prelude.evaluators.dense.drawing import GAP, INK, PAPER, TILE, cells, heat, mark, tile
from prelude.evaluators.features.dense import check_dense, default_dense_kind, dense
from prelude.pretrain.images import normalise, shown

LOW, HIGH = 0.02, 0.98  # what becomes 0 and 255 of a component
LINE = 15  # pixels of a line of text
BATCH = 8  # images at once


@dataclass(frozen=True)
class Seen:
    """Of Q images in a grid of (h, w) places."""

    kind: str
    colours: Tensor  # (Q, h, w, 3) uint8
    similar: Tensor  # (Q, h, w) cosines with the place that is pointed at
    place: tuple[int, int]  # row and column, in the first image
    looked: attention.Maps | None

    @property
    def grid(self) -> tuple[int, int]:
        return tuple(self.similar.shape[1:])


@torch.no_grad()
def see(
    opened: OpenedEncoder, pixels: Tensor, plan: ViewPlan, *, point: tuple[float, float] = (0.5, 0.5), kind: str = ""
) -> Seen:
    """pixels: (Q, C, H, W) in 0..255 as `plan` shows them. point: (x, y) in the first image, from 0 to 1. kind: of
    dense feature, by default the one that suits. Raises UserError for an encoder that has none."""
    model = opened.model.eval()
    kind = kind or default_dense_kind(model, opened.name)
    check_dense(model, kind, opened.name)
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    features, looked = [], []
    for some in pixels.split(BATCH):
        images = normalise(some, plan).to(device)
        features.append(dense(model, images, [kind])[kind].cpu())
        looked.append(attention.maps(model, images))
    features = torch.cat(features)
    rows, columns = features.shape[1:3]
    place = min(int(point[1] * rows), rows - 1), min(int(point[0] * columns), columns - 1)
    found = None
    if looked[0] is not None:
        found = attention.Maps(torch.cat([one.values.float().cpu() for one in looked]), looked[0].what)
    return Seen(kind, principal_colours(features), similarity(features, place), place, found)


def principal_colours(features: Tensor) -> Tensor:
    """(Q, h, w, 3) uint8 of (Q, h, w, D). Components that do not vary, or that D < 3 lacks, are mid-grey."""
    rows = features.flatten(0, 2).double()
    centred = rows - rows.mean(0)
    _, axes = torch.linalg.eigh(centred.T @ centred)
    axes = axes.flip(1)[:, :3]  # (D, 3), the largest first
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    values = centred @ (axes * largest.sign())
    low, high = values.quantile(LOW, 0), values.quantile(HIGH, 0)
    varies = high - low > 1e-9 * centred.abs().max()
    scaled = torch.where(varies, (values - low) / (high - low).clamp(min=1e-300), 0.5).clamp(0, 1)
    colours = F.pad(scaled, (0, 3 - scaled.shape[1]), value=0.5)
    return (255 * colours).round().to(torch.uint8).view(*features.shape[:3], 3)


def similarity(features: Tensor, place: tuple[int, int]) -> Tensor:
    """(Q, h, w) cosines with `place` (row, column) of the first image, of (Q, h, w, D) centred over all places."""
    centred = F.normalize(features.double() - features.double().mean((0, 1, 2)), dim=3)
    return (centred @ centred[0, place[0], place[1]]).float()


def rows_of(pixels: Tensor, plan: ViewPlan, seen: Seen, *, with_attention: bool) -> list[tuple[str, list[Image.Image]]]:
    """(what it is, a tile for each image) from top to bottom."""
    images = shown(pixels, plan.shown).cpu()
    size = tuple(images.shape[2:])
    plain = [tile(image) for image in images]
    mark(plain[0], size, seen.place, seen.grid)
    alike = [heat(image, values, (0.0, 1.0)) for image, values in zip(images, seen.similar, strict=True)]
    mark(alike[0], size, seen.place, seen.grid)
    found = [("images", plain), ("components", [cells(colours, size) for colours in seen.colours]), ("similar", alike)]
    if with_attention and seen.looked is not None:
        tiles = [heat(image, values) for image, values in zip(images, seen.looked.values, strict=True)]
        found.append(("attention" if "attention" in seen.looked.what else "activation", tiles))
    return found


def sheet(blocks: Sequence[tuple[str, list[tuple[str, list[Image.Image]]]]], shared: int = 1) -> Image.Image:
    """A page with a block for each encoder: its name, and its rows with what they are. The first `shared` rows, which
    all have alike, stand once, above."""
    font = ImageFont.load_default(12)
    labels = max(font.getlength(what) for _, rows in blocks for what, _ in rows)
    left, columns = round(labels) + 3 * GAP, len(blocks[0][1][0][1])
    lines = [("", *row) for row in blocks[0][1][:shared]]
    for name, rows in blocks:
        lines += [(name if number == 0 else "", what, tiles) for number, (what, tiles) in enumerate(rows[shared:])]
    height = GAP + sum(TILE + GAP + (LINE + GAP if name else 0) for name, _, _ in lines)
    names = max(font.getlength(name) for name, _, _ in lines) + 2 * GAP
    page = Image.new("RGB", (max(left + columns * (TILE + GAP) + GAP, round(names)), height), PAPER)
    draw, top = ImageDraw.Draw(page), GAP
    for name, what, tiles in lines:
        if name:
            draw.text((GAP, top + 2), name, INK, font)
            top += LINE + GAP
        draw.text((GAP, top + TILE // 2 - 8), what, INK, font)
        for column, one in enumerate(tiles):
            page.paste(one, (left + column * (TILE + GAP), top))
        top += TILE + GAP
    return page
