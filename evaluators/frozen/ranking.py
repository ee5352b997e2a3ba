"""How well scores rank: area under the ROC curve and average precision, and what they owe to the sample.

- Area under the curve: the share of (positive, negative) pairs in the right order, ties counting half (Mann-Whitney).
- Scores of different heads have no common scale, so they are never ranked together: of heads of several folds, the area
  is taken within each fold, and averaged.
- Average precision: sum over distinct scores of (recall gained) x precision; no interpolation.
- Bootstrap: samples, or groups of them such as a patient's images, are drawn with replacement. A draw is a weight for
  each sample, so scores are sorted once. A mean over labels or classes is always over the same ones: a draw that has no
  sample of one of them is left out, and `MIN_POSITIVES` keeps such draws rare. Of a single group every draw is the
  whole, which says nothing of another one: there is no error and no interval.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from prelude.evaluators.results import Percent

NUM_DRAWS = 1000
ELEMENTS = 2**22  # weights held at once
CONFIDENCE = 0.95
FEW_GROUPS = 10  # with fewer, what is called 95 % covers less than 90: 84 with five, 71 with three
MIN_POSITIVES = 5  # in test, and as many negatives; a draw lacks all of five in 1 of 150 cases
FEWEST_DRAWS = 100  # that an error or an interval is taken from


def auc(scores: Tensor, positive: Tensor, weights: Tensor | None = None) -> Tensor:
    """scores, positive: (N,); weights: (B, N), by default one row of ones. Returns (B,) float64 in 0..1, NaN where a
    row has no positive or no negative."""
    above, below = _cumulated(scores, positive, weights)  # (B, G) positives and negatives from the top down
    gained = above.diff(dim=1, prepend=above.new_zeros(len(above), 1))
    of_group = below.diff(dim=1, prepend=below.new_zeros(len(below), 1))
    lower = below[:, -1:] - below
    return (gained * (lower + of_group / 2)).sum(1) / (above[:, -1] * below[:, -1])


def auc_within(scores: Tensor, positive: Tensor, parts: Tensor) -> float:
    """The mean of the areas within each part, over the parts that have both; NaN without any.

    scores, positive: (N,). parts: (N,), such as the number of the fold whose head gave a score.
    """
    found = [auc(scores[parts == part], positive[parts == part]) for part in parts.unique().tolist()]
    return torch.cat(found).nanmean().item() if found else float("nan")


def average_precision(scores: Tensor, positive: Tensor, weights: Tensor | None = None) -> Tensor:
    """The same parameters; NaN where a row has no positive."""
    above, below = _cumulated(scores, positive, weights)
    gained = above.diff(dim=1, prepend=above.new_zeros(len(above), 1))
    precision = above / (above + below).clamp(min=1e-300)
    return (gained * precision).sum(1) / above[:, -1]


def bootstrap(
    statistic: Callable[[Tensor], Tensor], num_samples: int, seed: int, groups: Tensor | None = None
) -> Tensor:
    """What the statistic is on `NUM_DRAWS` draws, NaN where there is a single sample or group, so that they are alike.

    statistic: weights (b, N) to (b, ...). groups: (N,) int64.
    """
    if num_samples < 2 or is_one_group(groups):
        whole = statistic(torch.ones(1, num_samples, dtype=torch.float64))
        return torch.full((NUM_DRAWS, *whole.shape[1:]), torch.nan, dtype=whole.dtype)
    return torch.cat([statistic(weights) for weights in _draws(num_samples, seed, groups)])


def bootstrapped(
    statistic: Callable[[Tensor], Tensor],
    num_samples: int,
    seed: int,
    groups: Tensor | None = None,
    *,
    ends: bool = False,
) -> Percent:
    """What the statistic, weights (b, N) to (b,) in 0..1, is of all samples, with its standard error, and where `ends`
    are asked for its interval."""
    draws = 100 * bootstrap(statistic, num_samples, seed, groups)
    value = 100 * statistic(torch.ones(1, num_samples, dtype=torch.float64)).item()
    return Percent(value, standard_error(draws), interval=interval(draws) if ends else None)


def interval(draws: Tensor) -> tuple[float, float] | None:
    """The percentile interval at 95 %, of draws (B,); those that are no number are left out. None for too few."""
    draws, tail = draws[draws.isfinite()], (1 - CONFIDENCE) / 2
    if len(draws) < FEWEST_DRAWS:
        return None
    low, high = draws.quantile(torch.tensor([tail, 1 - tail], dtype=draws.dtype)).tolist()
    return low, high


def standard_error(draws: Tensor) -> float | None:
    """The deviation of draws (B,), as `interval` takes them."""
    draws = draws[draws.isfinite()]
    return draws.std().item() if len(draws) >= FEWEST_DRAWS else None


def is_one_group(groups: Tensor | None) -> bool:
    """groups: (N,) int64, None where each sample stands for itself."""
    return groups is not None and len(groups.unique()) < 2


def group_warnings(groups: Tensor | None) -> list[str]:
    """A warning where the test images, of groups (N,), say nothing of another group, or little."""
    count = FEW_GROUPS if groups is None else len(groups.unique())
    if count >= FEW_GROUPS:
        return []
    if count > 1:
        return [f"Test images are of {count} groups only, so standard errors and intervals are too small."]
    return [
        "All test images are of one group, so there is no standard error or interval: how much another group would "
        "change is not known."
    ]


def _draws(num_samples: int, seed: int, groups: Tensor | None) -> Iterator[Tensor]:
    groups = torch.arange(num_samples) if groups is None else groups.unique(return_inverse=True)[1]
    num_groups, generator = int(groups.max()) + 1, torch.Generator().manual_seed(seed)
    step = max(ELEMENTS // num_samples, 1)
    for start in range(0, NUM_DRAWS, step):
        count = min(step, NUM_DRAWS - start)
        drawn = torch.randint(num_groups, (count, num_groups), generator=generator)
        times = torch.zeros(count, num_groups, dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        yield times[:, groups]


def _cumulated(scores: Tensor, positive: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, G) weight of the positives, and of the negatives, at or above each of the G distinct scores, from the top."""
    ordered, order = scores.double().sort(descending=True)
    last = torch.cat([ordered[1:] != ordered[:-1], ordered.new_ones(1, dtype=torch.bool)])
    weights = torch.ones(1, len(scores), dtype=torch.float64) if weights is None else weights
    weights, yes = weights[:, order], positive[order].double()
    return (weights * yes).cumsum(1)[:, last], (weights * (1 - yes)).cumsum(1)[:, last]
