"""Variance and covariance of an embedding over the global batch, the regularisers of VICReg (arXiv 2105.04906).

With Z the embeddings of one view, (N, D) over all ranks, less their mean:

    Cov        = Z^T Z / (N - 1)
    variance   = mean_i max(0, 1 - sqrt(Cov_ii + 1e-4))
    covariance = sum_{i != j} Cov_ij^2 / D

- Two ways to the covariance, as for Barlow Twins (see `cross_correlation`): Cov in blocks of columns, or the products
  of samples, of which sum_ij Cov_ij^2 = sum_ab (Z Z^T)_ab^2 / (N - 1)^2, where the batch is smaller than D.
- No D x D matrix is kept: the gradient is found in the forward pass and stored, n D numbers.
- The gradient is that of the sum over ranks of the loss, whose average over ranks is that of one process with the
  joined batch, however unevenly the ranks share it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prelude.objectives import cross_correlation
from prelude.pretrain.collectives import all_reduce, gather_rows, sum_over_ranks
from prelude.pretrain.distributed import world_size

_EPSILON = 1e-4  # added to a variance before its root


@dataclass(frozen=True)
class Spread:
    """Scalars, the same on every rank."""

    variance: Tensor  # mean hinge, with gradient
    covariance: Tensor  # sum of squared off-diagonals / D, with gradient
    std: Tensor  # mean of the standard deviations
    effective_dimensions: Tensor  # (sum_i Cov_ii)^2 / sum_ij Cov_ij^2, from 1 to D


def spread(embeddings: Tensor, counts: list[int]) -> Spread:
    """embeddings: (n, D), this rank's rows, float32 at least; counts: each rank's n, two or more in all."""
    count, width = sum(counts), embeddings.shape[1]
    centred = embeddings - all_reduce(embeddings.sum(0)) / count
    variances = all_reduce(centred.square().sum(0)) / (count - 1)  # (D,)
    deviations = (variances + _EPSILON).sqrt()
    by_samples = count <= cross_correlation.SAMPLES_BELOW * width
    covariance = _Covariance.apply(centred, variances.detach(), counts, by_samples)
    with torch.no_grad():
        squares = covariance * width + variances.square().sum()  # sum_ij Cov_ij^2
        effective = variances.sum().square() / squares.clamp(min=torch.finfo(squares.dtype).tiny)
    return Spread(F.relu(1 - deviations).mean(), covariance, deviations.detach().mean(), effective)


class _Covariance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, centred: Tensor, variances: Tensor, counts: list[int], by_samples: bool) -> Tensor:
        if by_samples:
            value, grad = _over_samples(centred, variances, counts)
        else:
            value, grad = _over_columns(centred, sum(counts))
        ctx.save_for_backward(grad)
        return value

    @staticmethod
    def backward(ctx, grad: Tensor):
        (stored,) = ctx.saved_tensors
        return grad * world_size() * stored, None, None, None  # every rank's loss depends on these rows, and alike


def _over_columns(centred: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(sum of squared off-diagonals / D, its gradient by this rank's rows), by blocks of columns."""
    width = centred.shape[1]
    value, grad = centred.new_zeros(()), torch.empty_like(centred)
    block = max(cross_correlation.BLOCK_ELEMENTS // width, 1)
    for start in range(0, width, block):
        columns = slice(start, start + block)
        covariance = sum_over_ranks(centred.T @ centred[:, columns]).div_(count - 1)  # (D, block)
        covariance[columns].diagonal().zero_()
        value = value + covariance.square().sum()
        torch.mm(centred, covariance, out=grad[:, columns])
    return value / width, grad.mul_(4 / (width * (count - 1)))


def _over_samples(centred: Tensor, variances: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """The same from the products of samples."""
    width, degrees = centred.shape[1], sum(counts) - 1
    everyone = gather_rows(centred, counts)  # (W * most, D), zeros at the end
    products = centred @ everyone.T  # (n, W * most)
    # In float64: the value is the difference of two sums that may be much larger.
    squares = sum_over_ranks((products.double() / degrees).square().sum())
    value = (squares - variances.double().square().sum()).to(centred.dtype) / width
    grad = torch.addmm(variances * centred, products, everyone, beta=-1, alpha=1 / degrees)
    return value, grad.mul_(4 / (width * degrees))
