"""VICReg (Bardes, Ponce and LeCun, arXiv 2105.04906) as a second term beside a joint-embedding prediction.

What is predicted and what was to be predicted, one vector an image each, go through one projector:

    loss = 25 * invariance + 25 * variance + covariance
    invariance = mean square of z - z'
    variance   = mean over dimensions of max(0, 1 - standard deviation), of both, halved
    covariance = sum of squared off-diagonal covariances / D, of both

Means, variances, covariances and the projector's batch norm are those of the global batch: loss and gradient at any
number of ranks are those of one process with the joined batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prelude.objectives.projector import projector
from prelude.pretrain.batch_norm import synchronise
from prelude.pretrain.collectives import all_reduce
from prelude.pretrain.distributed import world_size

_INVARIANCE, _VARIANCE, _COVARIANCE = 25.0, 25.0, 1.0
_EPSILON = 1e-4  # added to a variance before its root


class VICReg(nn.Module):
    def __init__(self, width: int, widths: list[int]):
        super().__init__()
        self.projector = projector(width, widths)
        synchronise(self)

    def forward(self, predicted: Tensor, target: Tensor) -> Tensor:
        """predicted, target: (n, D), this rank's rows, as many on every rank. Returns the global scalar."""
        first, second = self.projector(predicted), self.projector(target)
        with torch.autocast(first.device.type, enabled=False):
            first, second = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (first, second))
            invariance = all_reduce((first - second).square().mean()) / world_size()
            spread = [self._spread(z) for z in (first, second)]
            variance, covariance = (sum(terms) for terms in zip(*spread, strict=True))
            return _INVARIANCE * invariance + _VARIANCE * variance / 2 + _COVARIANCE * covariance

    @staticmethod
    def _spread(z: Tensor) -> tuple[Tensor, Tensor]:
        """(variance term, covariance term) of one side. z: (n, D)."""
        count, width = len(z) * world_size(), z.shape[1]
        centred = z - all_reduce(z.sum(0)) / count
        covariance = all_reduce(centred.T @ centred) / (count - 1)  # (D, D)
        variance = covariance.diagonal()
        hinge = F.relu(1 - (variance + _EPSILON).sqrt()).mean()
        return hinge, (covariance.square().sum() - variance.square().sum()) / width
