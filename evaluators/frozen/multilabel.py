"""Several findings in one image: a yes-or-no head for each label on frozen features.

- Heads minimise binary cross-entropy + wd / 2 * |W|^2 at its optimum; a label that is unknown for an image counts
  for nothing, in training and in test.
- Weight decay, norm and kind of feature are chosen by 5-fold cross-validation on train, by macro AUC within each fold;
  images of one group (a patient) are never on both sides. Then a head is fit on all of train, and test is read once for
  each kind.
- Macro AUC and mAP are means over the labels that test has often enough (`MIN_POSITIVES` images with and without, or
  groups of them). Rarer ones are named and left out, never counted as 0 or as a half.
- Confidence intervals are bootstrapped over test images, or over groups where they are known, for the same labels. Test
  images of one group have none.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prelude.data.errors import UserError
from prelude.evaluators.features.extraction import Features
from prelude.evaluators.frozen.convex import MAX_PASSES, TOLERANCE, Heads, LabelLoss, Norm, Space
from prelude.evaluators.frozen.ranking import (
    CONFIDENCE,
    MIN_POSITIVES,
    NUM_DRAWS,
    auc,
    auc_within,
    average_precision,
    bootstrap,
    group_warnings,
    interval,
    is_one_group,
    standard_error,
)
from prelude.evaluators.frozen.splits import edge_warnings
from prelude.evaluators.results import Outcome, Percent

WEIGHT_DECAYS = tuple(float(f"{10 ** (-4 + i / 2):.3g}") for i in range(12))  # 1e-4 .. 31.6
FOLDS = 5
METRICS = {"auc": auc, "map": average_precision}


def multilabel(
    train: dict[str, Features],
    test: dict[str, Features],
    *,
    names: Sequence[str],
    seed: int = 0,
    device: torch.device | str = "cpu",
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    norms: Sequence[Norm] = ("batch",),
) -> Outcome:
    """Macro AUC and mAP on test. Features' labels are (N, L) of 1, 0 and NaN, one column for each of `names`.

    seed: of the folds and the bootstrap. Raises UserError where test has no label both with and without, and where
    train is one group.
    """
    first, first_test = next(iter(train.values())), next(iter(test.values()))
    labels, wanted = first.labels, first_test.labels
    if not both_there(wanted).any():
        raise UserError("The test shards have no label that is present in some images and absent in others.")
    loss, folds = LabelLoss(labels.to(device)), group_folds(len(first), first.groups, seed)
    grid, by_features = [], {}
    for kind in train:
        for norm in norms:
            space = Space.of(train[kind].values, norm, device)
            found = _cross_validated(space, loss, labels, folds, kind, norm, weight_decays)
            best = max(found, key=_preference)
            grid += found
            if kind not in by_features or _preference(best) > _preference(by_features[kind]):
                head = space.fit(loss, (best["weight_decay"],))
                scores = torch.cat([logits[0].cpu() for _, logits in head.logits_of(test[kind].values)])  # (N, L)
                numbers, by_label = judge(scores, wanted, names, seed, first_test.groups)
                for label, found in zip(names, _of_train(head, labels), strict=True):
                    by_label[label] |= found
                by_features[kind] = {
                    **best,
                    "test": numbers,
                    "by_label": by_label,
                    "passes": head.passes.max().item(),
                    "converged": head.converged[0],
                }
    chosen = max(by_features.values(), key=_preference)
    told = edge_warnings("weight decay", chosen["weight_decay"], weight_decays)
    if not any(row["num_labels"] for row in grid):
        told = [_NO_CHOICE] if len(grid) > 1 else []
    return Outcome(
        evaluator="multilabel",
        numbers=chosen["test"],
        chosen={key: chosen[key] for key in ("features", "norm", "weight_decay")},
        recipe={
            "names": list(names),
            "weight_decays": list(weight_decays),
            "norms": list(norms),
            "features": list(train),
            "folds": FOLDS,
            "grouped": first.groups is not None,
            "tolerance": TOLERANCE,
            "min_positives": MIN_POSITIVES,
            "confidence": CONFIDENCE,
            "draws": NUM_DRAWS,
            "seed": seed,
        },
        details={"grid": grid, "by_features": by_features},
        warnings=label_warnings(names, labels, chosen["by_label"]) + group_warnings(first_test.groups) + told,
        by_kind={kind: found["test"] for kind, found in by_features.items()},
    )


_NO_CHOICE = (
    "No label is present in some held-out train images and absent in others of the same fold, so weight decay, norm "
    "and kind of feature are not chosen by macro AUC."
)


def judge(
    scores: Tensor, labels: Tensor, names: Sequence[str], seed: int = 0, groups: Tensor | None = None
) -> tuple[dict[str, Percent], dict[str, dict]]:
    """(macro numbers with intervals, per label) of scores (N, L) for labels (N, L) of 1, 0 and NaN.

    The macro numbers are over the labels that are `counted`: those with `MIN_POSITIVES` images (or groups of them) with
    and without; where there is none, all that are there both with and without.
    """
    counted = is_counted(labels, groups)

    def of_draws(weights: Tensor) -> Tensor:
        """(b, 2) macro metrics of a bootstrap draw, NaN where it lacks one of the labels."""
        of_each = [of_each_label(metric, scores, labels, weights) for metric in METRICS.values()]
        return torch.stack([values[:, counted].mean(1) for values in of_each], 1)

    single = {name: of_each_label(metric, scores, labels)[0] for name, metric in METRICS.items()}
    draws = 100 * bootstrap(of_draws, len(labels), seed, groups)
    draws[~draws.isfinite().all(1)] = torch.nan  # both numbers are of the same draws
    numbers = {}
    for column, name in enumerate(METRICS):
        found = draws[:, column]
        value = 100 * single[name][counted].mean().item()
        numbers[name] = Percent(value, standard_error(found), interval=interval(found))
    counts = {"num_present": (labels == 1).sum(0), "num_absent": (labels == 0).sum(0)}
    details, frequent = {}, is_frequent(labels, groups)
    for i, label in enumerate(names):
        values = {name: 100 * single[name][i].item() for name in METRICS if single[name][i].isfinite()}
        details[label] = {
            **values,
            **{key: int(count[i]) for key, count in counts.items()},
            "counted": bool(counted[i]),
            "frequent": bool(frequent[i]),
        }
    return numbers, details


def macro(scores: Tensor, labels: Tensor, groups: Tensor | None = None) -> dict[str, float]:
    """The macro numbers alone, in percent."""
    counted = is_counted(labels, groups)
    of_each = {name: of_each_label(metric, scores, labels)[0] for name, metric in METRICS.items()}
    return {name: 100 * values[counted].mean().item() for name, values in of_each.items()}


def of_each_label(metric: Callable, scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """(b, L) of one row a set of weights, NaN where it is undefined."""
    columns = []
    for of_label, truth in zip(scores.unbind(1), labels.unbind(1), strict=True):
        known = truth.isfinite()
        taken = None if weights is None else weights[:, known]
        empty = torch.full((1 if weights is None else len(weights),), torch.nan, dtype=torch.float64)
        columns.append(metric(of_label[known], truth[known] > 0, taken) if known.any() else empty)
    return torch.stack(columns, 1)


def group_folds(num_samples: int, groups: Tensor | None, seed: int) -> Tensor:
    """(N,) the fold in which each sample is held out; a group is in one fold. Raises UserError for a single group."""
    if is_one_group(groups):
        raise UserError(
            "The train shards hold one group only, so nothing can be held out to choose by; write shards of several "
            "groups, or leave --group (evaluate.label_group) out."
        )
    groups = torch.arange(num_samples) if groups is None else groups.unique(return_inverse=True)[1]
    turn = torch.randperm(int(groups.max()) + 1, generator=torch.Generator().manual_seed(seed)) % FOLDS
    return turn[groups]


def _cross_validated(
    space: Space, loss: LabelLoss, labels: Tensor, folds: Tensor, kind: str, norm: Norm, decays: Sequence[float]
) -> list[dict]:
    """A row of the grid for each weight decay, from scores of images that the heads have not seen."""
    scores = torch.zeros(len(decays), *labels.shape)  # (H, N, L)
    converged = torch.ones(len(decays), dtype=torch.bool)
    judged = labels.isfinite()  # (N, L) by a head that had something to learn
    for fold in folds.unique().tolist():
        held = (folds == fold).nonzero()[:, 0]
        heads = space.fit(loss, decays, (folds != fold).nonzero()[:, 0])
        converged &= torch.tensor(heads.converged)
        judged[held] &= both_there(labels[folds != fold])
        for places, logits in heads.logits_of(space.values, held.to(space.values.device)):
            scores[:, held[places]] = logits.cpu()
    rows = []
    for h, decay in enumerate(decays):
        each = [
            auc_within(of_label[rows], truth[rows] > 0, folds[rows])
            for of_label, truth, rows in zip(scores[h].unbind(1), labels.unbind(1), judged.unbind(1), strict=True)
        ]
        found = [value for value in each if math.isfinite(value)]
        macro = 100 * sum(found) / len(found) if found else 0.0
        held_out_loss = loss_of(scores[h], labels)
        rows.append(
            {
                "features": kind,
                "norm": norm,
                "weight_decay": decay,
                "held_out_auc": macro,
                "num_labels": len(found),  # that it is the mean of
                "held_out_loss": held_out_loss,
                "converged": bool(converged[h]),
            }
        )
    return rows


def loss_of(scores: Tensor, labels: Tensor) -> float:
    """Mean binary cross-entropy of scores (N, L), summed over labels."""
    known = labels.isfinite()
    each = torch.nn.functional.softplus(scores) - labels.nan_to_num(0.0) * scores
    return (each * known / known.sum(0).clamp(min=1)).sum().item()


def both_there(labels: Tensor) -> Tensor:
    """(L,) whether a label is there in some samples and not in others."""
    return (labels == 1).any(0) & (labels == 0).any(0)


def is_frequent(labels: Tensor, groups: Tensor | None) -> Tensor:
    """(L,) whether `MIN_POSITIVES` samples, or groups of them, have a label, and as many lack it."""
    if groups is None:
        return torch.minimum((labels == 1).sum(0), (labels == 0).sum(0)) >= MIN_POSITIVES
    return torch.tensor(
        [
            all(len(groups[of_label == value].unique()) >= MIN_POSITIVES for value in (1, 0))
            for of_label in labels.unbind(1)
        ]
    )


def is_counted(labels: Tensor, groups: Tensor | None) -> Tensor:
    """(L,) whether a label is part of the macro numbers."""
    frequent = is_frequent(labels, groups)
    return frequent if frequent.any() else both_there(labels)


def _of_train(head: Heads, labels: Tensor) -> list[dict]:
    """What there was to learn from of each label, and whether its head came to its optimum."""
    return [
        {
            "num_present_train": int((labels[:, i] == 1).sum()),
            "passes": head.passes[0, i].item(),
            "converged": head.gaps[0, i].item() < TOLERANCE,
        }
        for i in range(labels.shape[1])
    ]


def _preference(row: dict) -> tuple[float, float]:
    return row["held_out_auc"], -row["held_out_loss"]


def label_warnings(names: Sequence[str], labels: Tensor, of_label: dict[str, dict]) -> list[str]:
    """What a reader should know of the macro numbers. labels: (N, L) of train. of_label: as `judge` finds it."""
    warnings = []
    never = [name for name in names if not (of_label[name]["num_present"] and of_label[name]["num_absent"])]
    if never:
        warnings.append(f"Always or never present in test, so left out of macro AUC: {', '.join(never)}.")
    rare = [name for name in names if name not in never and not of_label[name]["counted"]]
    few = f"in fewer than {MIN_POSITIVES} images of test, or groups of them"
    if rare:
        shown = ", ".join(f"{name} ({of_label[name]['num_present']} present)" for name in rare)
        warnings.append(f"Present or absent {few}, so left out of macro AUC and mAP: {shown}.")
    if not any(of_label[name]["frequent"] for name in names):
        warnings.append(f"Every label is present or absent {few}, so macro AUC and mAP say little.")
    lacking = [name for name, there in zip(names, both_there(labels).tolist(), strict=True) if not there]
    if lacking:
        warnings.append(f"Always or never present in train, so learned nothing from: {', '.join(lacking)}.")
    early = [name for name in names if not of_label[name].get("converged", True)]
    if early:
        warnings.append(f"Heads were stopped after {MAX_PASSES} passes, before their optimum: {', '.join(early)}.")
    return warnings
