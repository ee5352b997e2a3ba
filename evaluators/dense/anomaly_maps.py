"""Where an image departs from normal ones: a map of scores for each, and how well it finds true defects.

- Gaussian: at each place of each level (kind of dense feature) a multivariate Gaussian of normal train images, its
  covariance shrunk as in Ledoit & Wolf, 2004. The score is the Mahalanobis distance; maps of several levels are
  enlarged bilinearly, added, and smoothed. PaDiM (Defard et al., 2020) with the shrinkage and the sum over levels of
  MVG (Rippel et al., 2020). Of a level with more than `WIDTH` features the seed draws as many, as PaDiM does.
- Reconstruction: the squared error, in pixels, of a masked autoencoder on the patches that it does not see, the mean
  over many masks. It needs no normal images beside those of pretraining.
- Pixel AUROC: over all pixels of all test images together. Image AUROC: images with a defect against those without, by
  the largest score of each. Normal images alone are learned from, and no defect chooses anything. An image whose mask
  cannot be read, or whose defects all lie outside of what is seen of it, is neither.
- Intervals are by bootstrap over images.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from prelude.data.errors import UserError
from prelude.data.progress import progress_bar
from prelude.evaluators.dense.masks import IGNORED
from prelude.evaluators.dense.places import Places
from prelude.evaluators.frozen.anomaly import fit_gaussian, mahalanobis
from prelude.evaluators.frozen.ranking import auc, bootstrap, bootstrapped, interval, standard_error
from prelude.evaluators.results import Outcome, Percent

WIDTH = 100  # features of a place that a Gaussian is fitted to
SIGMA = 4 / 224  # of the smoothing, in image heights: PaDiM's 4 pixels
FEW_NORMAL = 10
BINS = 4096  # of scores, for the intervals of pixels

Drawn = Callable[[str, Tensor], None]  # (what they are, maps (N, H, W) of the test images)


def gaussian_maps(
    train: dict[str, Places],
    test: dict[str, Places],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    drawn: Drawn | None = None,
) -> Outcome:
    """Pixel and image AUROC of the Gaussians, levels together, in `details` also each alone. drawn: is told the maps.

    seed: of the features that are drawn, and of the bootstrap. Raises UserError where train has no image without a
    defect, or test no defect, or nothing else.
    """
    first = next(iter(test.values()))
    refuse_unless_mixed(first.labels)
    normal = normal_images(train)
    levels = {kind: level_maps(train[kind], test[kind], normal, seed, device) for kind in train}
    together = smoothed(sum(levels.values()))
    if drawn:
        drawn("Gaussian", together)
    alone = {kind: numbers(smoothed(maps), first.labels, seed) for kind, maps in levels.items()}
    return Outcome(
        evaluator="anomaly_map_gaussian",
        numbers=numbers(together, first.labels, seed),
        chosen={"features": " + ".join(train)},
        recipe={"features": list(train), "covariance": "Ledoit-Wolf", "width": WIDTH, "sigma": SIGMA, "seed": seed},
        details={"by_features": alone, "num_normal_train": len(normal)},
        warnings=_warnings(first.labels, len(normal)),
    )


def reconstruction_maps(
    train: dict[str, Places],
    test: dict[str, Places],
    *,
    errors: Callable[[Tensor], Tensor],
    num_masks: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    drawn: Drawn | None = None,
) -> Outcome:
    """The same of what `errors` makes of the test images' sample ids: maps (N, rows, columns)."""
    places = next(iter(test.values()))
    refuse_unless_mixed(places.labels)
    maps = smoothed(enlarged(errors(places.sample_ids), places.labels.shape[1:]))
    if drawn:
        drawn("reconstruction", maps)
    return Outcome(
        evaluator="anomaly_map_reconstruction",
        numbers=numbers(maps, places.labels, seed),
        chosen={"features": "reconstruction"},
        recipe={"num_masks": num_masks, "sigma": SIGMA, "seed": seed},
        details={},
        warnings=_warnings(places.labels),
    )


def _warnings(masks: Tensor, num_normal: int | None = None) -> list[str]:
    warnings = []
    if num_normal is not None and num_normal < FEW_NORMAL:
        warnings.append(f"{num_normal} normal train images are few to learn from how they vary.")
    known, defective = _images(masks)
    if defective[known].all():
        warnings.append("Every test image has a defect, so there is no image AUROC.")
    return warnings


def level_maps(train: Places, test: Places, normal: Tensor, seed: int, device) -> Tensor:
    """(N, H, W) of test at one level. normal: rows of train."""
    rows, columns = test.grid
    width = test.each.shape[1]
    drawn = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:WIDTH].sort().values
    scores = torch.empty(len(test), rows * columns, dtype=torch.float64)
    of_train, of_test = (part.values.view(len(part), part.num_places, width) for part in (train, test))
    with progress_bar("fitting places", rows * columns) as advance:
        for place in range(rows * columns):
            mean, covariance, _ = fit_gaussian(of_train[normal, place][:, drawn].to(device))
            scores[:, place] = mahalanobis(of_test[:, place][:, drawn], mean, covariance).cpu()
            advance(1)
    return enlarged(scores.view(-1, rows, columns), test.labels.shape[1:])


def normal_images(train: dict[str, Places]) -> Tensor:
    """Rows of train that are known to have no defect. Raises UserError where there are fewer than two."""
    known, defective = _images(next(iter(train.values())).labels)
    rows = (known & ~defective).nonzero()[:, 0]
    if len(rows) < 2:
        there = "One train image only is" if len(rows) else "No train image is"
        raise UserError(
            f"{there} without a defect, and what is normal is learned from two or more; write other --train shards, or "
            "--label with the extension of masks of defects."
        )
    return rows


def refuse_unless_mixed(masks: Tensor) -> None:
    if not (masks == 1).any():
        raise UserError(
            "No test image has a defect; write --label with the extension of the masks of defects, whose pixels are 0 "
            "where there is none."
        )
    if not (masks == 0).any():
        raise UserError(
            "The test masks are defects all over; write masks that are 0 where an image is as it should be."
        )


def _images(masks: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) bool: whether anything is known of an image, and whether it has a defect."""
    return tuple(found.flatten(1).any(1) for found in (masks != IGNORED, masks == 1))


def enlarged(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(N, h, w) to (N, H, W) float32, bilinearly."""
    return F.interpolate(maps[:, None].float(), tuple(size), mode="bilinear", align_corners=False)[:, 0]


def smoothed(maps: Tensor) -> Tensor:
    """By a Gaussian of `SIGMA` of the height, edges repeated."""
    sigma = SIGMA * maps.shape[1]
    reach = max(round(4 * sigma), 1)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma).square())
    weights = (weights / weights.sum()).to(maps)
    padded = F.pad(maps[:, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))[:, 0]


def numbers(maps: Tensor, masks: Tensor, seed: int) -> dict[str, Percent]:
    """maps: (N, H, W). masks: the same of 1 (a defect), 0 and `IGNORED`."""
    counted = masks != IGNORED
    exact = 100 * auc(maps[counted], masks[counted] == 1).item()
    draws = 100 * bootstrap(_binned_auc(maps, masks), len(maps), seed)
    found = {"pixel_auroc": Percent(exact, standard_error(draws), interval=interval(draws))}
    known, defective = _images(masks)
    defective = defective[known]
    if defective.any() and not defective.all():
        largest = maps.masked_fill(~counted, -torch.inf).flatten(1).amax(1)[known]
        of_images = lambda weights: auc(largest, defective, weights)  # noqa: E731
        found["image_auroc"] = bootstrapped(of_images, len(largest), seed, ends=True)
    return found


def _binned_auc(maps: Tensor, masks: Tensor) -> Callable[[Tensor], Tensor]:
    """Weights of images (B, N) to (B,): of pixels whose scores are told apart in `BINS` steps of equal frequency."""
    counted = masks != IGNORED
    values = maps[counted]
    edges = values.sort().values[:: max(len(values) // BINS, 1)].contiguous()
    bins = torch.bucketize(maps, edges)
    image = torch.arange(len(maps))[:, None, None].expand_as(masks)
    size = len(edges) + 1
    flat = image * size + bins
    below, above = (
        torch.bincount(flat[masks == kind], minlength=len(maps) * size).view(len(maps), size).double()
        for kind in (0, 1)
    )

    def statistic(weights: Tensor) -> Tensor:
        clean, defects = weights @ below, weights @ above
        lower = clean.cumsum(1) - clean / 2
        return (defects * lower).sum(1) / (defects.sum(1) * clean.sum(1))

    return statistic
