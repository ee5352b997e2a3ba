"""Linear classification on frozen features: many heads at once, each trained to its optimum.

A head is multinomial logistic regression on standardised features (BatchNorm without affine, as in the MAE
paper) with weight decay: mean cross-entropy + wd / 2 * |W|^2, the bias free. Trained to its optimum and with
the decay chosen on held-out samples, as in Radford et al., "CLIP", 2021, appendix A.3.

- The problem is convex, so a head is its weight decay: no learning rate, schedule or number of epochs to choose,
  no minibatches, and no randomness but the split.
- Features are rotated into the eigenbasis of their covariance, where Boehning's bound on the Hessian
  ("Multinomial logistic regression algorithm", 1992: at most half the covariance) is diagonal. Each coordinate
  gets its own step, and accelerated gradient (Nesterov; restarted as in O'Donoghue & Candes, 2015) needs tens of
  passes where SGD needs thousands on features as correlated as an encoder's.
- All heads share those passes: a pass is two matrix products.
- Kind of feature and weight decay are chosen on a tenth of train; the chosen setting is then refit on all of
  train, and test is read once for each kind.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from evaluators.features import Features
from evaluators.results import Outcome, Percent, hits, percent
from evaluators.splits import HELD_OUT, contiguous_labels, hold_out

WEIGHT_DECAYS = tuple(float(f"{10 ** (-5 + i / 2):.3g}") for i in range(12))  # 1e-5 .. 3.16
TOLERANCE = 1e-6  # a head is done when one more step promises to lower its loss by less than this share
MAX_PASSES = 300
# Logits held at once; 2**26 float32 are 256 MiB.
CHUNK_ELEMENTS = 2**26


@dataclass(frozen=True)
class Heads:
    """H linear heads on standardised features."""

    weights: Tensor  # (H, C, D)
    biases: Tensor  # (H, C)
    mean: Tensor  # (D,)
    scale: Tensor  # (D,) 1 / standard deviation; 0 for a feature that is constant
    passes: Tensor  # (H,) over the training set
    gaps: Tensor  # (H,) the decrease of the loss that one more step promised, as a share of it

    def logits(self, values: Tensor) -> Tensor:
        """(N, D) raw features to (H, N, C)."""
        standardised = (values - self.mean) * self.scale
        return torch.einsum("nd,hcd->hnc", standardised, self.weights) + self.biases[:, None]


def linear_probe(
    train: dict[str, Features],
    test: dict[str, Features],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
) -> Outcome:
    """Test accuracy of a linear head, its weight decay and kind of feature chosen on a held-out part of train.

    seed: of the held-out part, the only random choice.
    """
    labels, test_labels, num_classes = contiguous_labels(train, test)
    fit_rows, held_rows = hold_out(labels, seed)
    grid, by_features, warnings = [], {}, []
    for kind in train:
        values, targets = train[kind].values.to(device), labels.to(device)
        space = Space.of(values)
        heads = space.fit(targets, num_classes, weight_decays, fit_rows.to(device))
        found = _held_out(heads, values[held_rows], targets[held_rows], kind, weight_decays)
        best = max(found, key=_preference)
        final = space.fit(targets, num_classes, (best["weight_decay"],))
        by_features[kind] = {**best, **_final(final, test[kind].values, test_labels.to(device))}
        grid += found
    chosen = max(by_features.values(), key=_preference)
    if not chosen["converged"]:
        warnings.append(f"The probe was stopped after {MAX_PASSES} passes, before its optimum.")
    if chosen["weight_decay"] in (min(weight_decays), max(weight_decays)) and len(weight_decays) > 1:
        warnings.append(
            f"The chosen weight decay {chosen['weight_decay']:g} is at the edge of the grid "
            f"({min(weight_decays):g} to {max(weight_decays):g}), so a better one may lie outside."
        )
    return Outcome(
        evaluator="linear_probe",
        numbers=chosen["test"],
        chosen={key: chosen[key] for key in ("features", "weight_decay")},
        recipe={
            "weight_decays": list(weight_decays),
            "features": list(train),
            "held_out": HELD_OUT,
            "refit_on": "all of train",
            "tolerance": TOLERANCE,
            "seed": seed,
        },
        details={"grid": grid, "by_features": by_features},
        warnings=warnings,
    )


@dataclass(frozen=True)
class Space:
    """Standardised features of N samples in the eigenbasis of their covariance, R <= D of them.

    Directions in which nothing varies are left out: the loss does not see them, and the decay sets them to zero.
    """

    mean: Tensor  # (D,)
    scale: Tensor  # (D,) 1 / standard deviation; 0 for a feature that is constant
    basis: Tensor  # (D, R) orthonormal columns
    variances: Tensor  # (R,)
    coordinates: Tensor  # (R + 1, N), the last row all ones: the bias is the weight of a constant feature

    @classmethod
    def of(cls, values: Tensor) -> "Space":
        """values: (N, D) raw features."""
        mean, scale = _standardisation(values)
        standardised = (values - mean) * scale
        basis, variances = _principal_axes(standardised)
        coordinates = torch.cat([(standardised @ basis).T, values.new_ones(1, len(values))])
        return cls(mean, scale, basis, variances, coordinates)

    def fit(
        self, targets: Tensor, num_classes: int, weight_decays: Sequence[float], rows: Tensor | None = None
    ) -> Heads:
        """One head a weight decay, each at the optimum of its own loss on `rows` of the samples (default: all).

        targets: (N,) in 0..C-1.
        """
        coordinates, share = self.coordinates, 1.0
        if rows is not None:
            coordinates, targets, share = coordinates[:, rows], targets[rows], len(rows) / len(targets)
        # A part of the samples varies at most by what all of them do, spread over fewer. Rounding in the covariance
        # grows with its largest eigenvalue, so small ones are not trusted below that. The constant has variance 1.
        variances = torch.cat([self.variances + 1e-6 * self.variances.max(), self.variances.new_ones(1)]) / share
        decays = torch.tensor(weight_decays, device=targets.device)
        heads, passes, gaps = _minimise(coordinates, variances, targets, num_classes, decays)  # (H, C, R + 1)
        return Heads(heads[..., :-1] @ self.basis.T, heads[..., -1], self.mean, self.scale, passes, gaps)


def _standardisation(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of each feature; features that only vary by rounding are switched off."""
    variance, mean = torch.var_mean(values, 0, correction=0)
    varies = variance > 1e-10 * mean.square()
    return mean, torch.where(varies, variance.clamp(min=torch.finfo(variance.dtype).tiny).rsqrt(), 0.0)


def _principal_axes(standardised: Tensor) -> tuple[Tensor, Tensor]:
    """(D, R) axes and the variances (R,) along them."""
    num_samples, num_features = standardised.shape
    if num_samples >= num_features:
        variances, axes = torch.linalg.eigh(standardised.T @ standardised / num_samples)
        kept = variances > 1e-7 * variances[-1]
        return axes[:, kept], variances[kept]
    # With fewer samples than features the products between samples are the smaller matrix with the same eigenvalues.
    # Dividing by small ones needs float64.
    rows = standardised.double()
    variances, combinations = torch.linalg.eigh(rows @ rows.T / num_samples)
    kept = variances > 1e-7 * variances[-1]
    axes = rows.T @ (combinations[:, kept] / (num_samples * variances[kept]).sqrt())
    return axes.float(), variances[kept].float()


def _minimise(
    coordinates: Tensor, variances: Tensor, targets: Tensor, num_classes: int, decays: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The heads (H, C, R + 1), the bias last, with the passes and the gap of each.

    A head leaves when it is done, so that the few with little decay, which are slow, do not hold up the others.
    """
    decay = decays[:, None, None].repeat(1, 1, len(coordinates))  # (H, 1, R + 1)
    decay[..., -1] = 0  # the bias is free
    heads = coordinates.new_zeros(len(decays), num_classes, len(coordinates))
    passes, gaps = torch.zeros(len(decays), dtype=torch.long), torch.full((len(decays),), torch.inf)
    descent = _Descent(decay, 1 / (0.5 * variances + decay), heads, heads, torch.ones_like(decays))
    running = torch.arange(len(decays))
    for count in range(1, MAX_PASSES + 1):
        gap = descent.advance(coordinates, targets).cpu()
        done = gap < TOLERANCE if count < MAX_PASSES else torch.ones_like(gap, dtype=torch.bool)
        if done.any():
            finished = running[done]
            heads[finished.to(heads.device)] = descent.weights[done.to(heads.device)]
            passes[finished], gaps[finished] = count, gap[done]
            descent, running = descent.without(done.to(heads.device)), running[~done]
        if not len(running):
            break
    return heads, passes, gaps


@dataclass
class _Descent:
    """Accelerated gradient descent of h heads, with one step size a coordinate; every head restarts on its own."""

    decay: Tensor  # (h, 1, R)
    step: Tensor  # (h, 1, R)
    weights: Tensor  # (h, C, R)
    ahead: Tensor  # (h, C, R) where the gradient is taken
    momentum: Tensor  # (h,)

    def advance(self, coordinates: Tensor, targets: Tensor) -> Tensor:
        """One pass. Returns (h,) the decrease that a plain step from here promises, as a share of the loss."""
        gradient, loss = _gradient(coordinates, targets, self.ahead)
        gradient += self.decay * self.ahead
        loss += 0.5 * (self.decay * self.ahead.square()).sum((1, 2))
        weights = self.ahead - self.step * gradient
        moved = weights - self.weights
        uphill = (gradient * moved).sum((1, 2)) > 0
        momentum = torch.where(uphill, 1.0, (1 + (1 + 4 * self.momentum**2).sqrt()) / 2)
        push = torch.where(uphill, 0.0, (self.momentum - 1) / momentum)
        self.weights, self.ahead, self.momentum = weights, weights + push[:, None, None] * moved, momentum
        return 0.5 * (self.step * gradient.square()).sum((1, 2)) / loss

    def without(self, done: Tensor) -> "_Descent":
        """The heads that are not done, (h,) bool."""
        return _Descent(*(getattr(self, field.name)[~done] for field in fields(self)))


def _gradient(coordinates: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy's gradient, and its value for each head. coordinates: (R, N); weights: (h, C, R)."""
    num_heads, num_classes, _ = weights.shape
    flat = weights.flatten(0, 1)  # (h * C, R)
    gradient, loss = torch.zeros_like(flat), flat.new_zeros(num_heads)
    columns = max(CHUNK_ELEMENTS // len(flat), 1)
    for chunk, labels in zip(coordinates.split(columns, 1), targets.split(columns), strict=True):
        own = (slice(None), labels, torch.arange(len(labels), device=labels.device))
        residual = (flat @ chunk).view(num_heads, num_classes, -1).softmax(1)  # (h, C, n)
        loss -= residual[own].clamp(min=1e-30).log().sum(1)
        residual[own] -= 1
        gradient.addmm_(residual.flatten(0, 1), chunk.T)
    return gradient.view_as(weights) / len(targets), loss / len(targets)


def _held_out(heads: Heads, values: Tensor, targets: Tensor, kind: str, weight_decays: Sequence[float]) -> list[dict]:
    """A row of the grid for each head."""
    rows = []
    counts, losses = _score(heads, values, targets)
    for h, decay in enumerate(weight_decays):
        rows.append(
            {
                "features": kind,
                "weight_decay": decay,
                "held_out_top1": percent(counts[h]["top1"], len(targets)).value,
                "held_out_loss": losses[h],
                "passes": heads.passes[h].item(),
                "converged": heads.gaps[h].item() < TOLERANCE,
            }
        )
    return rows


def _final(head: Heads, values: Tensor, targets: Tensor) -> dict:
    """The refit head on the test set."""
    (counts,), _ = _score(head, values, targets)
    numbers: dict[str, Percent] = {name: percent(count, len(targets)) for name, count in counts.items()}
    return {"test": numbers, "passes": head.passes.item(), "converged": head.gaps.item() < TOLERANCE}


def _score(heads: Heads, values: Tensor, targets: Tensor) -> tuple[list[Counter], list[float]]:
    """Hits and mean cross-entropy of each head; samples of unknown classes count as missed and have no loss."""
    num_heads, num_classes, _ = heads.weights.shape
    counts, losses = [Counter() for _ in range(num_heads)], torch.zeros(num_heads, dtype=torch.float64)
    rows = max(CHUNK_ELEMENTS // (num_heads * num_classes), 1)
    for chunk, labels in zip(values.split(rows), targets.split(rows), strict=True):
        logits = heads.logits(chunk.to(heads.mean.device))  # (H, n, C)
        for h in range(num_heads):
            counts[h].update(hits(logits[h], labels))
        known = labels >= 0
        own = logits.log_softmax(2)[:, known, labels[known]]  # (H, n)
        losses -= own.double().sum(1).cpu()
    return counts, (losses / len(targets)).tolist()


def _preference(row: dict) -> tuple[float, float]:
    """Accuracy decides, and between equals the cross-entropy."""
    return row["held_out_top1"], -row["held_out_loss"]
