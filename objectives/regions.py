"""Which parts of an image matter most: from a map of saliency to regions in order of importance.

- The whole batch at once, on the device that holds it; the host never waits.
- Thresholds are OpenCV's 8-bit Otsu thresholds, exactly; components are those of 8-connected labelling, exactly.
- Regions are disjoint, never empty, and with the rest (the background, always last) make up the whole grid.
- Sums are over integers, so that no order of additions can change a ranking.

Everything is one small map, `rid`: with n regions in an image, 1..n in order of falling saliency, n + 1 elsewhere.
DSeq-JEPA (arXiv 2511.17354), equations 1 to 3.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prelude.objectives.blocks import Size, draw_corners, inside
from prelude.objectives.options import Strategy
from prelude.pretrain.draws import uniform

RECTANGLE_STREAM, ACCEPT_STREAM = 131, 132  # of pretrain.draws
_LEVELS = 256
_FIXED_POINT = 2**30  # saliency as integers while it is summed


@dataclass(frozen=True)
class Regions:
    rid: Tensor  # (B, N) int64: 1..n ranked regions, n + 1 the background
    count: Tensor  # (B,) int64: n
    # Scalar bool: False where components wind too much for the rounds that were given; None where nothing was labelled.
    complete: Tensor | None = None

    def sizes(self, most: int) -> Tensor:
        """Patches of regions 1..most + 1, zeros beyond an image's n + 1. Returns (B, most + 1) int64."""
        sizes = self.rid.new_zeros(len(self.rid), most + 1)
        return sizes.scatter_add_(1, self.rid - 1, torch.ones_like(self.rid))


def normalised_saliency(similarity: Tensor) -> Tensor:
    """Each image's map brought to [0, 1]; a constant one to 0. (B, N) to the same, float32 at least (equation 1)."""
    similarity = similarity.to(torch.promote_types(similarity.dtype, torch.float32))
    least, most = similarity.aminmax(dim=1, keepdim=True)
    return (similarity - least) / (most - least + 1e-6)


def find_regions(
    saliency: Tensor,
    grid: Size,
    *,
    num_regions: int,
    min_area: float,
    strategy: Strategy = "otsu_components",
    rounds: int | None = None,
) -> Regions:
    """At most num_regions - 1 regions an image and the background. saliency: (B, N) in [0, 1].

    `otsu_components`: connected components above the image's Otsu threshold, by falling mean saliency; those below
    `min_area`, a share of the image, and those beyond the last place belong to the background.
    `quantiles`: equal shares of the patches by falling saliency, connected or not; every image has all regions.
    rounds: of labelling. Those of `usual_rounds` unless given; as many as there are patches always suffice.
    """
    if strategy == "quantiles":
        return _quantile_bands(saliency, num_regions)
    levels = (saliency * 255).to(torch.int64)  # truncated, as a conversion to 8 bits is
    foreground = levels > otsu_threshold(levels)[:, None]
    component, complete = first_patch(foreground, grid, rounds or usual_rounds(grid))
    return _rank(component, complete, saliency, num_regions - 1, min_area)


def otsu_threshold(levels: Tensor) -> Tensor:
    """The 8-bit level up to which a patch is background: the lowest one that separates two classes best.

    levels: (B, N) int64 in 0..255. Returns (B,) int64; 0 for a constant map. Otsu (1979), as OpenCV computes it.
    """
    histogram = torch.zeros(len(levels), _LEVELS, dtype=torch.int64, device=levels.device)
    histogram.scatter_add_(1, levels, torch.ones_like(levels))
    below = histogram.cumsum(1)  # patches at or below each level
    mass = (histogram * torch.arange(_LEVELS, device=levels.device)).cumsum(1)
    above = levels.shape[1] - below
    # Between-class variance times N^2. Squares of whole numbers below 2**53, up to N = 600: ties are exact.
    gap = (mass[:, -1:] * below - levels.shape[1] * mass).double()
    weight = (below * above).double()
    return torch.where(weight > 0, gap.square() / weight, -1.0).argmax(1)


def usual_rounds(grid: Size) -> int:
    """Rounds of labelling that have sufficed for every map tried, mazes and spirals among them, with one to spare."""
    return max(grid).bit_length() + 2


def first_patch(foreground: Tensor, grid: Size, rounds: int) -> tuple[Tensor, Tensor]:
    """Names each 8-connected component by its first patch in raster order. (B, N) bool to (B, N) int64.

    Background gets N. Also returns whether that was done after these rounds, a scalar bool.

    A patch is named after another of its component, and that one after a third. In a round, every patch shows its
    neighbours whom its namesake is named after; the earliest name that it is shown goes to the patch, and to the one
    that it was named after, so that whole parts of a component are renamed at once (FastSV: Zhang, Azad and Hu, 2020).
    """
    num_patches = foreground.shape[1]
    # Pooling takes maxima, so a patch starts as N - index: 0 is left for the background.
    names = torch.where(foreground, num_patches - torch.arange(num_patches, device=foreground.device), 0)
    for _ in range(rounds):
        names = _renamed(names, foreground, grid)
    return num_patches - names, (names == _renamed(names, foreground, grid)).all()


def _renamed(names: Tensor, foreground: Tensor, grid: Size) -> Tensor:
    after = _named_after(names)
    shown = torch.where(foreground, names.gather(1, after), 0)
    shown = F.max_pool2d(shown.view(-1, 1, *grid).float(), 3, stride=1, padding=1).view_as(names).long()
    shown = torch.where(foreground, shown, 0)
    names = torch.maximum(names.scatter_reduce(1, after, shown, "amax"), shown)
    return torch.where(foreground, names.gather(1, _named_after(names)), 0)


def _named_after(names: Tensor) -> Tensor:
    """The patch after which each is named; the last one for background, which shows and is shown nothing."""
    return (names.shape[1] - names).clamp(max=names.shape[1] - 1)


def with_rectangles(
    regions: Regions, seeds: Tensor, grid: Size, *, most: int, acceptance: float, size: Size
) -> Regions:
    """Each of the `most` places for a region keeps its region with probability `acceptance`, and gets a rectangle
    at a random place otherwise (algorithm 1 of the paper); an earlier place's patches stay its own.

    size: (rows, columns) of a rectangle. A place that is kept and has no region stays empty; so does one whose
    patches are all taken. Places are numbered anew without the empty ones; where nothing is left for a background,
    the last one becomes it.
    """
    accepted = uniform(seeds, most, ACCEPT_STREAM) < acceptance  # (B, most)
    rectangles = inside(draw_corners(seeds, most, size, grid, RECTANGLE_STREAM), size, grid)  # (B, most, N)
    count = torch.zeros_like(regions.count)
    place = torch.zeros_like(regions.rid)
    for k in range(most):
        found = (regions.rid == k + 1) & (regions.count[:, None] > k)
        wanted = torch.where(accepted[:, k, None], found, rectangles[:, k]) & (place == 0)
        count = count + wanted.any(1)
        place = torch.where(wanted, count[:, None], place)
    rid = torch.where(place == 0, count[:, None] + 1, place)
    return Regions(rid, count - (place > 0).all(1).long(), regions.complete)


def _rank(component: Tensor, complete: Tensor, saliency: Tensor, most: int, min_area: float) -> Regions:
    """component: (B, N), the first patch of each patch's component, N for background."""
    batch, num_patches = component.shape
    ones = torch.ones_like(component)
    totals = component.new_zeros(2, batch, num_patches + 1)
    area = totals[0].scatter_add_(1, component, ones)[:, :-1]
    mass = totals[1].scatter_add_(1, component, (saliency * _FIXED_POINT).round().long())[:, :-1]
    valid = area >= max(min_area * num_patches - 1e-9, 1)
    score = torch.where(valid, mass.double() / area.clamp(min=1), -1.0)
    # Stable: of equal regions the one whose first patch comes first.
    ranking = score.argsort(dim=1, descending=True, stable=True)[:, :most]
    count = valid.sum(1).clamp(max=most)
    ranks = torch.arange(1, ranking.shape[1] + 1, device=component.device)
    ranks = torch.where(ranks <= count[:, None], ranks, count[:, None] + 1)
    rank_of = (count[:, None] + 1).repeat(1, num_patches + 1).scatter_(1, ranking, ranks)
    return Regions(rank_of.gather(1, component), count, complete)


def _quantile_bands(saliency: Tensor, num_regions: int) -> Regions:
    batch, num_patches = saliency.shape
    order = saliency.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(num_patches, device=saliency.device)
    band = (place * num_regions // num_patches + 1).expand_as(order)
    count = torch.full((batch,), num_regions - 1, device=saliency.device)
    return Regions(torch.empty_like(order).scatter_(1, order, band), count)
