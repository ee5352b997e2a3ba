"""Linear heads trained to their optimum: many at once, in passes over features that stay where they are.

A head minimises a mean cross-entropy (of classes, or of yes and no for each label) + wd / 2 * |W|^2, the bias free.

- The problem is convex, so a head is its weight decay: no learning rate, schedule or number of epochs to choose,
  no minibatches, and no randomness.
- Descent happens in the eigenbasis of the features' covariance, where Boehning's bound on the Hessian ("Multinomial
  logistic regression algorithm", 1992: at most half the covariance; a quarter for yes and no) is diagonal. Each
  coordinate gets its own step, and accelerated gradient (Nesterov; restarted as in O'Donoghue & Candes, 2015) needs
  tens of passes where SGD needs thousands on features as correlated as an encoder's.
- All heads share those passes: a pass is two matrix products.
- Weights are rotated, never the samples: features are read in pieces, from a memory map as well as from memory, and
  nothing of their size is kept beside them. A GPU holds them itself where they fit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

TOLERANCE = 1e-6  # a head is done when one more step promises to lower its loss by less than this share
MAX_PASSES = 300
# Logits or features held at once: 4 MiB of float32, or 128 MiB beside a GPU, which wants large matrices.
PIECE_ELEMENTS = 2**25 if torch.cuda.is_available() else 2**20

Norm = Literal["batch", "none"]


@dataclass(frozen=True)
class Heads:
    """H linear heads with C outputs on standardised features."""

    weights: Tensor  # (H, C, D)
    biases: Tensor  # (H, C)
    mean: Tensor  # (D,)
    scale: Tensor  # (D,) 1 / standard deviation; 0 for a feature that is constant
    passes: Tensor  # (H,) over the training set
    gaps: Tensor  # (H,) the decrease of the loss that one more step promised, as a share of it

    @property
    def converged(self) -> list[bool]:
        return (self.gaps < TOLERANCE).tolist()

    def logits(self, values: Tensor) -> Tensor:
        """(N, D) raw features to (H, N, C), on the heads' device."""
        standardised = (values.to(self.mean.device) - self.mean) * self.scale
        return torch.einsum("nd,hcd->hnc", standardised, self.weights) + self.biases[:, None]

    def only(self, h: int) -> "Heads":
        """Head h alone."""
        one = slice(h, h + 1)
        return Heads(self.weights[one], self.biases[one], self.mean, self.scale, self.passes[one], self.gaps[one])

    def logits_of(self, values: Tensor, rows: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(places n, logits (H, n, C)) over `rows` of the values (default: all), as many at a time as memory allows."""
        for places, piece in pieces(values, rows, max(self.biases.numel(), values.shape[1])):
            yield places, self.logits(piece)


class ClassLoss:
    """Mean cross-entropy of N samples with classes (N,) in 0..C-1."""

    def __init__(self, classes: Tensor, num_classes: int):
        self.classes, self.num_outputs = classes, num_classes

    def __len__(self) -> int:
        return len(self.classes)

    def curvature(self) -> Tensor:
        """(1, 1): the bound on the Hessian, as a share of the features' second moments."""
        return torch.full((1, 1), 0.5, device=self.classes.device)

    def take(self, rows: Tensor) -> "ClassLoss":
        return ClassLoss(self.classes[rows], self.num_outputs)

    def __call__(self, logits: Tensor, places: slice) -> tuple[Tensor, Tensor]:
        """logits (n, h, C) of samples `places`. Returns their gradient and (h,) their part of the loss."""
        labels = self.classes[places]
        own = (torch.arange(len(labels), device=labels.device), slice(None), labels)
        residual = logits.softmax(2)  # (n, h, C)
        loss = -residual[own].clamp(min=1e-30).log().sum(0)
        residual[own] -= 1
        return residual.div_(len(self)), loss / len(self)


class LabelLoss:
    """Binary cross-entropy of N samples with labels (N, L) of 1, 0 and NaN, which counts for nothing.

    Each label's mean is over the samples where it is known, and the loss is the sum over labels: each is a problem of
    its own.
    """

    def __init__(self, labels: Tensor):
        self.labels, self.num_outputs = labels, labels.shape[1]
        self.num_known = labels.isfinite().sum(0).clamp(min=1)  # (L,)

    def __len__(self) -> int:
        return len(self.labels)

    def curvature(self) -> Tensor:
        """(L, 1)"""
        return (0.25 * len(self) / self.num_known)[:, None]

    def take(self, rows: Tensor) -> "LabelLoss":
        return LabelLoss(self.labels[rows])

    def __call__(self, logits: Tensor, places: slice) -> tuple[Tensor, Tensor]:
        labels = self.labels[places][:, None]  # (n, 1, L)
        share = labels.isfinite() / self.num_known
        wanted = labels.nan_to_num(0.0)
        loss = (torch.nn.functional.softplus(logits) - wanted * logits) * share
        return (logits.sigmoid() - wanted) * share, loss.sum((0, 2))


@dataclass(frozen=True)
class Space:
    """Standardised features of N samples, and the eigenbasis of their covariance, R <= D axes.

    Directions in which nothing varies are left out: the loss does not see them, and the decay sets them to zero.
    """

    values: Tensor  # (N, D) raw
    mean: Tensor  # (D,)
    scale: Tensor  # (D,) 1 / standard deviation; 0 for a feature that is constant
    basis: Tensor  # (D, R) orthonormal columns
    variances: Tensor  # (R,)

    @classmethod
    def of(cls, values: Tensor, norm: Norm = "batch", device: torch.device | str = "cpu") -> "Space":
        """values: (N, D) raw features. norm: "batch" brings every feature to variance 1, as BatchNorm without affine
        does; "none" divides all by one number, so that their mean variance is 1 and decays mean the same."""
        values = resident(values, torch.device(device))
        mean, scale = _standardisation(values, norm, torch.device(device))
        basis, variances = _principal_axes(values, mean, scale)
        return cls(values, mean, scale, basis, variances)

    def fit(
        self,
        loss: ClassLoss | LabelLoss,
        weight_decays: Sequence[float],
        rows: Tensor | None = None,
        start: Heads | None = None,
    ) -> Heads:
        """One head a weight decay, each at the optimum of its own loss on `rows` of the samples (default: all).

        loss: of all N samples. start: heads of this space to begin from, as many; it saves passes.
        """
        share = 1.0
        if rows is not None:
            rows = rows.to(self.values.device)
            share, loss = len(rows) / len(loss), loss.take(rows.to(self.mean.device))
        # A part of the samples varies at most by what all of them do, spread over fewer. Rounding in the covariance
        # grows with its largest eigenvalue, so small ones are not trusted below that. The constant has variance 1.
        variances = torch.cat([self.variances + 1e-6 * self.variances.max(), self.variances.new_ones(1)]) / share
        decays = torch.tensor(weight_decays, device=self.mean.device)
        heads = self.mean.new_zeros(len(decays), loss.num_outputs, len(variances))  # (H, C, R + 1)
        if start is not None:
            heads = torch.cat([start.weights @ self.basis, start.biases[..., None]], 2)
        heads, passes, gaps = self._minimise(loss, rows, variances * loss.curvature(), decays, heads)
        return Heads(heads[..., :-1] @ self.basis.T, heads[..., -1], self.mean, self.scale, passes, gaps)

    def _minimise(self, loss, rows, curvature: Tensor, decays: Tensor, heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The heads (H, C, R + 1), the bias last, with the passes and the gap of each. curvature: (C or 1, R + 1).

        A head leaves when it is done, so that the few with little decay, which are slow, do not hold up the others.
        """
        decay = decays[:, None, None].repeat(1, 1, curvature.shape[1])  # (H, 1, R + 1)
        decay[..., -1] = 0  # the bias is free
        passes, gaps = torch.zeros(len(decays), dtype=torch.long), torch.full((len(decays),), torch.inf)
        descent = _Descent(decay, 1 / (curvature + decay), heads, heads, torch.ones_like(decays))
        heads = torch.zeros_like(heads)
        running = torch.arange(len(decays))
        for count in range(1, MAX_PASSES + 1):
            gap = descent.advance(*self._gradient(loss, rows, descent.ahead)).cpu()
            done = gap < TOLERANCE if count < MAX_PASSES else torch.ones_like(gap, dtype=torch.bool)
            if done.any():
                finished = running[done]
                heads[finished.to(heads.device)] = descent.weights[done.to(heads.device)]
                passes[finished], gaps[finished] = count, gap[done]
                descent, running = descent.without(done.to(heads.device)), running[~done]
            if not len(running):
                break
        return heads, passes, gaps

    def _gradient(self, loss, rows: Tensor | None, heads: Tensor) -> tuple[Tensor, Tensor]:
        """The loss' gradient (h, C, R + 1) and (h,) its value."""
        num_heads, num_outputs, _ = heads.shape
        weights = (heads[..., :-1] @ self.basis.T).flatten(0, 1)  # (h * C, D)
        biases = heads[..., -1].flatten()
        gradient, of_biases = torch.zeros_like(weights), torch.zeros_like(biases)
        value = heads.new_zeros(num_heads)
        for places, piece in pieces(self.values, rows, max(weights.shape)):
            standardised = (piece.to(self.mean.device) - self.mean) * self.scale  # (n, D)
            logits = torch.addmm(biases, standardised, weights.T).view(-1, num_heads, num_outputs)
            residual, part = loss(logits, places)
            residual = residual.flatten(1)  # (n, h * C)
            gradient.addmm_(residual.T, standardised)
            of_biases += residual.sum(0)
            value += part
        rotated = gradient.view(num_heads, num_outputs, -1) @ self.basis
        return torch.cat([rotated, of_biases.view(num_heads, num_outputs, 1)], 2), value


@dataclass
class _Descent:
    """Accelerated gradient descent of h heads, with one step size a coordinate; every head restarts on its own."""

    decay: Tensor  # (h, 1, R)
    step: Tensor  # (h, C or 1, R)
    weights: Tensor  # (h, C, R)
    ahead: Tensor  # (h, C, R) where the gradient is taken
    momentum: Tensor  # (h,)

    def advance(self, gradient: Tensor, loss: Tensor) -> Tensor:
        """One pass, of the plain loss. Returns (h,) the decrease that a plain step from here promises, as a share of
        the decayed loss."""
        gradient = gradient + self.decay * self.ahead
        loss = loss + 0.5 * (self.decay * self.ahead.square()).sum((1, 2))
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


# ---- features in pieces


def resident(values: Tensor, device: torch.device) -> Tensor:
    """On the device where they take at most half of a GPU's free memory; else where they are."""
    if device.type != "cuda" or values.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return values
    return values.to(device)


def pieces(values: Tensor, rows: Tensor | None, width: int) -> Iterator[tuple[slice, Tensor]]:
    """(places among the rows, (n, D) values), `PIECE_ELEMENTS // width` rows at a time."""
    total, step = len(values) if rows is None else len(rows), max(PIECE_ELEMENTS // width, 1)
    for start in range(0, total, step):
        places = slice(start, min(start + step, total))
        yield places, values[places] if rows is None else values[rows[places]]


def _standardisation(values: Tensor, norm: Norm, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of each feature; features that only vary by rounding are switched off."""
    sums = torch.zeros(2, values.shape[1], dtype=torch.float64, device=device)
    for _, piece in pieces(values, None, values.shape[1]):
        piece = piece.to(device).double()
        sums[0] += piece.sum(0)
        sums[1] += piece.square().sum(0)
    mean, square = sums / len(values)
    variance = square - mean.square()
    varies = variance > 1e-10 * mean.square()
    variance = variance.clamp(min=torch.finfo(torch.float32).tiny)
    if norm == "none":
        variance = torch.where(varies, variance, 0.0).mean().clamp(min=torch.finfo(torch.float32).tiny)
    return mean.float(), torch.where(varies, variance.rsqrt(), 0.0).float()


def _principal_axes(values: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(D, R) axes and the variances (R,) along them."""
    num_samples, num_features = values.shape
    if num_samples >= num_features:
        covariance = mean.new_zeros(num_features, num_features)
        for _, piece in pieces(values, None, num_features):
            standardised = (piece.to(mean.device) - mean) * scale
            covariance.addmm_(standardised.T, standardised, alpha=1 / num_samples)
        variances, axes = torch.linalg.eigh(covariance)
        kept = variances > 1e-7 * variances[-1]
        return axes[:, kept], variances[kept]
    # With fewer samples than features the products between samples are the smaller matrix with the same eigenvalues.
    # Dividing by small ones needs float64.
    rows = ((values.to(mean.device) - mean) * scale).double()
    variances, combinations = torch.linalg.eigh(rows @ rows.T / num_samples)
    kept = variances > 1e-7 * variances[-1]
    axes = rows.T @ (combinations[:, kept] / (num_samples * variances[kept]).sqrt())
    return axes.float(), variances[kept].float()
