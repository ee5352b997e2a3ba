"""Several findings in one image: a yes-or-no head for each label on frozen features.

- Heads minimise binary cross-entropy + wd / 2 * |W|^2 at its optimum; a label that is unknown for an image counts
  for nothing, in training and in test.
- Weight decay, norm and kind of feature are chosen by 5-fold cross-validation on train, by macro AUC; images of one
  group (a patient) are never on both sides. Then a head is fit on all of train, and test is read once for each kind.
- Macro AUC is the mean over labels that test has both with and without; mAP over those that it has. Rare labels that
  test lacks are named and left out, never counted as 0 or as a half.
- Confidence intervals are bootstrapped over test images, or over groups where they are known.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from prelude.data.errors import UserError
from prelude.evaluators.convex import MAX_PASSES, TOLERANCE, LabelLoss, Norm, Space
from prelude.evaluators.features import Features
from prelude.evaluators.ranking import CONFIDENCE, NUM_DRAWS, auc, average_precision, bootstrap, interval
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

    seed: of the folds and the bootstrap. Raises UserError where test has no label both with and without.
    """
    first, first_test = next(iter(train.values())), next(iter(test.values()))
    labels, wanted = first.labels, first_test.labels
    if not _both(wanted).any():
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
                by_features[kind] = {
                    **best,
                    "test": numbers,
                    "by_label": by_label,
                    "passes": head.passes.item(),
                    "converged": head.converged[0],
                }
    chosen = max(by_features.values(), key=_preference)
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
            "confidence": CONFIDENCE,
            "draws": NUM_DRAWS,
            "seed": seed,
        },
        details={"grid": grid, "by_features": by_features},
        warnings=_warnings(names, labels, wanted, chosen),
    )


def judge(
    scores: Tensor, labels: Tensor, names: Sequence[str], seed: int = 0, groups: Tensor | None = None
) -> tuple[dict[str, Percent], dict[str, dict]]:
    """(macro numbers with intervals, per label) of scores (N, L) for labels (N, L) of 1, 0 and NaN."""

    def by_label(metric, weights: Tensor | None) -> Tensor:
        """(b, L), NaN where it is undefined."""
        columns = []
        for of_label, truth in zip(scores.unbind(1), labels.unbind(1), strict=True):
            known = truth.isfinite()
            taken = None if weights is None else weights[:, known]
            empty = torch.full((1 if weights is None else len(weights),), torch.nan, dtype=torch.float64)
            columns.append(metric(of_label[known], truth[known] > 0, taken) if known.any() else empty)
        return torch.stack(columns, 1)

    def of_draws(weights: Tensor) -> Tensor:
        """(b, 2) macro metrics of a bootstrap draw, over the labels that are defined in it."""
        return torch.stack([by_label(metric, weights).nanmean(1) for metric in METRICS.values()], 1)

    single = {name: by_label(metric, None)[0] for name, metric in METRICS.items()}
    draws = 100 * bootstrap(of_draws, len(labels), seed, groups)
    numbers = {}
    for column, name in enumerate(METRICS):
        found = draws[:, column]
        value = 100 * single[name][_both(labels) if name == "auc" else (labels == 1).any(0)].mean().item()
        numbers[name] = Percent(value, found[found.isfinite()].std().item(), interval=interval(found))
    counts = {"num_present": (labels == 1).sum(0), "num_absent": (labels == 0).sum(0)}
    details = {}
    for i, label in enumerate(names):
        values = {name: 100 * single[name][i].item() for name in METRICS if single[name][i].isfinite()}
        details[label] = {**values, **{key: int(count[i]) for key, count in counts.items()}}
    return numbers, details


def group_folds(num_samples: int, groups: Tensor | None, seed: int) -> Tensor:
    """(N,) the fold in which each sample is held out; a group is in one fold."""
    groups = torch.arange(num_samples) if groups is None else groups.unique(return_inverse=True)[1]
    turn = torch.randperm(int(groups.max()) + 1, generator=torch.Generator().manual_seed(seed)) % FOLDS
    return turn[groups]


def _cross_validated(
    space: Space, loss: LabelLoss, labels: Tensor, folds: Tensor, kind: str, norm: Norm, decays: Sequence[float]
) -> list[dict]:
    """A row of the grid for each weight decay, from scores of images that the heads have not seen."""
    scores = torch.zeros(len(decays), *labels.shape)  # (H, N, L)
    converged = torch.ones(len(decays), dtype=torch.bool)
    for fold in folds.unique().tolist():
        held = (folds == fold).nonzero()[:, 0]
        heads = space.fit(loss, decays, (folds != fold).nonzero()[:, 0])
        converged &= torch.tensor(heads.converged)
        for places, logits in heads.logits_of(space.values, held.to(space.values.device)):
            scores[:, held[places]] = logits.cpu()
    rows = []
    for h, decay in enumerate(decays):
        found = [
            auc(scores[h, labels[:, i].isfinite(), i], labels[labels[:, i].isfinite(), i] > 0)[0].item()
            for i in _both(labels).nonzero()[:, 0].tolist()
        ]
        macro = 100 * sum(found) / len(found) if found else 0.0
        held_out_loss = loss_of(scores[h], labels)
        rows.append(
            {
                "features": kind,
                "norm": norm,
                "weight_decay": decay,
                "held_out_auc": macro,
                "held_out_loss": held_out_loss,
                "converged": bool(converged[h]),
            }
        )
    return rows


def loss_of(scores: Tensor, labels: Tensor) -> float:
    """Mean binary cross-entropy of scores (N, L), summed over labels."""
    return LabelLoss(labels)(scores[:, None], slice(None))[1].item()


def _both(labels: Tensor) -> Tensor:
    """(L,) whether a label is there in some samples and not in others."""
    return (labels == 1).any(0) & (labels == 0).any(0)


def _preference(row: dict) -> tuple[float, float]:
    return row["held_out_auc"], -row["held_out_loss"]


def _warnings(names: Sequence[str], labels: Tensor, wanted: Tensor, chosen: dict) -> list[str]:
    warnings = []
    for found, where, what in (
        (_both(wanted), "test", "left out of macro AUC"),
        (_both(labels), "train", "learned nothing from"),
    ):
        lacking = [name for name, there in zip(names, found.tolist(), strict=True) if not there]
        if lacking:
            warnings.append(f"Always or never present in {where}, so {what}: {', '.join(lacking)}.")
    if not chosen["converged"]:
        warnings.append(f"The heads were stopped after {MAX_PASSES} passes, before their optimum.")
    return warnings
