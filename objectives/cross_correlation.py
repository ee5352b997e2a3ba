"""The Barlow Twins loss over the global batch, computed without a D x D matrix in memory.

With A and B the standardised embeddings of the two views, (N, D) over all ranks:

    c = A^T B / N
    total = sum_i (c_ii - 1)^2 + weight * sum_{i != j} c_ij^2

Two ways to the same numbers:

- Columns: c in blocks of columns, each summed over ranks, its part of both gradients taken at once. Beside the
  gradients, D x block numbers are held.
- Samples: sum_ij c_ij^2 = sum_ab K_A[a, b] K_B[a, b] / N^2 with K_A = A A^T and K_B = B B^T, (N, N). Cheaper where
  the batch is smaller than the dimension: 8 n N D operations on a rank with n samples against 6 n D^2, and 2 N D
  numbers over the network against D^2.

Gradients are found in the forward pass and stored, 2 n D numbers; the backward pass multiplies them by a scalar and
needs no communication, because every rank knows the whole of c.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from prelude.pretrain.collectives import gather_rows, sum_over_ranks
from prelude.pretrain.distributed import world_size

# Columns of c held at once times D: 2**24 float32 are 64 MiB.
BLOCK_ELEMENTS = 2**24
# Below this share of the dimension, a batch is compared sample by sample: where the two ways cost the same.
SAMPLES_BELOW = 0.75


@dataclass(frozen=True)
class Terms:
    """Scalars, the same on every rank."""

    total: Tensor  # with gradient
    on_diagonal: Tensor  # sum_i (c_ii - 1)^2
    off_diagonal: Tensor  # sum_{i != j} c_ij^2, unweighted
    diagonal: Tensor  # mean of c_ii
    off_diagonal_rms: Tensor  # root of the mean of c_ij^2, i != j
    effective_dimensions: Tensor  # (sum_i c_ii)^2 / sum_ij c_ij^2


def barlow_loss(first: Tensor, second: Tensor, weight: float, counts: list[int]) -> Terms:
    """first, second: (n, D), this rank's rows of A and B; weight: of the off-diagonal; counts: each rank's n.

    The gradient is that of the sum over ranks of `total`, so that an engine that averages gradients over ranks
    gets that of one process with the joined batch.
    """
    by_samples = sum(counts) <= SAMPLES_BELOW * first.shape[1]
    total, on_diagonal, off_diagonal, trace = _BarlowLoss.apply(first, second, weight, counts, by_samples)
    num_columns = first.shape[1]
    squares = off_diagonal + on_diagonal + 2 * trace - num_columns  # sum_ij c_ij^2, as (c - 1)^2 = c^2 - 2 c + 1
    return Terms(
        total,
        on_diagonal,
        off_diagonal,
        diagonal=trace / num_columns,
        off_diagonal_rms=(off_diagonal.clamp(min=0) / (num_columns * (num_columns - 1))).sqrt(),
        effective_dimensions=trace.square() / squares.clamp(min=torch.finfo(squares.dtype).tiny),
    )


class _BarlowLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, first: Tensor, second: Tensor, weight: float, counts: list[int], by_samples: bool):
        way = _over_samples if by_samples else _over_columns
        on_diagonal, off_diagonal, trace, first_grad, second_grad = way(first, second, weight, counts)
        ctx.save_for_backward(first_grad, second_grad)
        ctx.mark_non_differentiable(on_diagonal, off_diagonal, trace)
        return on_diagonal + weight * off_diagonal, on_diagonal, off_diagonal, trace

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        first_grad, second_grad = ctx.saved_tensors
        scale = grad * world_size()  # every rank's loss depends on this rank's rows, and alike
        return scale * first_grad, scale * second_grad, None, None, None


def _over_columns(first: Tensor, second: Tensor, weight: float, counts: list[int]):
    """(on-diagonal, off-diagonal, trace of c, gradients of the total by first and second), by blocks of columns."""
    num_samples, num_columns = sum(counts), first.shape[1]
    on_diagonal, off_diagonal, trace = first.new_zeros(3).unbind()
    first_grad, second_grad = torch.zeros_like(first), torch.empty_like(second)
    width = max(BLOCK_ELEMENTS // num_columns, 1)
    for start in range(0, num_columns, width):
        columns = slice(start, start + width)
        c = sum_over_ranks(first.T @ second[:, columns]) / num_samples  # (D, width)
        diagonal = c[columns].diagonal().clone()
        on_diagonal = on_diagonal + (diagonal - 1).square().sum()
        off_diagonal = off_diagonal + c.square().sum() - diagonal.square().sum()
        trace = trace + diagonal.sum()
        slope = c.mul_(2 * weight / num_samples)  # of the total by what is summed into c
        slope[columns].diagonal().copy_(2 * (diagonal - 1) / num_samples)
        first_grad.addmm_(second[:, columns], slope.T)
        torch.mm(first, slope, out=second_grad[:, columns])
    return on_diagonal, off_diagonal, trace, first_grad, second_grad


def _over_samples(first: Tensor, second: Tensor, weight: float, counts: list[int]):
    """The same from the products of samples."""
    num_samples = sum(counts)
    all_first, all_second = gather_rows(first, counts), gather_rows(second, counts)  # (W * most, D), zeros at the end
    first_products, second_products = first @ all_first.T, second @ all_second.T  # (n, W * most)
    # In float64: the off-diagonal part is the difference of two sums that may be much larger.
    squares = (first_products.double() * second_products.double()).sum() / num_samples**2
    sums = sum_over_ranks(torch.cat([squares[None], (first.double() * second.double()).sum(0) / num_samples]))
    squares, diagonal = sums[0], sums[1:]  # sum_ij c_ij^2, and c_ii (D,)
    on_diagonal = (diagonal - 1).square().sum().to(first.dtype)
    off_diagonal = (squares - diagonal.square().sum()).to(first.dtype)
    own = (2 * (diagonal - 1) - 2 * weight * diagonal).to(first.dtype) / num_samples  # (D,)
    scale = 2 * weight / num_samples**2
    first_grad = torch.addmm(own * second, second_products, all_first, alpha=scale)
    second_grad = torch.addmm(own * first, first_products, all_second, alpha=scale)
    return on_diagonal, off_diagonal, diagonal.sum().to(first.dtype), first_grad, second_grad
