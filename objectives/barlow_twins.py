"""Barlow Twins (Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", arXiv 2103.03230).

Two views of every image go through the same encoder and projector. Each dimension of each view's embedding is
standardised over the batch, and the correlations between the two views are pushed towards the identity:

    c    = A^T B / N                                A, B: (N, D), columns of mean 0 and variance 1
    loss = sum_i (c_ii - 1)^2 + weight * sum_{i != j} c_ij^2

- The batch is the global one. The loss and its gradient at any number of ranks are those of one process with the
  joined batch; the official gradient is smaller by the number of ranks.
- The views are two forward passes: every batch norm sees one view at a time, as in the official code.
- Standardisation, correlations and loss are float32 at least, under any autocast.
- No D x D matrix is kept when D is large: see `objectives/cross_correlation.py`.
"""

import torch
from torch import Tensor

from prelude.objectives.cross_correlation import barlow_loss
from prelude.objectives.options import BarlowTwinsOptions
from prelude.objectives.several_views import TwoViews, attained, embedding_health, full_precision
from prelude.pretrain.batch_norm import normalise_columns
from prelude.pretrain.feature_health import TRIVIAL_LOSS, rank_share
from prelude.pretrain.objective import Loss

_EPSILON = 1e-5  # added to the variance of a dimension


class BarlowTwins(TwoViews):
    Options = BarlowTwinsOptions
    remedies = {
        "few_dimensions": "raise objective.off_diagonal_weight, or lower optimizer.lr",
        "trivial_loss": "weaken the augmentations (objective.crop_scale, objective.view_1), or lower optimizer.lr",
    }

    def loss(self, first: Tensor, second: Tensor, counts: list[int]) -> Loss:
        """first, second: (n, D) embeddings of this rank's samples; counts: each rank's n.

        Besides the two terms (`off_diagonal` unweighted), the parts say whether the embedding collapses:
        `diagonal` rises to 1 as the views agree; `off_diagonal_rms` is 1 when all dimensions say the same;
        `effective_dimensions` counts how many different things they say, from 1 to D, and `embedding_rank_share` puts
        that on a scale from 0 to what is attainable with this batch; `embedding_std` and `dead_dimensions` look at the
        embedding before it is standardised. `trivial_loss` is that of views that have nothing in common, whose
        correlations are 0 but for the chance of N samples: D + (D + weight * D * (D - 1)) / N.
        """
        with torch.autocast(first.device.type, enabled=False):
            (both,) = full_precision(torch.cat([first, second], dim=1))  # (n, 2 D): one message for both views
            terms = barlow_loss(
                *normalise_columns(both, _EPSILON).chunk(2, dim=1), self.options.off_diagonal_weight, counts
            )
            return Loss(
                terms.total * self.options.loss_scale,
                {
                    "on_diagonal": terms.on_diagonal,
                    "off_diagonal": terms.off_diagonal,
                    "diagonal": terms.diagonal,
                    "off_diagonal_rms": terms.off_diagonal_rms,
                    "effective_dimensions": terms.effective_dimensions,
                    TRIVIAL_LOSS: terms.total.new_full((), self._trivial_loss(sum(counts), first.shape[1])),
                }
                | attained(rank_share(terms.effective_dimensions, sum(counts), first.shape[1]), sum(counts))
                | embedding_health(both),
            )

    def _trivial_loss(self, count: int, width: int) -> float:
        by_chance = (1 + self.options.off_diagonal_weight * (width - 1)) / count
        return width * (1 + by_chance) * self.options.loss_scale
