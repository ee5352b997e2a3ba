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
from PIL import Image
from torch import Tensor, nn

from prelude.data.batch import Batch, Photometric, View, ViewPlan
from prelude.objectives.cross_correlation import barlow_loss
from prelude.objectives.options import BarlowTwinsOptions
from prelude.objectives.pictures import sheet
from prelude.objectives.projector import projector
from prelude.pretrain.batch_norm import normalise_columns, synchronise
from prelude.pretrain.collectives import row_counts
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import pooled_width
from prelude.pretrain.feature_health import TRIVIAL_LOSS, feature_health, rank_share
from prelude.pretrain.images import denormalise
from prelude.pretrain.images import images as device_images
from prelude.pretrain.objective import Loss, Objective
from prelude.pretrain.photometric import refuse_colours
from prelude.pretrain.schedules import Progress

_EPSILON = 1e-5  # added to the variance of a dimension
_DEAD = 1e-3  # a dimension whose standard deviation over the batch is below this says nothing
_NUM_PICTURES = 8


class BarlowTwins(Objective):
    Options = BarlowTwinsOptions
    accumulates = False
    remedies = {
        "few_dimensions": "raise objective.off_diagonal_weight, or lower optimizer.lr",
        "trivial_loss": "weaken the augmentations (objective.crop_scale, objective.view_1), or lower optimizer.lr",
    }

    def __init__(self, encoder: nn.Module, options: BarlowTwinsOptions, *, image_size, mean, std):
        super().__init__(encoder, options, image_size=image_size, mean=mean, std=std)
        views = tuple(
            View(
                size=image_size,
                scale=options.crop_scale,
                interpolation="bicubic",
                flip=options.flip,
                photometric=photometric,
            )
            for photometric in _photometric(options).values()
        )
        self.views = ViewPlan(views=views, mean=mean, std=std)
        self.projector = projector(pooled_width(encoder), options.projector)
        synchronise(self)

    @classmethod
    def check(cls, options: BarlowTwinsOptions, encoder: EncoderConfig) -> None:
        super().check(options, encoder)
        refuse_colours(encoder.in_chans, _photometric(options))

    def forward(self, batch: Batch, progress: Progress) -> Loss:
        counts = row_counts(len(batch))
        pooled = [self.encoder(view) for view in device_images(batch, self.views)]  # each (n, D_encoder)
        loss = self.loss(*map(self.projector, pooled), counts)
        return Loss(loss.total, loss.parts | feature_health(pooled[0].detach()))

    def compiled_parts(self) -> list[nn.Module]:
        return [self.encoder, self.projector]

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
            dtype = torch.promote_types(first.dtype, torch.float32)
            both = torch.cat([first, second], dim=1).to(dtype)  # (n, 2 D): one message for both views
            terms = barlow_loss(
                *normalise_columns(both, _EPSILON).chunk(2, dim=1), self.options.off_diagonal_weight, counts
            )
            spread = both.detach().std(dim=0)  # over this rank's samples
        return Loss(
            terms.total * self.options.loss_scale,
            {
                "on_diagonal": terms.on_diagonal,
                "off_diagonal": terms.off_diagonal,
                "diagonal": terms.diagonal,
                "off_diagonal_rms": terms.off_diagonal_rms,
                "effective_dimensions": terms.effective_dimensions,
                "embedding_rank_share": rank_share(terms.effective_dimensions, sum(counts), first.shape[1]),
                "embedding_std": spread.mean(),
                "dead_dimensions": (spread < _DEAD).to(dtype).mean(),
                TRIVIAL_LOSS: terms.total.new_full((), self._trivial_loss(sum(counts), first.shape[1])),
            },
        )

    def _trivial_loss(self, count: int, width: int) -> float:
        by_chance = (1 + self.options.off_diagonal_weight * (width - 1)) / count
        return width * (1 + by_chance) * self.options.loss_scale

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Image.Image]:
        """One row an image: its two views, as the encoder sees them but for the normalisation."""
        views = [denormalise(view[:_NUM_PICTURES], self.views) for view in device_images(batch, self.views)]
        return {"views": sheet(torch.stack(views, dim=1))}


def _photometric(options: BarlowTwinsOptions) -> dict[str, Photometric]:
    """What happens to the colours of each view, by its key."""
    views = {"objective.view_1": options.view_1, "objective.view_2": options.view_2}
    return {key: Photometric(**colours.model_dump()) for key, colours in views.items()}
