"""The samples that are nearest to others by the cosine of their features: k-NN, retrieval and pictures ask here.

- Exact: every query is compared with every sample of the bank.
- Features are read in pieces, as `evaluators.frozen.pieces` has them; nothing of their size is kept beside them.
- Centring takes the bank's mean from bank and queries alike. It is the same bank for every k and temperature, so that
  one search answers for all of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from prelude.evaluators.frozen.pieces import pieces, resident

QUERIES = 1024  # searched at once


class Neighbours:
    """A bank of samples, ready to be searched."""

    def __init__(
        self,
        values: Tensor,
        labels: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        centred: bool = True,
        device: torch.device | str = "cpu",
    ):
        """values: (N, D), of which `rows` are taken (default: all). labels: (N,) int64, what a neighbour is told as;
        by default its place among the samples that are taken."""
        self.device = torch.device(device)
        self.values = resident(values, self.device)
        self.rows = None if rows is None else rows.to(self.values.device)
        count = len(values) if rows is None else len(rows)
        if labels is None:
            labels = torch.arange(count)
        elif rows is not None:
            labels = labels[rows.to(labels.device)]
        self.labels = labels.to(self.device)
        self.mean = torch.zeros(values.shape[1], dtype=torch.float64, device=self.device)
        if centred:
            for _, piece in pieces(self.values, self.rows, values.shape[1]):
                self.mean += piece.to(self.device).double().sum(0) / count
        self.mean = self.mean.float()

    def __len__(self) -> int:
        return len(self.labels)

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(q, k) cosines, largest first, and the labels of these neighbours; fewer than k where there are fewer."""
        queries = self._normalised(queries)
        similar = queries.new_zeros(len(queries), 0)
        labels = self.labels.new_zeros(len(queries), 0)
        for places, cosines in self._in_pieces(queries):
            # The nearest of all are among the nearest so far and those of this piece.
            together = torch.cat([similar, cosines], 1)
            found = torch.cat([labels, self.labels[places].expand(len(queries), -1)], 1)
            similar, order = together.topk(min(k, together.shape[1]), dim=1)
            labels = found.gather(1, order)
        return similar, labels

    def cosines(self, queries: Tensor) -> Tensor:
        """(q, N) with every sample of the bank, in its order."""
        return torch.cat([cosines for _, cosines in self._in_pieces(self._normalised(queries))], 1)

    def _in_pieces(self, queries: Tensor):
        for places, piece in pieces(self.values, self.rows, max(len(queries), self.values.shape[1])):
            yield places, queries @ self._normalised(piece).T

    def _normalised(self, values: Tensor) -> Tensor:
        return F.normalize(values.to(self.device) - self.mean, dim=1)
