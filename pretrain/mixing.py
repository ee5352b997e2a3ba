"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of a batch on the device.

    mixup:   x_i <- s x_i + (1 - s) x_j                       s ~ Beta(a, a)
    CutMix:  a box of x_j into x_i, its sides sqrt(1 - s) of the image's, its centre uniform, cut off at the border;
             s is then the share of x_i that is left
    targets: y_i <- s y_i + (1 - s) y_j

- What happens to a sample is a function of its seed and of its partner's image; where both methods are on, each is
  chosen half of the time.
- Partners are neighbours in the global batch (`collectives.partners`), wherever they lie: neither the number of
  ranks nor accumulation changes a mixed image.
- s is drawn for each sample. Official code draws it for each device's share of the batch, so that its value depends
  on the number of devices.
"""

import numpy as np
import torch
from torch import Tensor, nn

from prelude.pretrain.collectives import partners
from prelude.pretrain.draws import uniform

MIX_STREAM = 181  # of pretrain.draws
_KNOTS = 1025


class BetaQuantile(nn.Module):
    """The quantile function of Beta(alpha, alpha), on any device.

    With t = x ** alpha, the density of t below x = 1/2 is (1 - t ** (1 / alpha)) ** (alpha - 1), which is bounded;
    its integral is tabulated and inverted, and the other half is symmetric.
    """

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = alpha
        end = 0.5**alpha
        t = np.linspace(0.0, end, 16 * _KNOTS)
        middle = (t[1:] + t[:-1]) / 2
        integral = np.concatenate([[0.0], np.cumsum((1 - middle ** (1 / alpha)) ** (alpha - 1))])
        table = np.interp(np.linspace(0, 1, _KNOTS), integral / integral[-1], t)
        self.register_buffer("table", torch.from_numpy(table).float(), persistent=False)

    def forward(self, share: Tensor) -> Tensor:
        """share: in [0, 1). Returns the same shape, float32 in [0, 1]."""
        place = torch.minimum(share, 1 - share) * 2 * (_KNOTS - 1)
        below = place.long().clamp(max=_KNOTS - 2)
        t = torch.lerp(self.table[below], self.table[below + 1], place - below)
        x = t.clamp(min=0) ** (1 / self.alpha)
        return torch.where(share < 0.5, x, 1 - x)


class Mixing(nn.Module):
    """mixup, cutmix: alpha of each one's Beta distribution; 0 switches it off. At least one is on."""

    def __init__(self, mixup: float, cutmix: float):
        super().__init__()
        self.mixup = BetaQuantile(mixup) if mixup else None
        self.cutmix = BetaQuantile(cutmix) if cutmix else None

    @torch.no_grad()
    def forward(self, images: Tensor, targets: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """images: (B, 3, H, W) float32. targets: (B, C) float32. seeds: (B,). Collective; returns both mixed."""
        height, width = images.shape[-2:]
        u = uniform(seeds, 4, MIX_STREAM).T  # (4, B): which, s, centre of the box
        cuts = self.cuts(u[0])
        share = torch.zeros_like(u[1])
        if self.mixup is not None:
            share = torch.where(cuts, share, self.mixup(u[1]))
        own = share[:, None, None].expand(-1, height, width)  # (B, H, W) how much of each pixel stays
        if self.cutmix is not None:
            outside = ~cut_boxes(self.cutmix(u[1]), u[2], u[3], height, width)
            own = torch.where(cuts[:, None, None], outside.float(), own)
            share = torch.where(cuts, outside.float().mean((1, 2)), share)
        mixed = torch.lerp(partners(images), images, own[:, None])
        return mixed, torch.lerp(partners(targets), targets, share[:, None])

    def cuts(self, which: Tensor) -> Tensor:
        """(B,) bool: CutMix, and not mixup."""
        if self.mixup is None or self.cutmix is None:
            return torch.full_like(which, self.mixup is None, dtype=torch.bool)
        return which < 0.5


def cut_boxes(share: Tensor, row: Tensor, column: Tensor, height: int, width: int) -> Tensor:
    """(B, H, W) bool: True inside each sample's box. share: (B,) of the image outside of the whole box; row, column:
    (B,) in [0, 1), the pixel that holds the box's centre."""
    side = (1 - share).clamp(min=0).sqrt()
    inside = []
    for place, length in ((row, height), (column, width)):
        extent, centre = (side * length).long(), (place * length).long()
        pixel = torch.arange(length, device=share.device)
        begin = (centre - extent // 2)[:, None]
        inside.append((pixel >= begin) & (pixel < begin + extent[:, None]))  # (B, length)
    return inside[0][:, :, None] & inside[1][:, None, :]
