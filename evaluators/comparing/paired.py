"""Which encoders are told apart: their difference on the same test images, and over the seeds of pretraining.

- Two encoders are asked about the same images, most of which both find easy or both hard. The standard error of their
  difference is that of a paired test (Student's; for right and wrong it is McNemar's, up to its continuity), and far
  below what their two intervals suggest.
- Where both were pretrained with several seeds, the variance of each mean over its seeds comes on top, as in Welch's
  test, with the degrees of freedom of Welch and Satterthwaite. So does that of the mean difference over draws of few
  labels, or over an evaluator's seeds, which are the same for both.
- Told apart: the 95 % interval leaves out 0. Nothing is corrected for the number of pairs that are looked at.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from prelude.data.counting import listed
from prelude.evaluators.comparing.comparison import Comparison, Entry
from prelude.evaluators.comparing.headline import best, evaluator_name, pretrained
from prelude.evaluators.results import unpacked


@dataclass(frozen=True)
class Pair:
    """By one evaluator's headline, in points: how far the first is ahead of the second."""

    evaluator: str
    first: str
    second: str
    points: float
    low: float  # ends of the 95 % interval
    high: float
    num_images: int
    num_seeds: tuple[int, int]  # of pretraining, of each; the interval knows of them where both are above 1

    @property
    def told_apart(self) -> bool:
        return self.low > 0 or self.high < 0

    @property
    def text(self) -> str:
        return f"{self.points:+.1f} [{self.low:+.1f}, {self.high:+.1f}]".replace("-", "−")


def pairs(comparison: Comparison) -> list[Pair]:
    """Of every two pretrained encoders by every evaluator that says which images were right."""
    entries = pretrained(comparison)
    found = (pair(*two, evaluator) for evaluator in comparison.evaluators for two in combinations(entries, 2))
    return [each for each in found if each]


def pair(first: Entry, second: Entry, evaluator: str) -> Pair | None:
    """None where one has no such result, or they are of other images."""
    both = [entry.results.get(evaluator) or {} for entry in (first, second)]
    if not all(result.get("right") for result in both) or _images(both[0]) != _images(both[1]):
        return None
    ours, theirs = (100 * _right(result) for result in both)  # each (runs, draws, images)
    difference = ours.mean((0, 1)) - theirs.mean((0, 1))
    by_seed = [right.mean((1, 2)) for right in (ours, theirs)]
    by_draw = [right.mean((0, 2)) for right in (ours, theirs)]
    doubts = by_seed if min(map(len, by_seed)) > 1 else []
    if len(by_draw[0]) == len(by_draw[1]) > 1:
        doubts = [*doubts, by_draw[0] - by_draw[1]]
    half = _half_of_interval([difference, *doubts])
    points = float(difference.mean())
    counts = (len(ours), len(theirs))
    return Pair(evaluator, first.name, second.name, points, points - half, points + half, len(difference), counts)


def _half_of_interval(samples: Sequence[np.ndarray]) -> float:
    """Of a sum of means, one over each of the samples, which are independent."""
    from scipy import stats  # here, as it takes a second that no other command needs

    if min(map(len, samples)) < 2:
        return math.inf
    variances = [values.var(ddof=1) / len(values) for values in samples]
    total = sum(variances)
    parts = sum(variance**2 / (len(values) - 1) for variance, values in zip(variances, samples, strict=True))
    return float(stats.t.ppf(0.975, total**2 / parts) * math.sqrt(total)) if total else 0.0


def sentences(comparison: Comparison) -> list[str]:
    """For each evaluator, from whom its leader is told apart, and how sure that is; none without two encoders."""
    found = []
    for evaluator in comparison.evaluators:
        first = best(comparison, evaluator)
        others = [entry for entry in pretrained(comparison) if entry is not first]
        known = [each for entry in others if first and (each := pair(first, entry, evaluator))]
        apart, close = ([each for each in known if each.told_apart is wanted] for wanted in (True, False))
        parts = []
        if apart:
            parts.append(f"is told apart from {_seconds(apart)}")
        if close:
            parts.append(f"is not told apart from {_seconds(close)}")
        if parts:
            found.append(f"By {evaluator_name(evaluator)}, {first.name} {' and '.join(parts)}.")
    return [*found, _about(comparison)] if found else []


def _about(comparison: Comparison) -> str:
    known = pairs(comparison)
    images = f"Points ahead, with the 95 % interval of the difference on the same {known[0].num_images:,} test images"
    seeds = {count for each in known for count in each.num_seeds}
    if min(seeds) > 1:
        return f"{images} and over {_range(seeds)} pretraining seeds of each."
    told = "; of an encoder that was pretrained once another seed may order them otherwise, which these cannot tell."
    return images + told


def unlike_encoders(comparison: Comparison) -> list[str]:
    """A sentence, where what is compared differs in its encoder too."""
    by_encoder: dict[str, list[str]] = {}
    for entry in pretrained(comparison):
        if entry.encoder:
            by_encoder.setdefault(entry.encoder, []).append(entry.name)
    if len(by_encoder) < 2:
        return []
    told = "; ".join(f"{', '.join(names)}: {encoder}" for encoder, names in by_encoder.items())
    return [f"The encoders differ, so that this compares objective and encoder together ({told})."]


def _seconds(found: Sequence[Pair]) -> str:
    return listed([f"{each.second} ({each.text})" for each in found])


def _range(counts: set[int]) -> str:
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def _images(result: dict) -> tuple:
    test = result.get("data", {}).get("test", {})
    return test.get("fingerprint"), test.get("num_samples")


def _right(result: dict) -> np.ndarray:
    """(runs, draws, images) of 0 and 1: which images were right, in each of a run's draws or seeds."""
    count = result["data"]["test"]["num_samples"]
    right = np.stack([unpacked(text, count) for text in result["right"]]).astype(float)
    return right.reshape(result.get("num_runs", 1), -1, count)
