"""Nearest class mean: no training at all.

Features are brought to length 1, a class is the mean of its training images (not brought to length 1 again), and an
image belongs to the class whose mean is nearest. The baseline of class-incremental learning with frozen encoders
(Janson et al., "A Simple Baseline that Questions the Use of Pretrained-Models in Continual Learning", 2022).

- Class-incremental: the classes come in tasks, in an order of the seed's; after each one, test images of all classes
  that have come are told among these. A class' mean needs no other class, so that there is nothing to forget.
  The average incremental accuracy is the mean over the tasks.
- Between several kinds of feature the choice is made on a tenth of the train set, never on the test set.
- Sums are taken in float64 and in pieces; nothing of the features' size is held.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.evaluators.features.extraction import Features
from prelude.evaluators.frozen.ranking import bootstrapped
from prelude.evaluators.frozen.splits import HELD_OUT, contiguous_labels, hold_out, lacking_warnings
from prelude.evaluators.results import Outcome, Percent, among_first, hits, percent

PIECE = 4096  # samples


def ncm(
    train: dict[str, Features],
    test: dict[str, Features],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    num_tasks: int = 1,
) -> Outcome:
    """Test accuracy for each kind of feature, headed by the kind that a held-out part of train prefers.

    seed: of the held-out part, and of the order of classes where they come in several tasks. Raises UserError for more
    tasks than classes.
    """
    labels, test_labels, num_classes = contiguous_labels(train, test)
    if num_tasks > num_classes:
        raise UserError(
            f"--tasks {num_tasks} are more than the {counted(num_classes, 'class')}; write {num_classes} or less."
        )
    held_out_top1, by_features, curves = {}, {}, {}
    for kind in train:
        values = train[kind].values
        if len(train) > 1:
            fit, held = hold_out(labels, seed)
            means = class_means(values, labels, num_classes, fit, device)
            held_out_top1[kind] = accuracy(means, values, labels, held)["top1"].value
        means = class_means(values, labels, num_classes, device=device)
        by_features[kind] = accuracy(means, test[kind].values, test_labels)
        if num_tasks > 1:
            curves[kind], number = incremental(means, test[kind].values, test_labels, num_tasks, seed)
            by_features[kind]["incremental"] = number
    chosen = max(held_out_top1, key=held_out_top1.get) if held_out_top1 else next(iter(train))
    best = class_means(train[chosen].values, labels, num_classes, device=device)
    return Outcome(
        evaluator="ncm",
        numbers=by_features[chosen],
        chosen={"features": chosen},
        recipe={"features": list(train), "held_out": HELD_OUT, "num_tasks": num_tasks, "seed": seed},
        details={"held_out_top1": held_out_top1, "by_features": by_features, "after_each_task": curves},
        by_kind=by_features,
        warnings=lacking_warnings(train, test),
        right=[right(best, test[chosen].values, test_labels)],
    )


def class_means(
    values: Tensor,
    labels: Tensor,
    num_classes: int,
    rows: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """(C, D) float64 from `rows` (default: all) of values (N, D) with labels (N,) in 0..C-1.

    A class without a sample among them is at infinity.
    """
    rows = torch.arange(len(labels)) if rows is None else rows
    sums = torch.zeros(num_classes, values.shape[1], dtype=torch.float64, device=device)
    for piece in rows.split(PIECE):
        sums.index_add_(0, labels[piece].to(device), F.normalize(values[piece].to(device).double(), dim=1))
    counts = torch.bincount(labels[rows], minlength=num_classes).to(device)[:, None]
    return torch.where(counts > 0, sums / counts.clamp(min=1), torch.inf)


def incremental(means: Tensor, values: Tensor, labels: Tensor, num_tasks: int, seed: int) -> tuple[list[dict], Percent]:
    """After each task its classes, and the accuracy on test images of all that have come; and the mean over the tasks.

    Images of classes that train lacks are left out. Raises UserError for a first task without a test image.
    """
    order = torch.randperm(len(means), generator=torch.Generator().manual_seed(seed))
    found, right, asked = [], [], []
    for task in torch.tensor_split(order, num_tasks):
        so_far = torch.cat([*(torch.tensor(one["classes"]) for one in found), task])
        of_these = torch.full_like(means, torch.inf)
        of_these[so_far] = means[so_far]
        asked.append(torch.isin(labels, so_far))
        if not asked[-1].any():
            raise UserError(f"Test has no image of the first task's classes {so_far.tolist()}; write fewer --tasks.")
        hit = torch.cat([_distances(of_these, piece).argmin(1).cpu() for piece in values.split(PIECE)]) == labels
        right.append(hit & asked[-1])
        found.append({"classes": task.tolist(), "top1": 100 * (right[-1].sum() / asked[-1].sum()).item()})
    right, asked = (torch.stack(part).double() for part in (right, asked))  # (T, N)
    mean = lambda weights: ((weights @ right.T) / (weights @ asked.T)).mean(1)  # noqa: E731
    return found, bootstrapped(mean, len(labels), seed)


def _distances(means: Tensor, values: Tensor) -> Tensor:
    """(n, C) squared, without the length of the queries, which all classes share."""
    queries = F.normalize(values.to(means.device).double(), dim=1)
    return means.square().sum(1) - 2 * (queries @ means.nan_to_num(posinf=0.0).T)


def right(means: Tensor, values: Tensor, labels: Tensor) -> Tensor:
    """(N,) bool, on the CPU: which samples are nearest to the mean of their class."""
    pieces = zip(values.split(PIECE), labels.to(means.device).split(PIECE), strict=True)
    return torch.cat([among_first(1, -_distances(means, piece), own).cpu() for piece, own in pieces])


def accuracy(means: Tensor, values: Tensor, labels: Tensor, rows: Tensor | None = None) -> dict[str, Percent]:
    """Of `rows` (default: all) of the samples; labels of -1 are missed."""
    rows = torch.arange(len(labels)) if rows is None else rows
    counts: dict[str, int] = {}
    for piece in rows.split(PIECE):
        for name, count in hits(-_distances(means, values[piece]), labels[piece].to(means.device)).items():
            counts[name] = counts.get(name, 0) + count
    return {name: percent(count, len(rows)) for name, count in counts.items()}
