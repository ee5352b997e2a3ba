"""Which parts of an image matter most: from a map of saliency to regions in order of importance.

- The whole batch at once, on the device that holds it; the host waits only to learn whether components are complete.
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
_CHECK_EVERY = 4  # rounds of labelling between two looks at whether anything still changes


@dataclass(frozen=True)
class Regions:
    rid: Tensor  # (B, N) int64: 1..n ranked regions, n + 1 the background
    count: Tensor  # (B,) int64: n

    def sizes(self, most: int) -> Tensor:
        """Patches of regions 1..most + 1, zeros beyond an image's n + 1. Returns (B, most + 1) int64."""
        return F.one_hot(self.rid - 1, most + 1).sum(1)


def normalised_saliency(similarity: Tensor) -> Tensor:
    """Each image's map brought to [0, 1]; a constant one to 0. (B, N) to the same, float32 at least (equation 1)."""
    similarity = similarity.to(torch.promote_types(similarity.dtype, torch.float32))
    least, most = similarity.aminmax(dim=1, keepdim=True)
    return (similarity - least) / (most - least + 1e-6)


def find_regions(
    saliency: Tensor, grid: Size, *, num_regions: int, min_area: float, strategy: Strategy = "otsu_components"
) -> Regions:
    """At most num_regions - 1 regions an image and the background. saliency: (B, N) in [0, 1].

    `otsu_components`: connected components above the image's Otsu threshold, by falling mean saliency; those below
    `min_area`, a share of the image, and those beyond the last place belong to the background.
    `quantiles`: equal shares of the patches by falling saliency, connected or not; every image has all regions.
    """
    if strategy == "quantiles":
        return _quantile_bands(saliency, num_regions)
    levels = (saliency * 255).to(torch.int64)  # truncated, as a conversion to 8 bits is
    foreground = levels > otsu_threshold(levels)[:, None]
    return _rank(first_patch(foreground, grid), saliency, num_regions - 1, min_area)


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


def first_patch(foreground: Tensor, grid: Size) -> Tensor:
    """Names each 8-connected component by its first patch in raster order. (B, N) bool to (B, N) int64.

    Background gets N. Every round, a patch takes the lowest name among its neighbours, then the name of the patch
    that it is named after, so that names travel far in few rounds; it ends when nothing changes.
    """
    num_patches = foreground.shape[1]
    place = torch.arange(num_patches, device=foreground.device)
    # Pooling takes maxima, so a patch starts as N - index: 0 is left for the background.
    names = torch.where(foreground, num_patches - place, 0)
    while True:
        before = names
        for _ in range(_CHECK_EVERY):
            pooled = F.max_pool2d(names.view(-1, 1, *grid).float(), 3, stride=1, padding=1)
            names = torch.where(foreground, pooled.view_as(names).long(), 0)
            named_after = (num_patches - names).clamp(max=num_patches - 1)
            names = torch.where(foreground, names.gather(1, named_after), 0)
        if torch.equal(names, before):
            return num_patches - names


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
    return Regions(rid, count - (place > 0).all(1).long())


def _rank(component: Tensor, saliency: Tensor, most: int, min_area: float) -> Regions:
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
    return Regions(rank_of.gather(1, component), count)


def _quantile_bands(saliency: Tensor, num_regions: int) -> Regions:
    batch, num_patches = saliency.shape
    order = saliency.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(num_patches, device=saliency.device)
    band = (place * num_regions // num_patches + 1).expand_as(order)
    count = torch.full((batch,), num_regions - 1, device=saliency.device)
    return Regions(torch.empty_like(order).scatter_(1, order, band), count)
