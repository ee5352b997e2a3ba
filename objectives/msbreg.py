"""MSBReg (Moon et al., "An Embedding-Dynamic Approach to Self-supervised Learning", arXiv 2207.03552),
by its description: no official code is known.

Several views of every image go through an encoder, a projector and a predictor, and through a momentum teacher of
encoder and projector. Embeddings have length 1. All views of an image are drawn to the centroid of what the teacher
makes of them, while two forces of `objectives/embedding_dynamics.py` drive embeddings apart:

    q, t     = predictor(projector(encoder(views))), teacher(views)     (V, N, D), each of length 1
    c        = mean of t over the views, brought to length 1
    centroid = mean over V * N of 2 - 2 q . c
    loss     = centroid + weight * singular values of q + weight * brownian of q

- The batch is the global one: loss and gradient at any number of ranks are those of one process with the joined batch.
- Each view is a forward pass of its own, in the teacher too, whose batch norms use the statistics of the batch and have
  running ones of their own.
- The teacher's weights follow the student's after every step that was applied; no gradient reaches it.
- Terms and loss are float32 at least, under any autocast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prelude.data.batch import Batch, View
from prelude.objectives.embedding_dynamics import kicks, unit
from prelude.objectives.momentum_teacher import follow_weights, momentum_teacher, train_norms
from prelude.objectives.options import ColourOptions, MSBRegOptions
from prelude.objectives.projector import projector
from prelude.objectives.several_views import SeveralViews, attained_by, coloured_view, embedding_health, full_precision
from prelude.pretrain.batch_norm import synchronise
from prelude.pretrain.collectives import all_reduce, row_counts
from prelude.pretrain.feature_health import feature_health
from prelude.pretrain.images import images as device_images
from prelude.pretrain.objective import Loss
from prelude.pretrain.schedules import Progress, cosine


class MSBReg(SeveralViews):
    Options = MSBRegOptions
    projector_bias = "all"
    max_zero_stage = 2
    remedies = {
        "same_features": "raise objective.singular_value_weight, or lower optimizer.lr",
        "few_dimensions": "raise objective.singular_value_weight, or lower optimizer.lr",
        "redundant_embedding": "raise objective.singular_value_weight",
    }

    def __init__(self, encoder: nn.Module, options: MSBRegOptions, *, image_size, mean, std):
        super().__init__(encoder, options, image_size=image_size, mean=mean, std=std)
        self.predictor = projector(options.projector[-1], [*options.predictor, options.projector[-1]], bias="all")
        synchronise(self.predictor)
        self.teacher, self.teacher_projector = momentum_teacher(encoder), momentum_teacher(self.projector)
        self.train()

    @classmethod
    def colours(cls, options: MSBRegOptions) -> dict[str, ColourOptions]:
        return {"objective.view_1": options.view_1, "objective.view_2": options.view_2}

    def planned_views(self, image_size: tuple[int, int]) -> tuple[View, ...]:
        o = self.options
        turns = [(o.view_1, o.view_2)[number % 2] for number in range(o.num_views)]
        return tuple(coloured_view(image_size, o.crop_scale, o.flip, colours) for colours in turns)

    def compiled_parts(self) -> list[nn.Module]:
        return [*super().compiled_parts(), self.predictor, self.teacher, self.teacher_projector]

    def forward(self, batch: Batch, progress: Progress) -> Loss:
        counts, views = row_counts(len(batch)), device_images(batch, self.views)
        pooled = [self.encoder(view) for view in views]  # each (n, D_encoder)
        predicted = torch.stack([self.predictor(self.projector(features)) for features in pooled])  # (V, n, D)
        with torch.no_grad():
            taught = [self.teacher(view) for view in views]
            target = torch.stack([self.teacher_projector(features) for features in taught])  # (V, n, D)
        loss = self.loss(predicted, target, kicks(batch.seeds, predicted.shape[-1]), counts)
        likeness = F.cosine_similarity(pooled[0].detach().float(), taught[0].float(), dim=1).mean()
        return Loss(loss.total, loss.parts | {"teacher_cosine": likeness} | feature_health(pooled[0].detach()))

    def loss(self, predicted: Tensor, target: Tensor, directions: Tensor, counts: list[int]) -> Loss:
        """predicted, target: (V, n, D) of student and teacher, this rank's samples, of any length; directions: (n, D)
        of length 1; counts: each rank's n.

        The parts are the three terms without their weights, and of this rank's first view the effective number of
        dimensions as a share of what is attainable, less where all point nearly the same way (`embedding_rank_share`),
        and what `embedding_health` sees. No loss is trivial: the teacher sees the same views, so that a student that
        knows each view, and nothing that they have in common, is not far from the centroid.
        """
        with torch.autocast(predicted.device.type, enabled=False):
            q, t = (unit(rows) for rows in full_precision(predicted, target))
            centroid = self._centroid_term(q, t, counts)
            total, parts = self.regularised(centroid, q, directions, counts)
            apart = (1 - q[0].detach().mean(0).square().sum()).clamp(min=0).sqrt()  # 1 where they point everywhere
            parts |= {"centroid": centroid.detach()} | attained_by(q[0], apart)
            return Loss(total, parts | embedding_health(q[0]))

    def _centroid_term(self, q: Tensor, t: Tensor, counts: list[int]) -> Tensor:
        if self.options.centroid == "mean":
            alike = F.cosine_similarity(q.mean(0), t.mean(0), dim=-1)  # (n,)
            return all_reduce((1 - alike).sum()) / sum(counts)
        centre = unit(t.mean(0))  # (n, D)
        return all_reduce((2 - 2 * (q * centre).sum(-1)).sum()) / (len(q) * sum(counts))

    def after_step(self, progress: Progress, applied: Tensor) -> None:
        done = progress.step - 1  # steps before the one that was just applied
        momentum = cosine(self.options.momentum, self.options.momentum_end, done / progress.num_steps)
        for teacher, student in ((self.teacher, self.encoder), (self.teacher_projector, self.projector)):
            follow_weights(teacher, student, (1.0 - momentum) * applied)

    def train(self, mode: bool = True) -> "MSBReg":
        super().train(mode)
        for teacher in (self.teacher, self.teacher_projector):
            train_norms(teacher.eval(), mode)
        return self
