"""Pictures that need the encoder itself: nearest neighbours of a few test images, and where it looks in them.

- The same test images for every encoder: chosen by seed and labels alone, classes taking turns.
- Images are shown as the encoder sees them, small ones enlarged without smoothing.
- What colour says, thickness and a sign say as well.
"""

from collections import Counter

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from prelude.checkpoints.sources import OpenedEncoder
from prelude.data.errors import UserError
from prelude.data.shards import ShardIndex
from prelude.evaluators.comparing.comparison import Picture
from prelude.evaluators.dense import attention
from prelude.evaluators.dense.correspondence import rows_of, see
from prelude.evaluators.dense.drawing import GAP, PAPER, TILE, heat, tile, to_png
from prelude.evaluators.dense.samples import read_samples
from prelude.evaluators.features.dense import default_dense_kind
from prelude.evaluators.features.extraction import Features, evaluation_plan
from prelude.evaluators.frozen.exact_search import Neighbours
from prelude.pretrain.images import normalise, shown

NUM_IMAGES, NUM_NEIGHBOURS = 6, 6
SAME, OTHER = (0, 128, 92), (204, 79, 20)


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
    queries = read_samples(indexes[1], evaluation_plan(opened), test.sample_ids[rows].tolist())
    pictures = [neighbours(opened, indexes[0], train, test, rows, queries)]
    return [*pictures, *filter(None, (heat_maps(opened, queries), alike(opened, queries)))]


def neighbours(
    opened: OpenedEncoder, index: ShardIndex, train: Features, test: Features, rows: Tensor, queries: Tensor
) -> Picture:
    """rows: (Q,) of the test images, which `queries` (Q, C, H, W) are views of. index: of the train images."""
    plan = evaluation_plan(opened)
    near = nearest(train.values, test.values[rows], NUM_NEIGHBOURS)  # (Q, k)
    seen = read_samples(index, plan, train.sample_ids[near.flatten()].tolist())
    found = shown(seen, plan.shown).unflatten(0, near.shape)
    queries = shown(queries, plan.shown)
    same = same_label(train.labels[near], test.labels[rows][:, None])
    side = TILE + 2 * GAP
    page = Image.new("RGB", (side * (1 + near.shape[1]) + 2 * GAP, side * len(rows)), PAPER)
    for row in range(len(rows)):
        page.paste(tile(queries[row]), (GAP, row * side + GAP))
        for column in range(near.shape[1]):
            corner = ((column + 1) * side + 3 * GAP, row * side + GAP)
            page.paste(tile(found[row, column]), corner)
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
    for column, (pixels, values) in enumerate(zip(shown(queries, plan.shown), found.values.float().cpu(), strict=True)):
        place = column * side + GAP
        page.paste(tile(pixels), (place, GAP))
        page.paste(heat(pixels, values), (place, side))
    return Picture(
        "Where it looks",
        f"Above: test images. Below: {found.what}; bright is much, each image on its own scale from its least to its "
        "most.",
        to_png(page),
    )


def alike(opened: OpenedEncoder, queries: Tensor) -> Picture | None:
    """The same of places: which an encoder takes for alike. None for an encoder without tokens and maps."""
    try:
        kind = default_dense_kind(opened.model, opened.name)
    except UserError:
        return None
    plan = evaluation_plan(opened)
    seen = see(opened, queries, plan, kind=kind)
    rows = rows_of(queries, plan, seen, with_attention=False)
    side = TILE + 2 * GAP
    page = Image.new("RGB", (side * len(queries), len(rows) * (TILE + GAP) + GAP), PAPER)
    for number, (_, tiles) in enumerate(rows):
        for column, one in enumerate(tiles):
            page.paste(one, (column * side + GAP, number * (TILE + GAP) + GAP))
    height, width = seen.grid
    return Picture(
        "What it takes for alike",
        f"Above: test images. Middle: the first three principal components of the “{kind}” features of all their "
        f"{height} x {width} places as red, green and blue; like colours are like features. Below: the cosine with the "
        "framed place, centred, from 0 (dark) to 1 (bright).",
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
