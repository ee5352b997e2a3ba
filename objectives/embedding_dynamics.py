"""Two regularisers that take unit embeddings for particles on a sphere, after "An Embedding-Dynamic Approach to
Self-supervised Learning" (MSBReg), which other objectives of several views can switch on.

With q the embeddings of V views of N images over all ranks, each of length 1, D wide:

    singular values = D * |Q^T Q / (V N) - I / D|^2 = D * sum_k (s_k^2 / (V N))^2 - 1       Q: (V N, D)
    brownian        = mean of q . g                   g: a random direction of the image, the same for its views

- Singular values are those of the global batch: 0 where all are equal, D - 1 where every row is the same line.
- Brownian motion needs no other sample. A direction is a function of the sample's seed alone, which changes with every
  step: the same at any number of ranks, however they share the batch, and after a resume.
- The gradient of the first is found in the forward pass, over the products of columns or of samples, whichever are
  fewer, so that no D x D matrix is kept. It is that of the sum over ranks of the loss.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from prelude.objectives import cross_correlation
from prelude.pretrain.collectives import all_reduce, gather_rows, sum_over_ranks
from prelude.pretrain.distributed import world_size
from prelude.pretrain.draws import normal

KICK_STREAM = 141  # of pretrain.draws


def unit(rows: Tensor) -> Tensor:
    """Each row (..., D) at length 1."""
    return F.normalize(rows, dim=-1, eps=1e-12)


def kicks(seeds: Tensor, width: int) -> Tensor:
    """A random direction for each sample: (B,) int64 seeds to (B, D) float32 of length 1, uniform on the sphere."""
    return unit(normal(seeds, width, KICK_STREAM))


def brownian(rows: Tensor, directions: Tensor, counts: list[int]) -> Tensor:
    """Mean cosine to the image's direction, with gradient, the same on every rank.

    rows: (V, n, D) of length 1, this rank's. directions: (n, D). counts: each rank's n.
    """
    return all_reduce((rows * directions.to(rows.dtype)).sum()) / (len(rows) * sum(counts))


def singular_values(rows: Tensor, counts: list[int]) -> Tensor:
    """How unequal the singular values of all embeddings are, a scalar with gradient, the same on every rank.

    rows: (V, n, D) of length 1, this rank's. counts: each rank's n.
    """
    num_views, width = len(rows), rows.shape[-1]
    of_ranks = [num_views * count for count in counts]
    by_samples = sum(of_ranks) <= cross_correlation.SAMPLES_BELOW * width
    return _SingularValues.apply(rows.flatten(0, 1), of_ranks, by_samples)


class _SingularValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, counts: list[int], by_samples: bool) -> Tensor:
        squares, grad = _over_samples(rows, counts) if by_samples else _over_columns(rows)
        scale = rows.shape[1] / sum(counts) ** 2
        ctx.save_for_backward(grad.mul_(4 * scale))
        return scale * squares - 1

    @staticmethod
    def backward(ctx, grad: Tensor):
        (stored,) = ctx.saved_tensors
        return grad * world_size() * stored, None, None  # every rank's loss depends on these rows, and alike


def _over_columns(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(|Q^T Q|^2, a quarter of its gradient by this rank's rows), by blocks of columns."""
    squares, grad = rows.new_zeros(()), torch.empty_like(rows)
    block = max(cross_correlation.BLOCK_ELEMENTS // rows.shape[1], 1)
    for start in range(0, rows.shape[1], block):
        columns = slice(start, start + block)
        products = sum_over_ranks(rows.T @ rows[:, columns])  # (D, block)
        squares = squares + products.square().sum()
        torch.mm(rows, products, out=grad[:, columns])
    return squares, grad


def _over_samples(rows: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """The same from the products of samples."""
    everyone = gather_rows(rows, counts)  # (W * most, D), zeros at the end
    products = rows @ everyone.T
    return sum_over_ranks(products.square().sum()), products @ everyone
