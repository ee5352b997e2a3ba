"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of a batch on the device.

    mixup:   x_i <- s x_i + (1 - s) x_j                       s ~ Beta(a, a)
    CutMix:  a box of x_j into x_i, its sides sqrt(1 - s) of the image's, its centre uniform, cut off at the border;
             s is then the share of x_i that is left
    targets: y_i <- s y_i + (1 - s) y_j

- With `cell`, what comes from x_j is not a box but cells of a grid, of whose n cells ceil(s n) stay: MaskMix (MixPro,
  arXiv 2304.12043).
- What happens to a sample is a function of its seed and of its partner's image; where both methods are on, CutMix is
  chosen for `cutmix_share` of the images.
- Partners are neighbours in the global batch (`collectives.partners`), wherever they lie: neither the number of
  ranks nor accumulation changes a mixed image.
- s is drawn for each sample. Official code draws it for each device's share of the batch, so that its value depends
  on the number of devices.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from prelude.pretrain.collectives import partners
from prelude.pretrain.draws import uniform

MIX_STREAM, CELL_STREAM = 181, 182  # of pretrain.draws
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


@dataclass(frozen=True)
class Mixed:
    """A batch, and what it was mixed from."""

    images: Tensor  # (B, C, H, W)
    targets: Tensor  # (B, C) own, as they were given
    partners: Tensor  # (B, C) of the other image
    share: Tensor  # (B,) of the own image, by area
    own: Tensor  # (B, H, W) of each pixel, how much is the own image's

    def mixed_targets(self, share: Tensor | None = None) -> Tensor:
        """share: (B,) of the own image; None: by area."""
        share = self.share if share is None else share
        return torch.lerp(self.partners, self.targets, share[:, None])


class Mixing(nn.Module):
    """mixup, cutmix: alpha of each one's Beta distribution; 0 switches it off. At least one is on. cutmix_share: how
    often it is CutMix where both are. cell: pixels of a side of MaskMix's cells, which then take the place of boxes."""

    def __init__(self, mixup: float, cutmix: float, cutmix_share: float = 0.5, cell: int | None = None):
        super().__init__()
        self.cutmix_share, self.cell = cutmix_share, cell
        self.mixup = BetaQuantile(mixup) if mixup else None
        self.cutmix = BetaQuantile(cutmix) if cutmix else None

    # No `forward`: ZeRO stage 3 says on the console of a module's outputs that it cannot look into them.
    @torch.no_grad()
    def mixed(self, images: Tensor, targets: Tensor, seeds: Tensor) -> Mixed:
        """images: (B, C, H, W) float32. targets: (B, K) float32. seeds: (B,). Collective."""
        height, width = images.shape[-2:]
        u = uniform(seeds, 4, MIX_STREAM).T  # (4, B): which, s, centre of the box
        cuts = self.cuts(u[0])
        share = torch.zeros_like(u[1])
        if self.mixup is not None:
            share = torch.where(cuts, share, self.mixup(u[1]))
        own = share[:, None, None].expand(-1, height, width)
        if self.cutmix is not None:
            stays = self._stays(self.cutmix(u[1]), u, seeds, height, width).float()
            own = torch.where(cuts[:, None, None], stays, own)
            share = torch.where(cuts, stays.mean((1, 2)), share)
        mixed = torch.lerp(partners(images), images, own[:, None])
        return Mixed(mixed, targets, partners(targets), share, own)

    def _stays(self, share: Tensor, u: Tensor, seeds: Tensor, height: int, width: int) -> Tensor:
        """(B, H, W) bool: True where the own image stays."""
        if self.cell is None:
            return ~cut_boxes(share, u[2], u[3], height, width)
        return (
            kept_cells(share, seeds, height // self.cell, width // self.cell)
            .repeat_interleave(self.cell, 1)
            .repeat_interleave(self.cell, 2)
        )

    def cuts(self, which: Tensor) -> Tensor:
        """(B,) bool: CutMix, and not mixup."""
        if self.mixup is None or self.cutmix is None:
            return torch.full_like(which, self.mixup is None, dtype=torch.bool)
        return which < self.cutmix_share


def kept_cells(share: Tensor, seeds: Tensor, rows: int, columns: int) -> Tensor:
    """(B, rows, columns) bool: True in ceil(share x cells) cells of each sample, drawn without replacement."""
    count = (share * rows * columns).ceil()
    order = uniform(seeds, rows * columns, CELL_STREAM).argsort(1).argsort(1)  # ranks of draws: (B, cells)
    return (order < count[:, None]).unflatten(1, (rows, columns))


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
