"""Linear support vector machines on frozen features: one against the rest for each class or finding.

- Razavian et al., "CNN Features off-the-shelf", 2014, and the protocol of VOC07 in Barlow Twins: features brought to
  length 1, squared hinge loss, 1/2 |w|^2 + C * sum(max(0, 1 - y f)^2), as liblinear has it; the bias is free.
- Features of several crops of an image are averaged before (`crops` of the judging).
- C is chosen among powers of ten on a tenth of train, by accuracy of classes or mAP of findings, and so is the kind of
  feature; then the machines are fit on all of train, and test is read once for each kind. The tenth is one of each
  class; of findings, of the images with any and of those without. Known groups (a patient) are held out whole.
- The problem is convex and trained to its optimum by `evaluators.frozen.convex`; nothing else is random.
- mAP is the mean over classes of the area under the plain precision-recall curve, not VOC's 11 points.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from prelude.data.errors import UserError
from prelude.evaluators.features.extraction import Features
from prelude.evaluators.frozen.convex import MAX_PASSES, Heads, LabelLoss, Space
from prelude.evaluators.frozen.multilabel import both_there, is_frequent, of_each_label
from prelude.evaluators.frozen.ranking import MIN_POSITIVES, average_precision, bootstrapped, group_warnings
from prelude.evaluators.frozen.splits import (
    HELD_OUT,
    contiguous_labels,
    edge_warnings,
    hold_out,
    hold_out_groups,
    lacking_warnings,
    share_warnings,
)
from prelude.evaluators.results import Outcome, Percent, hits, percent

CS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)


class HingeLoss(LabelLoss):
    """Squared hinge of N samples with labels (N, L) of 1, 0 and NaN, each label a problem of its own: 1 / N of the sum
    over samples where it is known, so that C weighs each of them alike however many there are."""

    def curvature(self) -> Tensor:
        """(L,)"""
        return torch.full_like(self.num_known, 2.0, dtype=torch.float32)

    def take(self, rows: Tensor) -> "HingeLoss":
        return HingeLoss(self.labels[rows])

    def __call__(self, logits: Tensor, places: slice, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        labels = self.labels[places][:, which, None]  # (n, p, 1)
        share = labels.isfinite() / len(self)
        side = 2 * labels.nan_to_num(0.0) - 1
        short = (1 - side * logits).clamp(min=0)  # by how much a sample is on the wrong side of its margin
        return -2 * side * short * share, (short.square() * share).sum((0, 2)), (2 * (short > 0) * share).sum(0)


def svm(
    train: dict[str, Features],
    test: dict[str, Features],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    cs: Sequence[float] = CS,
) -> Outcome:
    """Accuracy and mAP by kind of feature; of findings mAP alone.

    seed: of the held-out part and of the bootstrap behind mAP's error. Raises UserError for a C that is not above 0,
    where train is one group, and where no finding of test is frequent enough.
    """
    if min(cs) <= 0:
        raise UserError(f"--c {' '.join(f'{c:g}' for c in cs)} must be above 0; write powers of ten, such as 0.1 1 10.")
    labels, test_labels, classes = _labels(train, test)
    groups, test_groups = (next(iter(part.values())).groups for part in (train, test))
    fit, held = _held_out(labels, classes, groups, seed)
    loss, found, grid = HingeLoss(labels.to(device)), {}, []
    for kind in train:
        space = Space.of(F.normalize(train[kind].values, dim=1), "none", device)
        rows = []
        for c, head in _each(space, loss, cs, fit):
            scores = _scores(head, space.values, held)
            score = _quality(scores, labels[held], classes)
            rows.append({"features": kind, "c": c, "held_out": score, "converged": head.converged[0]})
        best = max(rows, key=lambda row: row["held_out"])
        ((_, head),) = _each(space, loss, (best["c"],), None)
        scores = _scores(head, F.normalize(test[kind].values, dim=1), None)
        numbers = _numbers(scores, test_labels, classes, seed, test_groups)
        found[kind] = {**best, "converged": head.converged[0], "numbers": numbers}
        grid += rows
    chosen = max(found, key=lambda kind: found[kind]["held_out"])
    strange = lacking_warnings(train, test) if classes else []
    told = [] if found[chosen]["converged"] else [f"It was stopped after {MAX_PASSES} passes, before its optimum."]
    told += [] if groups is None else share_warnings(len(held), len(labels), HELD_OUT)
    if classes or both_there(labels[held]).any():
        told += _edge(found[chosen], grid, cs)
    else:
        told += [_NO_CHOICE] if len(grid) > 1 else []
    return Outcome(
        evaluator="svm",
        numbers=found[chosen]["numbers"],
        chosen={"features": chosen, "c": found[chosen]["c"]},
        recipe={
            "cs": list(cs),
            "features": list(train),
            "held_out": HELD_OUT,
            "grouped": groups is not None,
            "length": 1,
            "seed": seed,
        },
        details={"grid": grid},
        by_kind={kind: one["numbers"] for kind, one in found.items()},
        warnings=strange + group_warnings(test_groups) + told,
    )


_NO_CHOICE = (
    "No finding is present in some held-out train images and absent in others, so C and the kind of feature are the "
    "first of those asked for, and not chosen by mAP."
)


def _held_out(labels: Tensor, classes: int, groups: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
    if groups is not None:
        return hold_out_groups(groups, seed, HELD_OUT)
    return hold_out(labels.argmax(1) if classes else (labels == 1).any(1).long(), seed)


def _edge(chosen: dict, grid: Sequence[dict], cs: Sequence[float]) -> list[str]:
    """Where several do as well, none of them was found at an edge."""
    alike = [row for row in grid if (row["features"], row["held_out"]) == (chosen["features"], chosen["held_out"])]
    return edge_warnings("C", chosen["c"], cs) if len(alike) == 1 else []


def _labels(train: dict[str, Features], test: dict[str, Features]) -> tuple[Tensor, Tensor, int]:
    """(N, L) of 1, 0 and NaN of train and of test, and the number of classes, 0 where labels are findings."""
    own = next(iter(train.values())).labels
    if own.ndim == 2:
        return own, next(iter(test.values())).labels, 0
    numbers, test_numbers, count = contiguous_labels(train, test)
    both = (torch.arange(count) == part[:, None] for part in (numbers, test_numbers))  # a class of its own: no label
    return *(part.float() for part in both), count


def _each(space: Space, loss: HingeLoss, cs: Sequence[float], rows: Tensor | None):
    """(C, its machines) in liblinear's terms: the space divides features by one number, and takes a mean."""
    count, unit = len(loss) if rows is None else len(rows), space.scale.max().item()  # 1 / that number
    decays = [unit**2 / (c * count) for c in cs]
    heads = space.fit(loss, decays, rows)
    return [(c, heads.only(h)) for h, c in enumerate(cs)]


def _scores(head: Heads, values: Tensor, rows: Tensor | None) -> Tensor:
    """(n, L) on the CPU."""
    return torch.cat([logits[0].cpu() for _, logits in head.logits_of(values, rows)])


def _average_precisions(scores: Tensor, labels: Tensor, which: Sequence[int], weights: Tensor | None) -> Tensor:
    """(B, len(which))"""
    return of_each_label(average_precision, scores[:, which], labels[:, which], weights)


def _quality(scores: Tensor, labels: Tensor, classes: int) -> float:
    if classes:
        return percent(hits(scores, labels.argmax(1))["top1"], len(labels)).value
    which = both_there(labels).nonzero()[:, 0].tolist()
    return 100 * _average_precisions(scores, labels, which, None).mean().item() if which else 0.0


def _numbers(scores: Tensor, labels: Tensor, classes: int, seed: int, groups: Tensor | None) -> dict[str, Percent]:
    numbers = {}
    if classes:
        known = torch.where(labels.any(1), labels.argmax(1), -1)
        numbers = {name: percent(count, len(labels)) for name, count in hits(scores, known).items()}
    which = is_frequent(labels, groups).nonzero()[:, 0].tolist()
    if which:
        mean = lambda weights: _average_precisions(scores, labels, which, weights).mean(1)  # noqa: E731
        numbers["map"] = bootstrapped(mean, len(labels), seed, groups)
    if not numbers:
        or_groups = "" if groups is None else ", or groups of them,"
        raise UserError(
            f"No finding has {MIN_POSITIVES} test images{or_groups} with it and as many without, so there is no mAP; "
            "write more test shards."
        )
    return numbers
