"""What objectives share that compare the embeddings of several views of an image.

    z_v = projector(encoder(view v of every image))     (n, D), this rank's rows of the V views

- Views belong to the view plan: crops and flips are drawn in the loader, colours on the device, by the sample's seed.
- The batch is the global one: batch norm, in encoder and projector, is over all ranks, and a loss is told how many rows
  each rank has, so that its statistics are too. Micro-batches would be another loss, and are refused.
- With `pair_by` the second view, and every second one of more, is of another image of the same group.
- `TwoViews` makes a forward pass of each view, so that every batch norm sees one view at a time.
- MSBReg's two terms (`objectives/embedding_dynamics.py`) can stand beside any of these losses.
- Embeddings reach the loss in float32 at least, under any autocast.
"""

from abc import abstractmethod
from dataclasses import replace

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from prelude.data.batch import Batch, Photometric, View, ViewPlan
from prelude.objectives.embedding_dynamics import brownian, kicks, singular_values, unit
from prelude.objectives.options import ColourOptions, SeveralViewsOptions, TwoViewsOptions
from prelude.objectives.pictures import sheet
from prelude.objectives.projector import projector
from prelude.pretrain.batch_norm import synchronise
from prelude.pretrain.collectives import row_counts
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import pooled_width
from prelude.pretrain.feature_health import FEWEST_RANKED, TRIVIAL_LOSS, feature_health
from prelude.pretrain.images import denormalise
from prelude.pretrain.images import images as device_images
from prelude.pretrain.objective import Loss, Objective
from prelude.pretrain.photometric import refuse_colours
from prelude.pretrain.schedules import Progress

_NARROW = 0.2  # embeddings that are to have a standard deviation of 1 and have less than this are shrinking
_DEAD = 1e-3  # a dimension whose standard deviation over the batch is below this says nothing
_NUM_PICTURES = 8


class SeveralViews(Objective):
    """Views, projector, what is compiled and what is shown."""

    accumulates = False
    projector_bias = "none"  # which of the projector's linear layers have one: `none`, `hidden` or `all`

    def __init__(self, encoder: nn.Module, options: SeveralViewsOptions, *, image_size, mean, std):
        super().__init__(encoder, options, image_size=image_size, mean=mean, std=std)
        views, group = self.planned_views(image_size), options.pair_by or ""
        views = tuple(replace(view, partner=bool(group) and number % 2 == 1) for number, view in enumerate(views))
        self.views = ViewPlan(views=views, mean=mean, std=std, group=group)
        self.projector = projector(pooled_width(encoder), options.projector, bias=self.projector_bias)
        synchronise(self)

    @classmethod
    def check(cls, options: SeveralViewsOptions, encoder: EncoderConfig) -> None:
        super().check(options, encoder)
        refuse_colours(encoder.in_chans, {key: photometric(c) for key, c in cls.colours(options).items()})

    @classmethod
    @abstractmethod
    def colours(cls, options: SeveralViewsOptions) -> dict[str, ColourOptions]:
        """The settings of colours, by their key in a config."""

    @abstractmethod
    def planned_views(self, image_size: tuple[int, int]) -> tuple[View, ...]: ...

    def regularised(self, total: Tensor, rows: Tensor, directions: Tensor, counts: list[int]) -> Loss:
        """`total` with the weighted terms of `embedding_dynamics`, and as parts what they are without their weights.

        rows: (V, n, D) embeddings of length 1; directions: (n, D) of length 1; counts: each rank's n.
        """
        o, parts = self.options, {}
        if o.singular_value_weight:
            parts["singular_values"] = singular_values(rows, counts)
            total = total + o.singular_value_weight * parts["singular_values"]
        if o.brownian_weight:
            parts["brownian"] = brownian(rows, directions, counts)
            total = total + o.brownian_weight * parts["brownian"]
        return Loss(total, {name: part.detach() for name, part in parts.items()})

    def with_dynamics(self, loss: Loss, embeddings: Tensor, batch: Batch, counts: list[int]) -> Loss:
        """A loss of this kind with MSBReg's terms beside it, where they are switched on. embeddings: (V, n, D).

        Views that have nothing in common have the singular values of V * N random directions.
        """
        o, width = self.options, embeddings.shape[-1]
        if not (o.singular_value_weight or o.brownian_weight):
            return loss
        with torch.autocast(embeddings.device.type, enabled=False):
            (rows,) = full_precision(embeddings)
            total, parts = self.regularised(loss.total, unit(rows), kicks(batch.seeds, width), counts)
        by_chance = o.singular_value_weight * (width - 1) / (len(embeddings) * sum(counts))
        return Loss(total, loss.parts | parts | {TRIVIAL_LOSS: loss.parts[TRIVIAL_LOSS] + by_chance})

    def compiled_parts(self) -> list[nn.Module]:
        return [self.encoder, self.projector]

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Image.Image]:
        """One row an image: its views before normalisation, small ones enlarged."""
        views = [denormalise(view[:_NUM_PICTURES], self.views) for view in device_images(batch, self.views)]
        size = views[0].shape[-2:]
        views = [view if view.shape[-2:] == size else F.interpolate(view, size, mode="nearest") for view in views]
        return {"views": sheet(torch.stack(views, dim=1))}


class TwoViews(SeveralViews):
    """Two views of the whole image size that differ in their colours, each passed through by itself."""

    @classmethod
    def colours(cls, options: TwoViewsOptions) -> dict[str, ColourOptions]:
        return {"objective.view_1": options.view_1, "objective.view_2": options.view_2}

    def planned_views(self, image_size: tuple[int, int]) -> tuple[View, ...]:
        o = self.options
        return tuple(coloured_view(image_size, o.crop_scale, o.flip, colours) for colours in self.colours(o).values())

    def forward(self, batch: Batch, progress: Progress) -> Loss:
        counts = row_counts(len(batch))
        pooled = [self.encoder(view) for view in device_images(batch, self.views)]  # each (n, D_encoder)
        embeddings = [self.projector(features) for features in pooled]  # each (n, D)
        loss = self.with_dynamics(self.loss(*embeddings, counts), torch.stack(embeddings), batch, counts)
        return Loss(loss.total, loss.parts | feature_health(pooled[0].detach()))

    @abstractmethod
    def loss(self, first: Tensor, second: Tensor, counts: list[int]) -> Loss:
        """first, second: (n, D) embeddings of this rank's samples; counts: each rank's n."""


def coloured_view(size: tuple[int, int], scale: tuple[float, float], flip: float, colours: ColourOptions) -> View:
    """A bicubic random crop with these colours."""
    return View(size=size, scale=scale, interpolation="bicubic", flip=flip, photometric=photometric(colours))


def photometric(colours: ColourOptions) -> Photometric:
    return Photometric(**colours.model_dump())


def full_precision(*embeddings: Tensor) -> tuple[Tensor, ...]:
    """In float32 at least."""
    return tuple(z.to(torch.promote_types(z.dtype, torch.float32)) for z in embeddings)


def attained(share: Tensor, count: int) -> dict[str, Tensor]:
    """`embedding_rank_share` of `count` embeddings; nothing where these are too few to differ in it."""
    return {"embedding_rank_share": share} if count >= FEWEST_RANKED else {}


def attained_by(embeddings: Tensor, std: Tensor | None = None) -> dict[str, Tensor]:
    """The same of embeddings (n, D), less where hardly anything varies, see `wide_share`. std: by default their own."""
    if len(embeddings) < FEWEST_RANKED:
        return {}
    health = feature_health(embeddings.detach())
    std = health["feature_std"] if std is None else std
    return {"embedding_rank_share": wide_share(health["feature_rank_share"], std)}


@torch.no_grad()
def wide_share(share: Tensor, std: Tensor) -> Tensor:
    """A share of attainable dimensions, less where embeddings that are to have a standard deviation of 1 have hardly
    any: times (std / 0.2)^2 below 0.2."""
    return share * (std / _NARROW).square().clamp(max=1)


@torch.no_grad()
def embedding_health(embeddings: Tensor) -> dict[str, Tensor]:
    """Of embeddings (n, D), over this rank's samples, before anything standardises them:

    `embedding_std`: the standard deviation, averaged over dimensions.
    `dead_dimensions`: the share of dimensions whose standard deviation is next to nothing.

    Of one sample nothing.
    """
    if len(embeddings) < 2:
        return {}
    spread = embeddings.detach().std(dim=0)
    return {"embedding_std": spread.mean(), "dead_dimensions": (spread < _DEAD).to(embeddings.dtype).mean()}
