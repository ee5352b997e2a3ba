"""Anomaly score: how far an image lies from a Gaussian that was fitted to normal images' frozen features.

Rippel et al., "Modeling the Distribution of Normal Data in Pre-Trained Deep Features for Anomaly Detection", 2020:
the Mahalanobis distance to the mean of normal training images, with the covariance shrunk as in Ledoit & Wolf, "A
well-conditioned estimator for large-dimensional covariance matrices", 2004. Distances of several kinds of feature (the
paper's levels) are added.

- One class is normal, all others are anomalies. Only normal training images are used, and no anomaly chooses anything.
- By default each class with enough test images is normal in turn, and the headline is the mean of their areas under
  the ROC curve. Its standard error is of the same classes: a draw of the bootstrap that lacks one is left out.
- Fitted in float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from prelude.data.errors import UserError
from prelude.evaluators.features.extraction import Features
from prelude.evaluators.frozen.ranking import MIN_POSITIVES, auc, bootstrapped
from prelude.evaluators.frozen.splits import first_few
from prelude.evaluators.results import Outcome

PIECE = 4096  # samples


def anomaly(
    train: dict[str, Features],
    test: dict[str, Features],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    normal: Sequence[int] | None = None,
) -> Outcome:
    """AUROC of one class against the rest, the mean over the classes `normal` (default: all that both sets have, and
    test `MIN_POSITIVES` times; all of them where none is there so often).

    seed: of the bootstrap behind the standard error. Raises UserError for a class that train or test lacks, or of which
    train has a single image, which varies in nothing, and where test has nothing else.
    """
    labels, test_labels = next(iter(train.values())).labels, next(iter(test.values())).labels
    numbers, counts = labels.unique(return_counts=True)
    shared = sorted(set(numbers[counts > 1].tolist()) & set(test_labels.tolist()))
    frequent = [number for number in shared if (test_labels == number).sum() >= MIN_POSITIVES] or shared
    classes = frequent if normal is None else list(dict.fromkeys(normal))
    unknown = [number for number in classes if number not in shared]
    if unknown or not classes:
        _refuse(unknown, numbers[counts == 1].tolist(), shared)
    if len(test_labels.unique()) < 2:
        raise UserError("The test shards hold one class only, so nothing in them is an anomaly; write others.")
    distances = {number: _distances(train, test, labels == number, device) for number in classes}  # by class and kind
    summed = {number: torch.stack(list(found.values())).sum(0) for number, found in distances.items()}

    def mean_auc(weights: Tensor) -> Tensor:
        each = [auc(summed[number], test_labels != number, weights) for number in classes]
        return torch.stack(each).mean(0)

    by_class = {
        c: {
            "auroc": 100 * auc(summed[c], test_labels != c).item(),
            "by_features": {kind: 100 * auc(d, test_labels != c).item() for kind, d in distances[c].items()},
            "num_normal_train": int((labels == c).sum()),
            "num_normal_test": int((test_labels == c).sum()),
        }
        for c in classes
    }
    return Outcome(
        evaluator="anomaly",
        numbers={"auroc": bootstrapped(mean_auc, len(test_labels), seed)},
        chosen={"features": " + ".join(train)},
        recipe={"normal": classes, "features": list(train), "covariance": "Ledoit-Wolf", "seed": seed},
        details={"by_class": by_class},
        warnings=_warnings(shared, classes, test_labels) if normal is None else [],
    )


def _refuse(unknown: list[int], single: list[int], shared: list[int]) -> None:
    what = f"Class {first_few(unknown) or 'of any number'} is not in train and test"
    if alone := [number for number in unknown if number in single]:
        what = f"Class {first_few(alone)} has one train image, which says nothing of how normal ones vary"
    raise UserError(f"{what}; write {f'one of {first_few(shared)}' if shared else 'shards with classes in common'}.")


def _warnings(shared: list[int], classes: list[int], test_labels: Tensor) -> list[str]:
    rare = [number for number in shared if (test_labels == number).sum() < MIN_POSITIVES]
    if not rare:
        return []
    done = "all are so rare that they count nonetheless" if classes == shared else "left out of the mean AUROC"
    return [f"With fewer than {MIN_POSITIVES} images in test, so {done}: class {', '.join(map(str, rare))}."]


def fit_gaussian(values: Tensor) -> tuple[Tensor, Tensor, float]:
    """(mean (D,), shrunk covariance (D, D), shrinkage in 0..1) of values (N, D), in float64."""
    num_samples, width = values.shape
    mean = values.double().mean(0)
    centred = values.double() - mean
    covariance = centred.T @ centred / num_samples
    size = covariance.diagonal().mean()  # of the sphere that is shrunk to
    distance = covariance.square().sum() / width - size**2  # Ledoit & Wolf's d^2
    error = (centred.square().sum(1).square().mean() - covariance.square().sum()) / (width * num_samples)  # their b^2
    shrinkage = (error.clamp(max=distance) / distance).item() if distance > 0 else 1.0
    shrunk = (1 - shrinkage) * covariance
    shrunk.diagonal().add_(shrinkage * size)
    return mean, shrunk, shrinkage


def mahalanobis(values: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """(N,) float64 distances of values (N, D)."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:  # every normal image has the same features, up to rounding
        jitter = covariance.diagonal().mean().clamp(min=1e-12) * 1e-6
        factor = torch.linalg.cholesky(covariance + jitter * torch.eye(len(mean), device=mean.device).double())
    pieces = []
    for piece in values.split(PIECE):
        centred = (piece.to(mean.device).double() - mean).T  # (D, n)
        pieces.append(torch.linalg.solve_triangular(factor, centred, upper=False).square().sum(0).sqrt())
    return torch.cat(pieces)


def _distances(train: dict[str, Features], test: dict[str, Features], is_normal: Tensor, device) -> dict[str, Tensor]:
    """(N,) of the test images, on the CPU, by kind."""
    found = {}
    for kind in train:
        mean, covariance, _ = fit_gaussian(train[kind].values[is_normal].to(device))
        found[kind] = mahalanobis(test[kind].values, mean, covariance).cpu()
    return found
