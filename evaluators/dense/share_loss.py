"""A loss for `evaluators.frozen.convex`, of samples that belong to several classes at once."""

import torch
from torch import Tensor


class ShareLoss:
    """Mean cross-entropy of N samples that belong to several classes in shares (N, C), such as a patch whose pixels do.

    The shares of a sample sum to 1 or less, and what is missing counts for nothing.
    """

    def __init__(self, shares: Tensor):
        self.shares, self.num_outputs, self.num_problems = shares, shares.shape[1], 1
        self.counted = shares.sum(1)  # (N,)
        self.total = self.counted.sum().item()

    def __len__(self) -> int:
        return len(self.shares)

    def curvature(self) -> Tensor:
        """(1,)"""
        return torch.full((1,), 0.5 * len(self) / max(self.total, 1e-30), device=self.shares.device)

    def solvable(self) -> Tensor:
        """(1,)"""
        return torch.ones(1, dtype=torch.bool)

    def take(self, rows: Tensor) -> "ShareLoss":
        return ShareLoss(self.shares[rows])

    def __call__(self, logits: Tensor, places: slice, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wanted, counted = self.shares[places][:, None], self.counted[places][:, None, None] / self.total
        loss = -(wanted * logits.log_softmax(2)).sum((0, 2)) / self.total
        residual = logits.softmax(2)
        felt = ((residual - residual.square()) * counted).sum(0)
        return residual * counted - wanted / self.total, loss, felt
