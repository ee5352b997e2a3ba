"""Sensitivity to global shape: which of an image and two of its disruptions is the odd one out.

After DiST, the Disrupted Structure Testbench (Wen et al., "Does resistance to style-transfer equal Global Shape Bias?",
2023). Features of the three are brought to length 1; the answer is the one whose cosines with the other two sum to the
least; an answer is right where it is the image itself. Chance is a third.

- The paper disrupts by synthesis of textures. Here tiles of a grid are permuted (`features.disrupted`), over several
  grids: a curve, from large tiles, which keep parts of objects whole, to small ones, which keep texture alone.
- What is left of the cuts is a cue of its own: a blurred seam joins what did not belong together. An encoder that sees
  edges alone is above chance, and its untrained twin and raw pixels say by how much.
- Nothing is trained or chosen; the first kind of feature is the headline.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from prelude.data.errors import UserError
from prelude.evaluators.features.disrupted import triplets
from prelude.evaluators.features.extraction import NothingReadable
from prelude.evaluators.labelled import few_warnings
from prelude.evaluators.results import Outcome, percent

TILES = (2, 4, 8, 16)


def odd_one_out(features: Sequence[Tensor]) -> Tensor:
    """(B,) 0, 1 or 2, of three (B, D). Of equal ones the first of the disruptions is the answer, which is wrong."""
    one, two, three = (F.normalize(part.double(), dim=1) for part in features)
    pairs = torch.stack([(two * three).sum(1), (one * three).sum(1), (one * two).sum(1)], 1)  # left out: 0, 1, 2
    answer = pairs.argmax(1)
    return torch.where(pairs[:, 0] > pairs[:, 1:].amax(1), 0, torch.where(answer == 0, 1, answer))


def global_shape(
    batches: Iterable[tuple[Tensor, Tensor]],
    features: Callable[[Tensor], dict[str, Tensor]],
    *,
    tiles: Sequence[int] = TILES,
    shards: str = "the shards",
) -> Outcome:
    """batches: (images (B, C, H, W) normalised, seeds (B,)). features: of images, (B, D) by kind.
    shards: in a sentence.

    Raises UserError for tiles that do not cut the images evenly, or into less than 2 x 2 pixels, and without an image.
    """
    right: dict[str, dict[int, int]] = {}
    total = 0
    for images, seeds in batches:
        for count in tiles:
            refuse_tiles(count, tuple(images.shape[2:]))
            three = [features(part) for part in triplets(images, seeds, count)]
            for kind in three[0]:
                hits = (odd_one_out([part[kind] for part in three]) == 0).sum().item()
                of_kind = right.setdefault(kind, dict.fromkeys(tiles, 0))
                of_kind[count] += hits
        total += len(images)
    if not total:
        raise NothingReadable(shards)
    by_kind = {kind: {f"{n} x {n}": percent(found[n], total) for n in tiles} for kind, found in right.items()}
    first = next(iter(by_kind))
    return Outcome(
        evaluator="global_shape",
        numbers=by_kind[first],
        chosen={"features": first},
        recipe={"tiles": list(tiles), "features": list(by_kind), "chance": 100 / 3},
        details={"by_features": by_kind, "num_images": total},
        by_kind=by_kind,
        warnings=few_warnings(total),
    )


def refuse_tiles(count: int, size: tuple[int, int]) -> None:
    if any(side % count or side // count < 2 for side in size):
        fits = [n for n in range(2, min(size) // 2 + 1) if not any(side % n for side in size)]
        raise UserError(
            f"--tiles {count} does not cut images of {size[0]}x{size[1]} pixels into whole tiles of 2 x 2 or more; "
            f"write --tiles {' '.join(map(str, fits[:6]))}."
        )
