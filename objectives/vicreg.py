"""VICReg (Bardes, Ponce and LeCun, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised
Learning", arXiv 2105.04906).

Two views of every image go through the same encoder and projector ("expander"). Their embeddings are drawn together,
while each view's dimensions are kept at a standard deviation of 1 or more over the batch, and uncorrelated:

    invariance = mean over N * D of (z - z')^2
    variance   = (v(z) + v(z')) / 2       v(z) = mean over dimensions of max(0, 1 - standard deviation)
    covariance = c(z) + c(z')             c(z) = sum of squared off-diagonal covariances / D
    loss       = 25 * invariance + 25 * variance + covariance

- The batch is the global one: loss and gradient at any number of ranks are those of one process with the joined batch.
- The views are two forward passes: every batch norm sees one view at a time, as in the official code.
- Embeddings are not normalised. Statistics and loss are float32 at least, under any autocast.
- The variance is halved and the covariance is not, as in the official code; the paper halves neither.
"""

import torch
from torch import Tensor

from prelude.objectives.covariance import spread
from prelude.objectives.options import VICRegOptions
from prelude.objectives.several_views import TwoViews, attained, embedding_health, full_precision, wide_share
from prelude.pretrain.collectives import all_reduce
from prelude.pretrain.feature_health import TRIVIAL_LOSS, rank_share
from prelude.pretrain.objective import Loss


class VICReg(TwoViews):
    Options = VICRegOptions
    projector_bias = "hidden"
    remedies = {
        "same_features": "raise objective.variance_weight, or lower optimizer.lr",
        "few_dimensions": "raise objective.covariance_weight, or lower optimizer.lr",
        "redundant_embedding": "raise objective.covariance_weight and objective.variance_weight",
        "trivial_loss": "weaken the augmentations (objective.crop_scale, objective.view_1), or lower optimizer.lr",
    }

    def loss(self, first: Tensor, second: Tensor, counts: list[int]) -> Loss:
        """first, second: (n, D) embeddings of this rank's samples; counts: each rank's n.

        The parts are the three terms without their weights, and what says whether the embedding collapses:
        `effective_dimensions` counts the different things that view 1's dimensions say, from 1 to D,
        `embedding_rank_share` puts that on a scale from 0 to what is attainable with this batch, less where hardly
        anything varies (see `wide_share`); `embedding_std` and `dead_dimensions` are of both views. `trivial_loss`: see
        `_trivial_loss`.
        """
        o, count, width = self.options, sum(counts), first.shape[1]
        with torch.autocast(first.device.type, enabled=False):
            first, second = full_precision(first, second)
            invariance = all_reduce((first - second).square().sum()) / (count * width)
            one, other = spread(first, counts), spread(second, counts)
            variance, covariance = (one.variance + other.variance) / 2, one.covariance + other.covariance
            total = o.invariance_weight * invariance + o.variance_weight * variance + o.covariance_weight * covariance
            parts = {
                "invariance": invariance,
                "variance": variance,
                "covariance": covariance,
                "effective_dimensions": one.effective_dimensions,
                TRIVIAL_LOSS: total.new_full((), self._trivial_loss(count, width)),
            }
            parts |= attained(wide_share(rank_share(one.effective_dimensions, count, width), one.std), count)
            health = embedding_health(torch.cat([first, second], dim=1))
            return Loss(total, {n: p.detach() for n, p in parts.items()} | health)

    def _trivial_loss(self, count: int, width: int) -> float:
        """Of views that have nothing in common, embedded in independent dimensions of the standard deviation s that
        costs least: invariance 2 s^2, variance 1 - s, and the covariances that N samples have by chance, of the square
        s^4 / (N - 1). Constant embeddings (s = 0) cost the whole hinge."""
        o = self.options
        by_chance = 2 * o.covariance_weight * (width - 1) / (count - 1)
        tried = (step / 1000 for step in range(1001))
        return min(o.invariance_weight * 2 * s**2 + o.variance_weight * (1 - s) + by_chance * s**4 for s in tried)
