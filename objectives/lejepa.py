"""LeJEPA (Balestriero and LeCun, "LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics",
arXiv 2511.08544).

Several views of every image, a few of the whole size and some small ones, are embedded by one encoder and projector.
All are drawn to the mean of the image's global views; what keeps them from becoming equal is that the embeddings of the
batch are to be distributed as independent standard normals:

    z         = projector(encoder(views))                (V, N, D), the first G of the V views global
    c         = mean of z over the G global views
    agreement = mean over V * N * D of (z - c)^2
    loss      = (1 - weight) * agreement + weight * sigreg(z)         see `objectives/sigreg.py`

- No teacher, no predictor, no gradient stopped: the mean has one, too.
- The batch is the global one: loss and gradient at any number of ranks are those of one process with the joined batch.
- Views of one size go through the encoder together, and all go through the projector together, as in the authors'
  code: batch norms see them as one batch.
- Directions are drawn anew in every step, the same on every rank and after a resume.
- Agreement, statistic and loss are float32 at least, under any autocast.
"""

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from prelude.data.batch import Batch, View
from prelude.data.errors import UserError, in_one_line
from prelude.objectives.options import ColourOptions, LeJEPAOptions
from prelude.objectives.several_views import SeveralViews, attained_by, coloured_view, embedding_health, full_precision
from prelude.objectives.sigreg import Knots, directions, sigreg
from prelude.pretrain import own_encoder
from prelude.pretrain.collectives import all_reduce, row_counts
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import lay_out_encoder
from prelude.pretrain.feature_health import TRIVIAL_LOSS, feature_health
from prelude.pretrain.images import images as device_images
from prelude.pretrain.named_code import REFUSALS
from prelude.pretrain.objective import Loss
from prelude.pretrain.own_encoder import is_own
from prelude.pretrain.schedules import Progress

_LOCAL_SHARE = 7 / 16  # of the image's side: 98 of 224 pixels


class LeJEPA(SeveralViews):
    Options = LeJEPAOptions
    projector_bias = "all"
    remedies = {
        "same_features": "raise objective.sigreg_weight, or lower optimizer.lr",
        "few_dimensions": "raise objective.sigreg_weight, or lower optimizer.lr",
        "redundant_embedding": "raise objective.sigreg_weight",
        "trivial_loss": "weaken the augmentations (objective.local_scale, objective.colours), or lower "
        "objective.sigreg_weight",
    }

    def __init__(self, encoder: nn.Module, options: LeJEPAOptions, *, image_size, mean, std):
        super().__init__(encoder, options, image_size=image_size, mean=mean, std=std)
        self.knots = Knots(options.num_knots, options.knot_max)
        # Drawn with the weights, so from the run's seed alone: what a step's draws depend on beside its number.
        self.salt = int(torch.randint(2**62, ()))
        self._trivial: dict[int, float] = {}  # by the number of rows

    @classmethod
    def check(cls, options: LeJEPAOptions, encoder: EncoderConfig) -> None:
        super().check(options, encoder)
        if options.num_local:
            _refuse_size(options, encoder)

    @classmethod
    def colours(cls, options: LeJEPAOptions) -> dict[str, ColourOptions]:
        return {"objective.colours": options.colours}

    def planned_views(self, image_size: tuple[int, int]) -> tuple[View, ...]:
        o, local = self.options, _local_size(self.options, self.encoder, image_size)
        views = [coloured_view(image_size, o.global_scale, o.flip, o.colours)] * o.num_global
        return (*views, *[coloured_view(local, o.local_scale, o.flip, o.colours)] * o.num_local)

    def forward(self, batch: Batch, progress: Progress) -> Loss:
        counts = row_counts(len(batch))
        views, num_global = device_images(batch, self.views), self.options.num_global
        pooled = [self.encoder(torch.cat(group)) for group in (views[:num_global], views[num_global:]) if group]
        pooled = torch.cat(pooled)  # (V * n, D_encoder), view after view
        embeddings = self.projector(pooled).unflatten(0, (len(views), -1))  # (V, n, D)
        loss = self.loss(embeddings, self.directions(embeddings, progress), counts)
        loss = self.with_dynamics(loss, embeddings, batch, counts)
        return Loss(loss.total, loss.parts | feature_health(pooled[: len(batch)].detach()))

    def directions(self, embeddings: Tensor, progress: Progress) -> Tensor:
        """This step's, (D, K)."""
        return directions(
            embeddings.shape[-1], self.options.num_directions, self.salt, progress.step, embeddings.device
        )

    def loss(self, embeddings: Tensor, along: Tensor, counts: list[int]) -> Loss:
        """embeddings: (V, n, D) of this rank's samples, global views first; along: (D, K); counts: each rank's n.

        The parts are the two terms without their weights, and of this rank's first view the effective number of
        dimensions as a share of what is attainable, less where hardly anything varies (`embedding_rank_share`, see
        `wide_share`), and what `embedding_health` sees. `trivial_loss`: see `_trivial_loss`.
        """
        o, count = self.options, sum(counts)
        with torch.autocast(embeddings.device.type, enabled=False):
            (z,) = full_precision(embeddings)
            centre = (z[: o.num_global] if o.centre == "global" else z).mean(0)  # (n, D)
            agreement = all_reduce((z - centre).square().sum()) / (z.numel() // z.shape[1] * count)
            normality = sigreg(z, along, self.knots, counts)
            total = (1 - o.sigreg_weight) * agreement + o.sigreg_weight * normality
            parts = {
                "agreement": agreement.detach(),
                "sigreg": normality.detach(),
                TRIVIAL_LOSS: total.new_full((), self._trivial_loss(count)),
            }
            return Loss(total, parts | attained_by(z[0]) | embedding_health(z[0]))

    def _trivial_loss(self, count: int) -> float:
        """Of views that have nothing in common, embedded as independent normals of the standard deviation s that costs
        least: each view lies at s^2 times `apart` from the centre. Constant embeddings are s = 0."""
        if count not in self._trivial:
            o = self.options
            num_views = o.num_global + o.num_local
            centred = o.num_global if o.centre == "global" else num_views
            # A view that is part of the centre of G: 1 - 1 / G of its variance; one that is not: 1 + 1 / G
            apart = 1 - (2 * centred / num_views - 1) / centred
            self._trivial[count] = min(
                (1 - o.sigreg_weight) * apart * s**2 + o.sigreg_weight * self.knots.expected(s, count)
                for s in (step / 200 for step in range(241))
            )
        return self._trivial[count]


def _local_size(options: LeJEPAOptions, encoder: nn.Module, image_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels."""
    if options.local_size != "auto":
        return (options.local_size,) * 2
    embed = getattr(encoder, "patch_embed", None)
    patch = embed.patch_size if isinstance(embed, PatchEmbed) else (1, 1)
    return tuple(max(int(side * _LOCAL_SHARE) // part, 1) * part for side, part in zip(image_size, patch, strict=True))


def _refuse_size(options: LeJEPAOptions, config: EncoderConfig) -> None:
    """Raises UserError for an encoder that takes global views only."""
    model = lay_out_encoder(config)
    height, width = size = _local_size(options, model, config.size)
    try:
        with torch.no_grad():
            model.eval()(torch.empty(2, config.in_chans, *size, device="meta"))
    except REFUSALS as error:
        if is_own(config) and _takes(config, size):
            return
        raise UserError(
            f"encoder.name={config.name} built for {config.size[0]} x {config.size[1]} pixels takes no local views of "
            f"{height} x {width} ({in_one_line(error, 200)}); write "
            "encoder.kwargs={dynamic_img_size: true} for a vision transformer, another objective.local_size, or "
            "objective.num_local=0 and objective.num_global=4."
        ) from error


def _takes(config: EncoderConfig, size: tuple[int, int]) -> bool:
    """Whether a network of one's own, which may read values, takes images (height, width) with numbers in them."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            own_encoder.create(config).eval()(torch.zeros(2, config.in_chans, *size))
    except REFUSALS:
        return False
    return True
