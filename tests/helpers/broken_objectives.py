"""Objectives that break one promise each, named in a config as `broken_objectives:UsesGlobalGenerator`.

All are the same small one: a linear layer on the encoder's pooled features predicts the mean colour of an image whose
pixels are hidden at random.
"""

import random

import numpy as np
import torch
from torch import nn

from prelude.data.batch import View, ViewPlan
from prelude.objectives.momentum_teacher import follow, momentum_teacher
from prelude.pretrain.draws import uniform
from prelude.pretrain.encoders import pooled_width
from prelude.pretrain.images import images as device_images
from prelude.pretrain.objective import Loss, Objective


class Sound(Objective):
    """Keeps every promise."""

    def __init__(self, encoder, options, *, image_size, mean, std):
        super().__init__(encoder, options, image_size=image_size, mean=mean, std=std)
        self.views = ViewPlan((View(image_size),), mean, std)
        self.head = nn.Linear(pooled_width(encoder), 3)

    def forward(self, batch, progress):
        (images,) = device_images(batch, self.views)
        return self.loss(self.head(self.encoder(self.hidden(images, batch))), images.mean((2, 3)))

    def hidden(self, images, batch):
        return images * (self.chances(images, batch) < 0.5).view(len(images), 1, *images.shape[2:])

    def chances(self, images, batch):
        return uniform(batch.seeds, images[0, 0].numel(), 77)

    def loss(self, predicted, target):
        return Loss((predicted.float() - target).square().mean(), {"spread": predicted.detach().std()})


# ---- draws


class UsesTorchsGenerator(Sound):
    def chances(self, images, batch):
        return torch.rand(len(images), images[0, 0].numel())


class UsesNumpysGenerator(Sound):
    def chances(self, images, batch):
        return torch.from_numpy(np.random.rand(len(images), images[0, 0].numel()))


class UsesPythonsGenerator(Sound):
    def hidden(self, images, batch):
        return super().hidden(images, batch) * random.random()


# ---- responds


class IgnoresItsInput(Sound):
    def forward(self, batch, progress):
        images = torch.ones(len(batch), 3, *self.views.views[0].size)
        return self.loss(self.head(self.encoder(images)), images.mean((2, 3)))


class StopsTheGradient(Sound):
    def forward(self, batch, progress):
        (images,) = device_images(batch, self.views)
        return self.loss(self.head(self.encoder(images).detach()), images.mean((2, 3)))


# ---- average


class SumsOverTheBatch(Sound):
    def loss(self, predicted, target):
        return Loss((predicted.float() - target).square().sum())


class DrawsByPlaceInTheBatch(Sound):
    def chances(self, images, batch):
        return uniform(torch.arange(len(images)), images[0, 0].numel(), 77)


class ComparesWithinTheBatch(Sound):
    def loss(self, predicted, target):
        return super().loss(predicted - predicted.mean(0), target - target.mean(0))


# ---- host waits


class ReadsAValue(Sound):
    def loss(self, predicted, target):
        return Loss(super().loss(predicted, target).total, {"spread": torch.tensor(predicted.std().item())})


class ChoosesByAValue(Sound):
    def after_step(self, progress, applied):
        if applied:
            pass


class IndexesByAMask(Sound):
    def loss(self, predicted, target):
        return super().loss(predicted[target.abs() < 1e9], target[target.abs() < 1e9])


# ---- state


class CountsInAnAttribute(Sound):
    seen = 0

    def loss(self, predicted, target):
        self.seen += 1
        return super().loss(predicted / self.seen, target)


class KeepsAnAverageInAnAttribute(Sound):
    centre = 0.0

    def forward(self, batch, progress):
        (images,) = device_images(batch, self.views)
        features = self.encoder(images)
        loss = self.loss(self.head(features - self.centre), images.mean((2, 3)))
        self.fresh = features.detach().mean(0)
        return loss

    def after_step(self, progress, applied):
        self.centre = 0.9 * self.centre + 0.1 * self.fresh * applied


# ---- refused step


class FollowsRefusedSteps(Sound):
    def __init__(self, encoder, options, **given):
        super().__init__(encoder, options, **given)
        self.teacher = momentum_teacher(encoder)

    def after_step(self, progress, applied):
        follow(self.teacher, self.encoder, torch.tensor(0.5))


class CountsRefusedSteps(Sound):
    def __init__(self, encoder, options, **given):
        super().__init__(encoder, options, **given)
        self.register_buffer("steps", torch.zeros(()))

    def after_step(self, progress, applied):
        self.steps += 1


# ---- exported encoder


class ExportsItsHeadToo(Sound):
    def exported_encoder(self):
        return self.exported

    def __init__(self, encoder, options, **given):
        super().__init__(encoder, options, **given)
        self.exported = nn.Sequential(encoder, self.head)


class ExportsACopy(Sound):
    def exported_encoder(self):
        return momentum_teacher(self.encoder)


# ---- bf16


class DividesByNothingInBf16(Sound):
    def loss(self, predicted, target):
        close = 1 - 1e-4 * predicted.sigmoid()  # in bf16, 1
        return Loss((predicted.float() - target).square().mean() + (1 - close).log().mean().square())


class TakesItsLossInBf16(Sound):
    def loss(self, predicted, target):
        return Loss((predicted - target.to(predicted.dtype)).square().mean())


# ---- pictures, labels, forward


class MovesWhenItDraws(Sound):
    def pictures(self, batch):
        self.head.weight.mul_(2)
        return {}


class DrawsInAnotherMode(Sound):
    def pictures(self, batch):
        self.eval()
        return {}


class ReadsLabels(Sound):
    def forward(self, batch, progress):
        loss = super().forward(batch, progress)
        return loss if batch.labels is None else Loss(loss.total + batch.labels[0])


class ReturnsANumber(Sound):
    def forward(self, batch, progress):
        return super().forward(batch, progress).total


class ReturnsALossASample(Sound):
    def loss(self, predicted, target):
        return Loss((predicted.float() - target).square().mean(1))


class LogsWithAGradient(Sound):
    def loss(self, predicted, target):
        total = super().loss(predicted, target).total
        return Loss(total, {"error": total})


class ChangesTheBatch(Sound):
    def forward(self, batch, progress):
        loss = super().forward(batch, progress)
        batch.views[0].zero_()
        return loss


class HasNoViews(Sound):
    def __init__(self, encoder, options, **given):
        super().__init__(encoder, options, **given)
        self.views = None


class RaisesInForward(Sound):
    def loss(self, predicted, target):
        return Loss((predicted - target[:, :2]).mean())


# ---- several at once


class FailsTwice(LogsWithAGradient, CountsRefusedSteps, ExportsACopy):
    pass


class RaisesAtTheStart(Sound):
    def __init__(self, encoder, options, **given):
        raise ValueError("no such thing")


class ReturnsANumberOfACopy(ReturnsANumber, ExportsACopy):
    pass


# ---- what only ranks and engines show


class KeepsStatisticsOfARank(Sound):
    """Batch norm without `synchronise`, and a teacher that follows at ZeRO 3, where weights are in parts."""

    def __init__(self, encoder, options, **given):
        super().__init__(encoder, options, **given)
        self.norm = nn.BatchNorm1d(3)
        self.teacher = momentum_teacher(self.head)

    def loss(self, predicted, target):
        return super().loss(self.norm(predicted), target)

    def after_step(self, progress, applied):
        follow(self.teacher, self.head, 0.5 * applied)
