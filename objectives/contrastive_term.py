"""VICReg (arXiv 2105.04906) as a second term beside a joint-embedding prediction.

What is predicted and what was to be predicted go through one projector, or stay as they are where it has no layers.
`ContrastiveTerm`, of one vector an image on each side:

    loss = 25 * invariance + 25 * variance + covariance         see `objectives/vicreg.py`

`BlockTerm`, C-JEPA's, of the mean prediction P and mean target T of each of M blocks, the regularisers of P alone:

    loss = 25 * mean of (P - T)^2 + mean over blocks of (50 * v(P_m) + 2 * c(P_m))

Means, variances, covariances and the projector's batch norm are those of the global batch: loss and gradient at any
number of ranks are those of one process with the joined batch.
"""

import torch
from torch import Tensor, nn

from prelude.objectives.covariance import spread
from prelude.objectives.projector import projector
from prelude.objectives.several_views import full_precision
from prelude.pretrain.batch_norm import synchronise
from prelude.pretrain.collectives import all_reduce
from prelude.pretrain.distributed import world_size

_INVARIANCE, _VARIANCE, _COVARIANCE = 25.0, 25.0, 1.0


class ContrastiveTerm(nn.Module):
    def __init__(self, width: int, widths: list[int]):
        super().__init__()
        self.projector = projector(width, widths) if widths else nn.Identity()
        synchronise(self)

    def forward(self, predicted: Tensor, target: Tensor) -> Tensor:
        """predicted, target: (n, D), this rank's rows, as many on every rank. Returns the global scalar."""
        first, second = self.projector(predicted), self.projector(target)
        counts = [len(first)] * world_size()
        with torch.autocast(first.device.type, enabled=False):
            first, second = full_precision(first, second)
            invariance = all_reduce((first - second).square().mean()) / world_size()
            one, other = spread(first, counts), spread(second, counts)
            variance, covariance = one.variance + other.variance, one.covariance + other.covariance
            return _INVARIANCE * invariance + _VARIANCE * variance / 2 + _COVARIANCE * covariance


class BlockTerm(ContrastiveTerm):
    def forward(self, predicted: Tensor, target: Tensor) -> Tensor:
        """predicted, target: (n, M, D), this rank's rows, as many on every rank. Returns the global scalar."""
        counts = [len(predicted)] * world_size()
        first, second = (
            self.projector(side.flatten(0, 1)).unflatten(0, side.shape[:2]) for side in (predicted, target)
        )
        with torch.autocast(first.device.type, enabled=False):
            first, second = full_precision(first, second)
            invariance = all_reduce((first - second).square().mean()) / world_size()
            blocks = [spread(block, counts) for block in first.unbind(1)]
            variance, covariance = (
                torch.stack([getattr(block, name) for block in blocks]).mean() for name in ("variance", "covariance")
            )
            return _INVARIANCE * invariance + 2 * (_VARIANCE * variance + _COVARIANCE * covariance)
