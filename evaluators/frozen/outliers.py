"""Images of other kinds than the known classes: how well scores of frozen features tell them apart.

Known are the classes of train. Test holds images of these, and others: those of another data set, or of classes that
train lacks. Scores are higher for what is further from the known.

- Mahalanobis: the distance to the nearest class mean under one covariance, that of the samples around their class means
  (Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks", 2018),
  shrunk as in Ledoit & Wolf, 2004.
- Nearest neighbour: the distance to the k-th nearest train image, features brought to length 1 (Sun et al.,
  "Out-of-Distribution Detection with Deep Nearest Neighbors", 2022).
- Mixture: minus the log density of a mixture of several Gaussians a class, with one covariance for all. The centres of
  a class are found by k-means from the seed, in the space that the covariance of the classes makes round; classes and
  centres weigh what they hold. With one centre it is the Mahalanobis distance to all classes at once.
- AUROC, and the share of others that pass for known where 95 % of the known pass (FPR at 95 %; less is better).
- Other images are never learned from, so nothing can be chosen: the first kind of feature is the headline.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prelude.data.errors import UserError
from prelude.evaluators.features.extraction import Features
from prelude.evaluators.frozen.anomaly import PIECE, fit_gaussian
from prelude.evaluators.frozen.exact_search import QUERIES, Neighbours
from prelude.evaluators.frozen.ranking import auc, bootstrapped
from prelude.evaluators.frozen.splits import first_few
from prelude.evaluators.results import Outcome, Percent

OTHER = torch.iinfo(torch.int64).min  # the label of an image of another data set; no class has it
K, COMPONENTS, ROUNDS = 50, 4, 50  # neighbours; Gaussians a class, and rounds of k-means at most
PASS = 0.95  # of the known


def outliers(
    train: dict[str, Features],
    test: dict[str, Features],
    *,
    score: str,
    seed: int = 0,
    device: torch.device | str = "cpu",
    unknown: Sequence[int] = (),
    k: int | None = None,
    components: int = COMPONENTS,
) -> Outcome:
    """AUROC and FPR at 95 % of one score (`SCORES`). unknown: classes that are taken out of train, so that those of
    test are others. k: by default `K`, or the number of known train images where they are fewer.

    seed: of k-means and the bootstrap. Raises UserError where train has no class left, or test nothing known, or no
    others, for a class that is nowhere, for a k above the number of known train images, and where no class of train has
    a second image, whose spread two of the scores are made of.
    """
    first = next(iter(train))
    known = without(train[first], unknown)
    other = ~torch.isin(test[first].labels, known.labels)
    _refuse(train[first], test[first], known, other, unknown)
    warnings, settings = _strangers(test[first].labels, other, unknown), {}
    if score == "knn":
        settings, told = _neighbour(k, len(known))
        warnings += told
    else:
        _refuse_single_images(known)
    if score == "mixture":
        settings = {"components": components}
        warnings += _fewer_centres(known, components)
    numbers = {}
    for kind in train:
        of_kind = without(train[kind], unknown)
        found = SCORES[score](of_kind, test[kind], seed=seed, device=device, **settings)
        numbers[kind] = _numbers(found, other, seed)
    return Outcome(
        evaluator=f"ood_{score}",
        numbers=numbers[first],
        chosen={"features": first},
        recipe={"features": list(train), "unknown": list(unknown), **settings, "seed": seed},
        details={"by_features": numbers, "num_others": int(other.sum()), "num_known": int((~other).sum())},
        by_kind=numbers,
        warnings=warnings,
    )


def without(features: Features, classes: Sequence[int]) -> Features:
    rows = ~torch.isin(features.labels, torch.tensor(list(classes), dtype=torch.long))
    if rows.all():
        return features
    kept = vars(features) | {name: getattr(features, name)[rows] for name in ("values", "labels", "sample_ids")}
    return Features(**kept | {"groups": None, "same_as": None})


def mahalanobis_to_classes(train: Features, test: Features, *, seed: int = 0, device="cpu") -> Tensor:
    """(N,) float64, the least of the distances to the class means."""
    means, _, whiten = _round_classes(train, device)
    return torch.cat([torch.cdist(piece, whiten(means)).min(1).values for piece in _whitened(test, whiten)]).cpu()


def distance_to_neighbour(train: Features, test: Features, *, seed: int = 0, device="cpu", k: int = K) -> Tensor:
    """(N,) 1 - cosine with the k-th nearest, or with the furthest of fewer."""
    bank = Neighbours(train.values, centred=False, device=device)
    return torch.cat([1 - bank.nearest(some, k)[0][:, -1] for some in test.values.split(QUERIES)]).double().cpu()


def minus_log_density(
    train: Features, test: Features, *, seed: int = 0, device="cpu", components: int = COMPONENTS
) -> Tensor:
    """(N,) float64 of the mixture."""
    centres, weights, whiten, log_det = fit_mixture(train, components, seed, device)
    width = centres.shape[1]
    constant = 0.5 * (width * math.log(2 * math.pi) + log_det)
    found = []
    for piece in _whitened(test, whiten):
        exponents = weights.log() - 0.5 * torch.cdist(piece, whiten(centres)).square()
        found.append(constant - exponents.logsumexp(1))
    return torch.cat(found).cpu()


def fit_mixture(train: Features, components: int, seed: int, device) -> tuple[Tensor, Tensor, Callable, float]:
    """(centres (M, D), weights (M,), what makes their common covariance round, its log determinant), in float64."""
    _, classes, whiten = _round_classes(train, device)
    values = train.values.to(device).double()
    generator = torch.Generator().manual_seed(seed)
    centres, nearest = [], torch.zeros(len(values), dtype=torch.long, device=values.device)
    for number in range(int(classes.max()) + 1):
        rows = (classes == number).nonzero()[:, 0]
        of_class = k_means(whiten(values[rows]), components, generator)
        nearest[rows] = of_class + sum(map(len, centres))
        count = int(of_class.max()) + 1
        centres.append(torch.stack([values[rows[of_class == c]].mean(0) for c in range(count)]))
    centres = torch.cat(centres)
    weights = torch.bincount(nearest, minlength=len(centres)).double() / len(values)
    whiten, log_det = _rounding(values - centres[nearest])
    return centres, weights, whiten, log_det


def k_means(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(N,) numbers 0..M-1 without gaps, M <= count. Starts are drawn as in k-means++ (Arthur & Vassilvitskii, 2007)."""
    first = torch.randint(len(values), (1,), generator=generator).item()
    centres = values[first : first + 1]
    while len(centres) < count:
        far = torch.cdist(values, centres).square().min(1).values
        if not far.sum() > 0:
            break  # no more different samples
        centres = torch.cat([centres, values[torch.multinomial(far.cpu(), 1, generator=generator).to(far.device)]])
    nearest = torch.cdist(values, centres).argmin(1)
    for _ in range(ROUNDS):
        centres = torch.stack([values[nearest == c].mean(0) if (nearest == c).any() else centres[c]
                               for c in range(len(centres))])  # fmt: skip
        moved = torch.cdist(values, centres).argmin(1)
        if torch.equal(moved, nearest):
            break
        nearest = moved
    return nearest.unique(return_inverse=True)[1]


SCORES = {"mahalanobis": mahalanobis_to_classes, "knn": distance_to_neighbour, "mixture": minus_log_density}


def _round_classes(train: Features, device) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """(class means (C, D), classes (N,) in 0..C-1, what makes the covariance around the means round), in float64."""
    values, classes = train.values.to(device).double(), train.labels.unique(return_inverse=True)[1].to(device)
    count = int(classes.max()) + 1
    sums = torch.zeros(count, values.shape[1], dtype=torch.float64, device=values.device)
    means = sums.index_add_(0, classes, values) / torch.bincount(classes, minlength=count)[:, None]
    return means, classes, _rounding(values - means[classes])[0]


def _rounding(residuals: Tensor) -> tuple[Callable[[Tensor], Tensor], float]:
    """A linear map under which residuals (N, D) have the identity as their (shrunk) covariance, and the log determinant
    of that covariance. Features that never vary get a little."""
    _, covariance, _ = fit_gaussian(residuals)
    covariance.diagonal().add_(1e-9 * covariance.diagonal().mean().clamp(min=1e-12))
    factor = torch.linalg.cholesky(covariance)
    log_det = 2 * factor.diagonal().log().sum().item()

    def whiten(values: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(factor, values.to(factor.device).double().T, upper=False).T

    return whiten, log_det


def _whitened(features: Features, whiten: Callable[[Tensor], Tensor]):
    for piece in features.values.split(PIECE):
        yield whiten(piece)


def _numbers(scores: Tensor, other: Tensor, seed: int) -> dict[str, Percent]:
    """Of others (N,) bool among what was scored."""
    statistics = {"auroc": lambda weights: auc(scores, other, weights), "fpr95": lambda w: fpr_at_95(scores, other, w)}
    return {name: bootstrapped(statistic, len(scores), seed) for name, statistic in statistics.items()}


def fpr_at_95(scores: Tensor, other: Tensor, weights: Tensor | None = None) -> Tensor:
    """(B,) the share of others below the least score under which 95 % of the known lie, NaN where a row has no
    known or no others. weights: (B, N)."""
    ordered, order = scores.sort()
    weights = torch.ones(1, len(scores), dtype=torch.float64) if weights is None else weights
    weights, is_other = weights[:, order], other[order].double()
    known = (weights * (1 - is_other)).cumsum(1)
    passed = (weights * is_other).cumsum(1)
    last = torch.cat([ordered[1:] != ordered[:-1], torch.ones(1, dtype=torch.bool)])  # equal scores pass together
    known, passed = known[:, last], passed[:, last]
    enough = known >= PASS * known[:, -1:] - 1e-9
    place = enough.int().argmax(1, keepdim=True)
    share = (passed.gather(1, place) / passed[:, -1:])[:, 0]
    return share.where(known[:, -1] > 0, torch.nan)


def _refuse(train: Features, test: Features, known: Features, other: Tensor, unknown: Sequence[int]) -> None:
    nowhere = sorted(set(unknown) - {*train.labels.tolist(), *test.labels.tolist()})
    if nowhere:
        raise UserError(f"--unknown {first_few(nowhere)} is no class of train or test; correct it, or leave it out.")
    if not len(known):
        raise UserError(f"--unknown {' '.join(map(str, unknown))} leaves no class to know; name fewer.")
    if other.all():
        raise UserError(
            "The test shards hold no image of a class that train has; write others, with known classes too."
        )
    if not other.any():
        raise UserError(
            "The test shards hold known classes only; write --others SHARDS of another data set, or --unknown with "
            "classes that train is to go without."
        )


def _refuse_single_images(known: Features) -> None:
    if len(known.labels.unique()) == len(known):
        raise UserError(
            "Every class of train has one image only, so there is no spread within classes to measure distances by; "
            "write more train shards."
        )


def _strangers(labels: Tensor, other: Tensor, unknown: Sequence[int]) -> list[str]:
    """A warning where test has others that nobody has named as such."""
    unnamed = other & (labels != OTHER) & ~torch.isin(labels, torch.tensor(list(unknown), dtype=torch.long))
    if not unnamed.any():
        return []
    return [
        f"{int(unnamed.sum())} test images are of classes that train lacks "
        f"({first_few(labels[unnamed].unique().tolist())}), and count as others."
    ]


def _neighbour(k: int | None, count: int) -> tuple[dict, list[str]]:
    """Which one is meant, and a warning where the default is not there."""
    if k is not None and k > count:
        raise UserError(f"--k {k} is more than the {count} known train images; write {count} or less.")
    if k is None and count < K:
        return {"k": count}, [f"Train has {count} known images, so the last one is meant and not neighbour {K}."]
    return {"k": k or K}, []


def _fewer_centres(known: Features, components: int) -> list[str]:
    sizes = known.labels.unique(return_counts=True)[1]
    few = int((sizes < components).sum())
    if not few:
        return []
    return [f"{few} classes have fewer than {components} train images, and as many Gaussians as images at most."]
