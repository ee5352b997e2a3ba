"""Pictures that need the encoder itself: nearest neighbours of a few test images, and where it looks in them.

- The same test images for every encoder: chosen by seed and labels alone, classes taking turns.
- Images are shown as the encoder sees them, small ones enlarged without smoothing.
- What colour says, thickness and a sign say as well.
"""

import io
from collections import Counter

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from prelude.checkpoints.sources import OpenedEncoder
from prelude.data.loader import one_pass
from prelude.data.shards import ShardIndex
from prelude.evaluators.comparing.comparison import Picture
from prelude.evaluators.comparing.report import attention
from prelude.evaluators.features.extraction import Features, evaluation_plan
from prelude.evaluators.frozen.exact_search import Neighbours
from prelude.pretrain.images import normalise, shown

NUM_IMAGES, NUM_NEIGHBOURS = 6, 6
TILE, GAP = 96, 6  # pixels
MAX_BYTES = 150_000  # of a PNG; above, it gets a palette, and smaller if need be
SAME, OTHER, PAPER = (0, 128, 92), (204, 79, 20), (255, 255, 255)
# From dark to bright evenly, for those who see few colours too: close to matplotlib's inferno.
HEAT = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))


def pictures_of(
    opened: OpenedEncoder,
    indexes: tuple[ShardIndex, ShardIndex],
    train: Features,
    test: Features,
    *,
    seed: int = 0,
) -> list[Picture]:
    """Nearest neighbours and, where the encoder has one, a map of where it looks.

    indexes: the shards of train and of test. train, test: features of one kind, which decide what is near.
    """
    rows = spread_over_classes(test.labels, NUM_IMAGES, seed)
    queries = read(opened, indexes[1], test.sample_ids[rows])
    pictures = [neighbours(opened, indexes[0], train, test, rows, queries)]
    looked_at = heat_maps(opened, queries)
    return pictures + ([looked_at] if looked_at else [])


def neighbours(
    opened: OpenedEncoder, index: ShardIndex, train: Features, test: Features, rows: Tensor, queries: Tensor
) -> Picture:
    """rows: (Q,) of the test images that `queries` (Q, C, H, W) shows, as `read` does. index: of the train images."""
    plan = evaluation_plan(opened)
    near = nearest(train.values, test.values[rows], NUM_NEIGHBOURS)  # (Q, k)
    found = shown(read(opened, index, train.sample_ids[near.flatten()]), plan).unflatten(0, near.shape)
    queries = shown(queries, plan)
    same = same_label(train.labels[near], test.labels[rows][:, None])
    side = TILE + 2 * GAP
    page = Image.new("RGB", (side * (1 + near.shape[1]) + 2 * GAP, side * len(rows)), PAPER)
    for row in range(len(rows)):
        page.paste(_tile(queries[row]), (GAP, row * side + GAP))
        for column in range(near.shape[1]):
            corner = ((column + 1) * side + 3 * GAP, row * side + GAP)
            page.paste(_tile(found[row, column]), corner)
            _frame(page, corner, bool(same[row, column]))
    return Picture(
        "Nearest neighbours",
        f"Left: a test image. Beside it the {near.shape[1]} train images whose “{train.name}” features are nearest by "
        f"cosine, after centring, nearest first. Thick green frame with a tick: of the same class "
        f"({int(same.sum())} of {same.numel()}); thin orange frame with a cross: of another.",
        to_png(page),
    )


def heat_maps(opened: OpenedEncoder, queries: Tensor) -> Picture | None:
    """queries: (Q, C, H, W), as `read` gives them. None for an encoder without a map to show."""
    plan = evaluation_plan(opened)
    device = next((tensor.device for tensor in opened.model.parameters()), torch.device("cpu"))
    found = attention.maps(opened.model, normalise(queries, plan).to(device))
    if found is None:
        return None
    side = TILE + 2 * GAP
    page = Image.new("RGB", (side * len(queries), 2 * side - GAP), PAPER)
    for column, (pixels, values) in enumerate(zip(shown(queries, plan), found.values.float().cpu(), strict=True)):
        place, tile = column * side + GAP, _tile(pixels)
        page.paste(tile, (place, GAP))
        page.paste(_heat(tile, values), (place, side))
    return Picture(
        "Where it looks",
        f"Above: test images. Below: {found.what}; bright is much, each image on its own scale from its least to its "
        "most.",
        to_png(page),
    )


def spread_over_classes(labels: Tensor, count: int, seed: int) -> Tensor:
    """(count,) places in labels, (N,) class numbers or (N, L) findings; of classes one image each before a second."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    seen: Counter = Counter()
    turns = []
    for place in shuffled:
        key = int(labels[place]) if labels.ndim == 1 else None
        turns.append(seen[key])
        seen[key] += 1
    first = np.argsort(np.array(turns), kind="stable")[:count]
    return torch.tensor([shuffled[i] for i in first])


def nearest(train: Tensor, queries: Tensor, k: int) -> Tensor:
    """(Q, k) places in train (N, D), nearest first, by cosine after the mean of train is subtracted."""
    return Neighbours(train).nearest(queries, k)[1]


def same_label(mine: Tensor, theirs: Tensor) -> Tensor:
    """(Q, k) bool of class numbers (Q, k) and (Q, 1), or of findings (Q, k, L) and (Q, 1, L), all of them alike."""
    equal = (mine == theirs) | (mine.isnan() & theirs.isnan())
    return equal if mine.ndim == 2 else equal.all(-1)


def read(opened: OpenedEncoder, index: ShardIndex, sample_ids: Tensor) -> Tensor:
    """(n, C, H, W) views that the encoder is judged on, in the order of `sample_ids`; repeats are fine."""
    wanted = np.unique(sample_ids.numpy())
    by_id = {}
    for batch in one_pass(index, evaluation_plan(opened), batch_size=len(wanted), samples=wanted):
        by_id |= dict(zip(batch.sample_ids.tolist(), batch.views[0], strict=True))
    return torch.stack([by_id[sample] for sample in sample_ids.tolist()])


def to_png(page: Image.Image) -> bytes:
    """With a palette where it would be large otherwise, and at half the size if that is not enough."""
    for attempt in (page, page.quantize(256), page.reduce(2).quantize(256)):
        file = io.BytesIO()
        attempt.save(file, "PNG", optimize=True)
        if len(file.getvalue()) <= MAX_BYTES:
            break
    return file.getvalue()


def _tile(pixels: Tensor) -> Image.Image:
    """(3, H, W) uint8 within a square of TILE pixels."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    enlarge = max(image.size) <= TILE
    scale = TILE // max(image.size) if enlarge and TILE % max(image.size) == 0 else TILE / max(image.size)
    size = tuple(max(round(side * scale), 1) for side in image.size)
    resized = image.resize(size, Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS)
    square = Image.new("RGB", (TILE, TILE), PAPER)
    square.paste(resized, ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
    return square


def _frame(page: Image.Image, corner: tuple[int, int], same: bool) -> None:
    """Around a tile, with a sign in its lower right corner."""
    draw, (left, top) = ImageDraw.Draw(page), corner
    colour, width = (SAME, 5) if same else (OTHER, 2)
    draw.rectangle((left - width, top - width, left + TILE + width - 1, top + TILE + width - 1), None, colour, width)
    x, y = left + TILE - 22, top + TILE - 22
    draw.rectangle((x, y, x + 21, y + 21), colour)
    if same:
        draw.line((x + 5, y + 11, x + 9, y + 16, x + 17, y + 6), PAPER, 3, joint="curve")
    else:
        draw.line((x + 6, y + 6, x + 16, y + 16), PAPER, 3)
        draw.line((x + 16, y + 6, x + 6, y + 16), PAPER, 3)


def _heat(tile: Image.Image, values: Tensor) -> Image.Image:
    """values: (h, w), shown in colour over the tile in grey."""
    low, high = values.min(), values.max()
    scaled = ((values - low) / (high - low).clamp(min=1e-12)).numpy()
    stops = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(scaled, stops, [stop[c] for stop in HEAT]) for c in range(3)], -1)
    heat = Image.fromarray(colours.round().astype(np.uint8)).resize((TILE, TILE), Image.Resampling.NEAREST)
    return Image.blend(tile.convert("L").convert("RGB"), heat, 0.65)
