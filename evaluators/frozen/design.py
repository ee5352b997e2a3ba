"""Samples as a descent meets them: standardised features, along the axes of their covariance.

- `Rotated` samples are standardised and rotated once, and held: a pass over them is two matrix products and no more.
- `Streamed` ones are features as they are, standardised again in each pass, a piece at a time; it is the weights that
  are rotated there and back. Nothing of the features' size is held, which is for what memory has no room for.

Both are the same samples, up to rounding.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prelude.evaluators.frozen.pieces import PIECE_ELEMENTS, has_room, pieces

# Logits held at once beside rotated samples: 16 MiB. Cores that work together on a product wait for each other at its
# end, and, where they are crowded, for long; so products are few and large.
LOGITS = max(2**22, PIECE_ELEMENTS)


@dataclass(frozen=True)
class Axes:
    """Of N samples with D features: what standardises them, and the R <= D directions in which they vary."""

    mean: Tensor  # (D,)
    scale: Tensor  # (D,) 1 / standard deviation; 0 for a feature that is constant
    basis: Tensor  # (D, R) orthonormal columns
    variances: Tensor  # (R,)


@dataclass(frozen=True)
class Rotated:
    values: Tensor  # (n, R)

    def pieces(self, num_logits: int) -> Iterator[tuple[slice, Tensor]]:
        """(places among the samples, (m, K) values), with `num_logits` logits for each."""
        step = max(LOGITS // num_logits, 1)
        for start in range(0, len(self.values), step):
            places = slice(start, min(start + step, len(self.values)))
            yield places, self.values[places]

    def weights_of(self, weights: Tensor) -> Tensor:
        """Weights (..., R) along the axes, as the values of a piece want them: (..., K)."""
        return weights

    def gradient_of(self, gradient: Tensor) -> Tensor:
        """And a gradient (..., K) back to (..., R)."""
        return gradient


@dataclass(frozen=True)
class Streamed:
    values: Tensor  # (N, D) raw
    rows: Tensor | None  # (n,)
    axes: Axes

    def pieces(self, num_logits: int) -> Iterator[tuple[slice, Tensor]]:
        axes = self.axes
        for places, piece in pieces(self.values, self.rows, max(num_logits, self.values.shape[1])):
            yield places, (piece.to(axes.mean.device) - axes.mean) * axes.scale

    def weights_of(self, weights: Tensor) -> Tensor:
        return weights @ self.axes.basis.T

    def gradient_of(self, gradient: Tensor) -> Tensor:
        return gradient @ self.axes.basis


def design(values: Tensor, rows: Tensor | None, axes: Axes) -> Rotated | Streamed:
    """The samples `rows` (default: all) of raw features (N, D), rotated where there is room for that."""
    streamed = Streamed(values, rows, axes)
    shape = len(values) if rows is None else len(rows), axes.basis.shape[1]
    device = axes.mean.device
    if not has_room(shape[0] * shape[1] * axes.basis.element_size(), device):
        return streamed
    rotated = torch.empty(shape, dtype=axes.basis.dtype, device=device)
    for places, piece in streamed.pieces(shape[1]):
        torch.mm(piece, axes.basis, out=rotated[places])
    return Rotated(rotated)
