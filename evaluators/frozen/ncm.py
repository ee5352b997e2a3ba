"""Nearest class mean: no training at all.

Features are brought to length 1, a class is the mean of its training images (not brought to length 1 again), and an
image belongs to the class whose mean is nearest. The baseline of class-incremental learning with frozen encoders
(Janson et al., "A Simple Baseline that Questions the Use of Pretrained-Models in Continual Learning", 2022).

- Between several kinds of feature the choice is made on a tenth of the train set, never on the test set.
- Sums are taken in float64 and in pieces; nothing of the features' size is held.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from prelude.evaluators.features.extraction import Features
from prelude.evaluators.frozen.splits import HELD_OUT, contiguous_labels, hold_out
from prelude.evaluators.results import Outcome, Percent, hits, percent

PIECE = 4096  # samples


def ncm(
    train: dict[str, Features],
    test: dict[str, Features],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Outcome:
    """Test accuracy for each kind of feature, headed by the kind that a held-out part of train prefers.

    seed: of the held-out part; without effect where there is one kind.
    """
    labels, test_labels, num_classes = contiguous_labels(train, test)
    held_out_top1, by_features = {}, {}
    for kind in train:
        values = train[kind].values
        if len(train) > 1:
            fit, held = hold_out(labels, seed)
            means = class_means(values, labels, num_classes, fit, device)
            held_out_top1[kind] = accuracy(means, values, labels, held)["top1"].value
        means = class_means(values, labels, num_classes, device=device)
        by_features[kind] = accuracy(means, test[kind].values, test_labels)
    chosen = max(held_out_top1, key=held_out_top1.get) if held_out_top1 else next(iter(train))
    return Outcome(
        evaluator="ncm",
        numbers=by_features[chosen],
        chosen={"features": chosen},
        recipe={"features": list(train), "held_out": HELD_OUT, "seed": seed},
        details={"held_out_top1": held_out_top1, "by_features": by_features},
        by_kind=by_features,
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


def accuracy(means: Tensor, values: Tensor, labels: Tensor, rows: Tensor | None = None) -> dict[str, Percent]:
    """Of `rows` (default: all) of the samples; labels of -1 are missed."""
    rows = torch.arange(len(labels)) if rows is None else rows
    counts: dict[str, int] = {}
    for piece in rows.split(PIECE):
        queries = F.normalize(values[piece].to(means.device).double(), dim=1)
        # |q - m|^2 without |q|^2, which all classes share
        distance = means.square().sum(1) - 2 * (queries @ means.nan_to_num(posinf=0.0).T)
        for name, count in hits(-distance, labels[piece].to(means.device)).items():
            counts[name] = counts.get(name, 0) + count
    return {name: percent(count, len(rows)) for name, count in counts.items()}
