"""Linear classification on frozen features: a grid of heads at once, each trained to its optimum.

A head is multinomial logistic regression on features standardised by the train set (BatchNorm without affine, as in
the MAE paper), or on plain ones, with weight decay. Trained to its optimum and with the decay chosen on held-out
samples, as in Radford et al., "CLIP", 2021, appendix A.3; `evaluators.frozen.convex` says how.

- The grid is weight decay x kind of feature x with or without batch norm. There is no learning rate to choose.
- The choice is made on a tenth of train; the chosen setting is then refit on all of train, and test is read once for
  each kind. The split is the only random choice.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from prelude.data.errors import UserError
from prelude.data.progress import progress_bar
from prelude.evaluators.features.extraction import Features
from prelude.evaluators.frozen.convex import MAX_PASSES, TOLERANCE, ClassLoss, Heads, Norm, Space
from prelude.evaluators.frozen.splits import HELD_OUT, contiguous_labels, edge_warnings, hold_out, lacking_warnings
from prelude.evaluators.results import Outcome, among_first, hits, percent

WEIGHT_DECAYS = tuple(float(f"{10 ** (-7 + i / 2):.3g}") for i in range(16))  # 1e-7 .. 3.16


def linear_probe(
    train: dict[str, Features],
    test: dict[str, Features],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    norms: Sequence[Norm] = ("batch",),
) -> Outcome:
    """Test accuracy of a linear head, its weight decay, kind of feature and norm chosen on a held-out part of train.

    seed: of the held-out part, the only random choice. Raises UserError for a weight decay below 0.
    """
    if min(weight_decays) < 0:
        raise UserError(f"weight_decays={list(weight_decays)} must be 0 or more; write powers of ten, such as 0.01.")
    labels, test_labels, num_classes = contiguous_labels(train, test)
    fit_rows, held_rows = hold_out(labels, seed)
    loss, test_labels = ClassLoss(labels.to(device), num_classes), test_labels.to(device)
    grid, by_features, finals = [], {}, {}
    with progress_bar("fitting linear heads", len(train) * len(norms) * len(weight_decays)) as told:
        for kind, norm in product(train, norms):
            space = Space.of(train[kind].values, norm, device)
            heads = space.fit(loss, weight_decays, fit_rows, told=told)
            found = _held_out(heads, space.values, loss.classes, held_rows, kind, norm, weight_decays)
            best = max(found, key=_preference)
            grid += found
            if kind not in by_features or _preference(best) > _preference(by_features[kind]):
                start = heads.only(found.index(best))
                final = space.fit(loss, (best["weight_decay"],), start=start)
                by_features[kind] = {**best, **_final(final, test[kind].values, test_labels)}
                finals[kind] = final
    chosen = max(by_features.values(), key=_preference)
    kind = chosen["features"]
    return Outcome(
        evaluator="linear_probe",
        numbers=chosen["test"],
        chosen={key: chosen[key] for key in ("features", "norm", "weight_decay")},
        recipe={
            "weight_decays": list(weight_decays),
            "norms": list(norms),
            "features": list(train),
            "held_out": HELD_OUT,
            "refit_on": "all of train",
            "tolerance": TOLERANCE,
            "seed": seed,
        },
        details={"grid": grid, "by_features": by_features},
        by_kind={kind: found["test"] for kind, found in by_features.items()},
        right=[right(finals[kind], test[kind].values, test_labels)],
        warnings=lacking_warnings(train, test) + _warnings(chosen, grid, weight_decays),
    )


def _held_out(
    heads: Heads,
    values: Tensor,
    labels: Tensor,
    rows: Tensor,
    kind: str,
    norm: Norm,
    weight_decays: Sequence[float],
) -> list[dict]:
    """A row of the grid for each head."""
    counts, losses = score(heads, values, labels, rows.to(values.device))
    return [
        {
            "features": kind,
            "norm": norm,
            "weight_decay": decay,
            "held_out_top1": percent(counts[h]["top1"], len(rows)).value,
            "held_out_loss": losses[h],
            "passes": heads.passes[h].item(),
            "converged": heads.converged[h],
        }
        for h, decay in enumerate(weight_decays)
    ]


def _final(head: Heads, values: Tensor, labels: Tensor) -> dict:
    """The refit head on the test set."""
    (counts,), _ = score(head, values, labels)
    numbers = {name: percent(count, len(labels)) for name, count in counts.items()}
    return {"test": numbers, "passes": head.passes.item(), "converged": head.converged[0]}


def score(
    heads: Heads, values: Tensor, labels: Tensor, rows: Tensor | None = None
) -> tuple[list[Counter], list[float]]:
    """Hits and mean cross-entropy of each head on `rows` (default: all) of the samples.

    values: (N, D). labels: (N,), on the heads' device. Samples of unknown classes count as missed and have no loss.
    """
    num_heads = len(heads.biases)
    counts, losses, total = [Counter() for _ in range(num_heads)], torch.zeros(num_heads, dtype=torch.float64), 0
    labels = labels if rows is None else labels[rows.to(labels.device)]
    for places, logits in heads.logits_of(values, rows):  # (H, n, C)
        wanted = labels[places]
        for h in range(num_heads):
            counts[h].update(hits(logits[h], wanted))
        known = wanted >= 0
        own = logits.log_softmax(2)[:, known, wanted[known]]  # (H, n)
        losses -= own.double().sum(1).cpu()
        total += len(wanted)
    return counts, (losses / total).tolist()


def right(head: Heads, values: Tensor, labels: Tensor) -> Tensor:
    """(N,) bool, on the CPU: which samples the first of the heads gives their class. Labels: on its device."""
    found = torch.empty(len(labels), dtype=torch.bool)
    for places, logits in head.logits_of(values):
        found[places] = among_first(1, logits[0], labels[places]).cpu()
    return found


def _preference(row: dict) -> tuple[float, float]:
    """Accuracy decides, and between equals the cross-entropy."""
    return row["held_out_top1"], -row["held_out_loss"]


def _warnings(chosen: dict, grid: Sequence[dict], weight_decays: Sequence[float]) -> list[str]:
    warnings = []
    if not chosen["converged"]:
        warnings.append(f"The probe was stopped after {MAX_PASSES} passes, before its optimum.")
    beside = [row for row in grid if all(row[key] == chosen[key] for key in ("features", "norm"))]
    scores, losses = [row["held_out_top1"] for row in beside], [row["held_out_loss"] for row in beside]
    return warnings + edge_warnings("weight decay", chosen["weight_decay"], weight_decays, "", scores, losses)
