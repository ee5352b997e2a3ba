"""Linear heads trained to their optimum: many at once, in passes over features that stay where they are.

A head minimises a mean cross-entropy (of classes, or of yes and no for each label) + wd / 2 * |W|^2, the bias free.

- The problem is convex, so a head is its weight decay: no learning rate, schedule or number of epochs to choose,
  no minibatches, and no randomness.
- Descent happens in the eigenbasis of the features' covariance, where Boehning's bound on the Hessian ("Multinomial
  logistic regression algorithm", 1992: at most half the covariance; a quarter for yes and no) is diagonal. Each
  coordinate gets its own step, and accelerated gradient (Nesterov; restarted as in O'Donoghue & Candes, 2015) needs
  tens of passes where SGD needs thousands on features as correlated as an encoder's.
- Where samples are told apart well, the curvature is far below the bound. Steps are made for what gradients on the way
  show of it (as Barzilai & Borwein, 1988, read it off them), with a margin, and for the bound once the loss rises.
- All heads share those passes: a pass is two matrix products. What is a problem of its own (a head of classes, or one
  label of a head of labels) has its own momentum, its own gap, and leaves when it is done.
- The gap is an estimate of how far a loss is above its least, as a share of it: half of g^T H^-1 g, with the mean
  curvature where the descent stands. With the bound in its place rare labels would seem done long before they are.
- The samples are rotated into that basis once, where memory has room; `evaluators.frozen.design` has them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from prelude.evaluators.frozen.design import Axes, Rotated, Streamed, design
from prelude.evaluators.frozen.pieces import pieces, resident

TOLERANCE = 1e-6  # a problem is done when its loss seems to be above its least by less than this share
MAX_PASSES = 1000
# The curvature that steps are made for: by how much it may fall in a pass, what it is above the one that was met, and
# the rise of the loss (a ratio) after which it is the bound again.
SHRINK, MARGIN, WORSE = 0.95, 2.0, 1.1

Norm = Literal["batch", "none"]


@dataclass(frozen=True)
class Heads:
    """H linear heads with C outputs on standardised features."""

    weights: Tensor  # (H, C, D)
    biases: Tensor  # (H, C)
    mean: Tensor  # (D,)
    scale: Tensor  # (D,) 1 / standard deviation; 0 for a feature that is constant
    passes: Tensor  # (H, P) over the training set; of each problem: one a head for classes, each label for labels
    gaps: Tensor  # (H, P) how far the loss seemed to be above its least, as a share of it

    @property
    def converged(self) -> list[bool]:
        return (self.gaps < TOLERANCE).all(1).tolist()

    def logits(self, values: Tensor) -> Tensor:
        """(N, D) raw features to (H, N, C), on the heads' device."""
        standardised = (values.to(self.mean.device) - self.mean) * self.scale
        return torch.einsum("nd,hcd->hnc", standardised, self.weights) + self.biases[:, None]

    def only(self, h: int) -> "Heads":
        """Head h alone."""
        one = slice(h, h + 1)
        return Heads(self.weights[one], self.biases[one], self.mean, self.scale, self.passes[one], self.gaps[one])

    def part(self, problem: int, num_outputs: int) -> "Heads":
        """The heads of one problem, where each has `num_outputs` outputs."""
        one, own = slice(problem, problem + 1), slice(problem * num_outputs, (problem + 1) * num_outputs)
        found = self.weights[:, own], self.biases[:, own]
        return Heads(*found, self.mean, self.scale, self.passes[:, one], self.gaps[:, one])

    def logits_of(self, values: Tensor, rows: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(places n, logits (H, n, C)) over `rows` of the values (default: all), as many at a time as memory allows."""
        for places, piece in pieces(values, rows, max(self.biases.numel(), values.shape[1])):
            yield places, self.logits(piece)


class ClassLoss:
    """Mean cross-entropy of N samples with classes (N,) in 0..C-1: one problem a head, with C outputs."""

    def __init__(self, classes: Tensor, num_classes: int):
        self.classes, self.num_outputs, self.num_problems = classes, num_classes, 1

    def __len__(self) -> int:
        return len(self.classes)

    def curvature(self) -> Tensor:
        """(P,): the bound on the Hessian, as a share of the features' second moments."""
        return torch.full((1,), 0.5, device=self.classes.device)

    def solvable(self) -> Tensor:
        """(P,) bool: whether there is something to tell apart."""
        return torch.ones(1, dtype=torch.bool)

    def take(self, rows: Tensor) -> "ClassLoss":
        return ClassLoss(self.classes[rows], self.num_outputs)

    def __call__(self, logits: Tensor, places: slice, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """logits (n, p, C) of samples `places`, of the problems `which` (p,).

        Returns their gradient, and their parts of the loss (p,) and of the curvature that is felt (p, C).
        """
        labels = self.classes[places]
        own = (torch.arange(len(labels), device=labels.device), slice(None), labels)
        residual = logits.softmax(2)  # (n, p, C)
        loss = -residual[own].clamp(min=1e-30).log().sum(0)
        felt = (residual.sum(0) - residual.square().sum(0)) / len(self)
        residual[own] -= 1
        return residual.div_(len(self)), loss / len(self), felt


class FoldLoss:
    """Mean cross-entropy of N samples with classes (N,) in 0..C-1, over each of several parts of them: one problem a
    part, so that the parts of a cross-validation share their passes.

    parts: (N, P) bool. A head has P * C outputs, part by part.
    """

    def __init__(self, classes: Tensor, num_classes: int, parts: Tensor):
        self.classes, self.num_outputs, self.num_problems = classes, num_classes, parts.shape[1]
        self.parts, self.counts = parts, parts.sum(0)

    def __len__(self) -> int:
        return len(self.classes)

    def curvature(self) -> Tensor:
        """(P,): what a part's samples vary by is spread over fewer."""
        return 0.5 * len(self) / self.counts

    def solvable(self) -> Tensor:
        """(P,)"""
        return torch.ones(self.num_problems, dtype=torch.bool)

    def __call__(self, logits: Tensor, places: slice, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        labels = self.classes[places]
        share = (self.parts[places] / self.counts)[:, which]  # (n, p)
        own = (torch.arange(len(labels), device=labels.device), slice(None), labels)
        residual = logits.softmax(2)  # (n, p, C)
        loss = -(residual[own].clamp(min=1e-30).log() * share).sum(0)
        felt = (residual * (1 - residual) * share[..., None]).sum(0)
        residual[own] -= 1
        return residual.mul_(share[..., None]), loss, felt


class LabelLoss:
    """Binary cross-entropy of N samples with labels (N, L) of 1, 0 and NaN, which counts for nothing.

    Each label is a problem of its own with one output, and its loss the mean over the samples where it is known. A
    label that is always or never there has no optimum, and its head stays 0.
    """

    def __init__(self, labels: Tensor):
        self.labels, self.num_outputs, self.num_problems = labels, 1, labels.shape[1]
        self.num_known = labels.isfinite().sum(0).clamp(min=1)  # (L,)

    def __len__(self) -> int:
        return len(self.labels)

    def curvature(self) -> Tensor:
        """(L,)"""
        return 0.25 * len(self) / self.num_known

    def solvable(self) -> Tensor:
        """(L,)"""
        return ((self.labels == 1).any(0) & (self.labels == 0).any(0)).cpu()

    def take(self, rows: Tensor) -> "LabelLoss":
        return LabelLoss(self.labels[rows])

    def __call__(self, logits: Tensor, places: slice, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        labels = self.labels[places][:, which, None]  # (n, p, 1)
        share = labels.isfinite() / self.num_known[which, None]
        wanted = labels.nan_to_num(0.0)
        loss = (torch.nn.functional.softplus(logits) - wanted * logits) * share
        found = logits.sigmoid()
        felt = (found * (1 - found) * share).sum(0)
        return (found - wanted) * share, loss.sum((0, 2)), felt


@dataclass(frozen=True)
class Space(Axes):
    """Standardised features of N samples, and the eigenbasis of their covariance, R <= D axes.

    Directions in which nothing varies are left out: the loss does not see them, and the decay sets them to zero.
    """

    values: Tensor  # (N, D) raw

    @classmethod
    def of(cls, values: Tensor, norm: Norm = "batch", device: torch.device | str = "cpu") -> "Space":
        """values: (N, D) raw features. norm: "batch" brings every feature to variance 1, as BatchNorm without affine
        does; "none" divides all by one number, so that their mean variance is 1 and decays mean the same."""
        values = resident(values, torch.device(device))
        mean, scale = _standardisation(values, norm, torch.device(device))
        basis, variances = _principal_axes(values, mean, scale)
        return cls(mean, scale, basis, variances, values)

    def fit(
        self,
        loss: ClassLoss | FoldLoss | LabelLoss,
        weight_decays: Sequence[float],
        rows: Tensor | None = None,
        start: Heads | None = None,
        told: Callable[[int], None] = lambda count: None,
    ) -> Heads:
        """One head a weight decay, each at the optimum of its own loss on `rows` of the samples (default: all).

        loss: of all N samples. start: heads of this space to begin from, as many; it saves passes. told: hears
        how many more problems are done, of the H * P.
        """
        share = 1.0
        if rows is not None:
            rows = rows.to(self.values.device)
            share, loss = len(rows) / len(loss), loss.take(rows.to(self.mean.device))
        # A part of the samples varies at most by what all of them do, spread over fewer. Rounding in the covariance
        # grows with its largest eigenvalue, so small ones are not trusted below that. The constant has variance 1.
        largest = max(self.variances.tolist(), default=0.0)  # there is none where all features are constant
        variances = torch.cat([self.variances + 1e-6 * largest, self.variances.new_ones(1)]) / share
        decays = torch.tensor(weight_decays, device=self.mean.device)
        num_heads, problems = len(decays), (len(decays), loss.num_problems)
        heads = self.mean.new_zeros(*problems, loss.num_outputs, len(variances))  # (H, P, C, R + 1)
        if start is not None:
            heads = torch.cat([start.weights @ self.basis, start.biases[..., None]], 2).view_as(heads)
        heads, passes, gaps = _minimise(loss, design(self.values, rows, self), variances, decays, heads, told)
        heads = heads.view(num_heads, -1, len(variances))
        weights, biases = heads[..., :-1] @ self.basis.T, heads[..., -1]
        return Heads(weights, biases, self.mean, self.scale, passes.view(problems), gaps.view(problems))


def _minimise(
    loss, samples: Rotated | Streamed, variances: Tensor, decays: Tensor, heads: Tensor, told: Callable
) -> tuple[Tensor, Tensor, Tensor]:
    """heads: (H, P, C, R + 1), the bias last. variances: (R + 1,). Returns heads (H * P, C, R + 1), and the passes
    and the gap of each.

    A problem leaves when it is done, so that the few with little decay, which are slow, do not hold up the others.
    """
    num_heads, num_problems = heads.shape[:2]
    which = torch.arange(num_problems, device=decays.device).repeat(num_heads)
    decay = decays.repeat_interleave(num_problems)[:, None, None].repeat(1, 1, len(variances))  # (H * P, 1, R + 1)
    decay[..., -1] = 0  # the bias is free
    bound = loss.curvature()[which]  # (H * P,)
    heads = heads.flatten(0, 1)
    passes, gaps = torch.zeros(len(heads), dtype=torch.long), torch.zeros(len(heads))
    running = loss.solvable().repeat(num_heads).nonzero()[:, 0]
    start = (torch.ones_like(bound), heads, torch.zeros_like(heads), torch.full_like(bound, torch.inf))
    descent = _Descent(which, decay, bound, bound.clone(), heads, heads, *start).only(running)
    heads = torch.zeros_like(heads)
    for count in range(1, MAX_PASSES + 1):
        if not len(running):
            break
        gap = descent.advance(*_gradient(loss, samples, descent.ahead, descent.which), variances).cpu()
        done = gap < TOLERANCE if count < MAX_PASSES else torch.ones_like(gap, dtype=torch.bool)
        if done.any():
            finished = running[done]
            heads[finished.to(heads.device)] = descent.weights[done.to(heads.device)]
            passes[finished], gaps[finished] = count, gap[done]
            descent, running = descent.only(~done), running[~done]
            told(len(finished))
    return heads, passes, gaps


def _gradient(loss, samples: Rotated | Streamed, heads: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss' gradient (p, C, R + 1), its value (p,) and the curvature (p, C) that is felt, by problem."""
    num_problems, num_outputs, _ = heads.shape
    weights, biases = samples.weights_of(heads[..., :-1].flatten(0, 1)), heads[..., -1].flatten()  # (p * C, K)
    gradient, of_biases = torch.zeros_like(weights), torch.zeros_like(biases)
    value, felt = heads.new_zeros(num_problems), heads.new_zeros(num_problems, num_outputs)
    for places, piece in samples.pieces(len(weights)):  # (n, K)
        logits = torch.addmm(biases, piece, weights.T).view(-1, num_problems, num_outputs)
        residual, part, curved = loss(logits, places, which)
        residual = residual.flatten(1)  # (n, p * C)
        gradient.addmm_(residual.T, piece)
        of_biases += residual.sum(0)
        value += part
        felt += curved
    found = torch.cat([samples.gradient_of(gradient), of_biases[:, None]], 1)
    return found.view_as(heads), value, felt


@dataclass
class _Descent:
    """Accelerated gradient descent of p problems, with one step size a coordinate; each restarts on its own."""

    which: Tensor  # (p,) among the problems of the loss
    decay: Tensor  # (p, 1, R)
    bound: Tensor  # (p,) on the curvature, as a share of the variances
    curvature: Tensor  # (p,) that the step is made for
    weights: Tensor  # (p, C, R)
    ahead: Tensor  # (p, C, R) where the gradient is taken
    momentum: Tensor  # (p,)
    before: Tensor  # (p, C, R) where the gradient was taken last
    slope: Tensor  # (p, C, R) and that gradient, of the plain loss
    loss: Tensor  # (p,) there, the decayed one

    def advance(self, gradient: Tensor, loss: Tensor, felt: Tensor, variances: Tensor) -> Tensor:
        """One pass, of the plain loss. variances: (R,). Returns (p,) the gap, as a share of the decayed loss."""
        went = self.ahead - self.before
        length = (variances * went.square()).sum((1, 2))
        met = ((gradient - self.slope) * went).sum((1, 2)) / length.clamp(min=1e-30)
        met = torch.where(length > 0, met, self.bound)
        gradient, plain = gradient + self.decay * self.ahead, gradient
        loss = loss + 0.5 * (self.decay * self.ahead.square()).sum((1, 2))
        expected = torch.maximum(SHRINK * self.curvature, MARGIN * met).minimum(self.bound)
        self.curvature = torch.where(loss > WORSE * self.loss, self.bound, expected)  # the bound never overshoots
        self.before, self.slope, self.loss = self.ahead, plain, loss
        step = 1 / (self.curvature[:, None, None] * variances + self.decay)
        weights = self.ahead - step * gradient
        moved = weights - self.weights
        uphill = (gradient * moved).sum((1, 2)) > 0
        momentum = torch.where(uphill, 1.0, (1 + (1 + 4 * self.momentum**2).sqrt()) / 2)
        push = torch.where(uphill, 0.0, (self.momentum - 1) / momentum)
        self.weights, self.ahead, self.momentum = weights, weights + push[:, None, None] * moved, momentum
        curvature = (felt[..., None] * variances + self.decay).clamp(min=1e-30)
        return 0.5 * (gradient.square() / curvature).sum((1, 2)) / loss

    def only(self, kept: Tensor) -> "_Descent":
        """Some of the problems, by place or (p,) bool."""
        return _Descent(*(getattr(self, field.name)[kept.to(self.which.device)] for field in fields(self)))


# ---- standardisation and axes


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
