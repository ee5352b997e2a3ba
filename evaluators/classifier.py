"""Supervised fine-tuning as an objective: an encoder and a linear head, trained on labelled batches.

    loss = cross_entropy(head(encoder(mixed images)), mixed and smoothed targets)

- The engine that pretrains also fine-tunes: same loader, schedules, checkpoints and exact resume.
- The head starts at almost nothing (a normal distribution of 2e-5), as in MAE's recipe, so that it does not push
  the encoder about before it knows anything.
- Every random choice about a sample derives from its seed; only drop path draws from torch's generator, which the
  engine seeds at every step.
- Batch norm is taken over all ranks. With `ema_decay`, what is tested and exported is the average of the weights.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from prelude.data.batch import AutoAugment, Batch, View, ViewPlan
from prelude.data.errors import UserError
from prelude.pretrain import layer_decay
from prelude.pretrain.batch_norm import synchronise
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import pooled_width
from prelude.pretrain.images import images as device_images
from prelude.pretrain.mixing import Mixing
from prelude.pretrain.moving_average import move_towards
from prelude.pretrain.objective import AreaRange, Loss, Objective, Options
from prelude.pretrain.schedules import Progress

NAME = "fine_tune"
_HEAD_STD = 2e-5


class AugmentOptions(Options):
    """See data.batch.AutoAugment."""

    policy: Literal["rand", "trivial"] = "rand"
    num_ops: int = Field(2, ge=1)
    probability: float = Field(0.5, gt=0, le=1)
    magnitude: float = Field(9.0, ge=0, le=10)
    magnitude_std: float = Field(0.5, ge=0)

    @model_validator(mode="after")
    def _trivial_has_no_settings(self):
        if self.policy == "trivial" and self.model_fields_set - {"policy"}:
            if self != type(self)(policy="trivial"):
                raise ValueError("the policy trivial has no settings; write {policy: trivial} alone")
        return self


class FineTuneOptions(Options):
    weights: str = ""  # fingerprint of the weights that training starts from; filled in by the command
    per_class: int | None = Field(None, ge=1)  # labelled images of each class; None: all
    fraction: float | None = Field(None, gt=0, le=1)  # of each class's labelled images
    # mean: of the patch tokens, then a new norm (MAE). own: what the encoder itself pools. ViTs only; convnets pool.
    pooling: Literal["mean", "own"] = "mean"
    image_size: int | None = Field(None, ge=1)  # pixels; None: the size of pretraining
    drop_path: float = Field(0.0, ge=0, lt=1)  # of the last block; rises linearly from 0
    layer_decay: float = Field(1.0, gt=0, le=1)  # see pretrain/layer_decay.py; 1: the same rate everywhere
    head_lr_ratio: float = Field(1.0, gt=0)  # the head's learning rate, as a multiple of lr
    crop_scale: AreaRange = (0.08, 1.0)  # share of the image's area; [1, 1]: the whole image
    flip: float = Field(0.5, ge=0, le=1)
    shift: int = Field(0, ge=0)  # pixels; pads with black and crops at random, as is usual on CIFAR
    augment: AugmentOptions | None = None
    mixup: float = Field(0.0, ge=0)  # alpha; 0: off
    cutmix: float = Field(0.0, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    loss: Literal["softmax", "sigmoid"] = "softmax"  # sigmoid: binary cross-entropy, averaged over the classes
    ema_decay: float = Field(0.0, ge=0, lt=1)  # of the average of the weights; 0: none
    test_crop_share: float | None = Field(None, gt=0, le=1)  # None: 0.875 from 128 to 224 pixels, else all of it
    test_every_epochs: float | None = Field(None, gt=0)  # a curve to look at; only the last weights are reported

    @model_validator(mode="after")
    def _one_way_to_take_few(self):
        if self.per_class is not None and self.fraction is not None:
            raise ValueError("objective.per_class and objective.fraction both say how many labels there are; write one")
        return self


class Classifier(Objective):
    Options = FineTuneOptions
    max_zero_stage = 2  # tested, and averaged, outside of forward

    def __init__(self, encoder: nn.Module, options: FineTuneOptions, classes: Tensor, *, image_size, mean, std):
        """classes: (C,) int64, growing: the class numbers that there are."""
        super().__init__(encoder, options, image_size=image_size, mean=mean, std=std)
        self.views = ViewPlan((_train_view(options, image_size, mean),), mean, std)
        self.test_views = ViewPlan((_test_view(options, image_size),), mean, std)
        self.register_buffer("classes", classes)
        self.head = nn.Linear(pooled_width(encoder), len(classes))
        nn.init.trunc_normal_(self.head.weight, std=_HEAD_STD)
        nn.init.zeros_(self.head.bias)
        synchronise(self)
        self.mixing = Mixing(options.mixup, options.cutmix) if options.mixup or options.cutmix else None
        self.average = None
        if options.ema_decay:
            self.average = ModelEmaV3(nn.ModuleDict(self._trained()), decay=options.ema_decay).requires_grad_(False)

    @classmethod
    def check(cls, options: FineTuneOptions, encoder: EncoderConfig) -> None:
        super().check(options, encoder)
        height, width = encoder.size
        if options.shift >= min(height, width):
            raise UserError(
                f"objective.shift={options.shift} would move the whole image of {height}x{width} pixels out of sight; "
                f"write {min(height, width) // 8}."
            )

    def forward(self, batch: Batch, progress: Progress) -> Loss:
        (images,) = device_images(batch, self.views)  # (B, 3, H, W)
        targets = self.smoothed(batch.labels)  # (B, C)
        if self.mixing is not None:
            images, targets = self.mixing(images, targets, batch.seeds)
        return self.loss(self.head(self.encoder(images)), targets)

    def smoothed(self, labels: Tensor) -> Tensor:
        """(B,) class numbers to (B, C): 1 - e + e / C for the class and e / C for the others."""
        own = torch.searchsorted(self.classes, labels).clamp(max=len(self.classes) - 1)
        smoothing = self.options.label_smoothing
        return F.one_hot(own, len(self.classes)) * (1 - smoothing) + smoothing / len(self.classes)

    def loss(self, logits: Tensor, targets: Tensor) -> Loss:
        """logits, targets: (B, C). `accuracy` counts the class that has most of a mixed target."""
        right = (logits.detach().argmax(1) == targets.argmax(1)).float().mean()
        with torch.autocast(logits.device.type, enabled=False):
            if self.options.loss == "sigmoid":
                total = F.binary_cross_entropy_with_logits(logits.float(), targets)
            else:
                total = F.cross_entropy(logits.float(), targets)
        return Loss(total, {"accuracy": right})

    def after_step(self, progress: Progress, applied: Tensor) -> None:
        if self.average is None:
            return
        trained = nn.ModuleDict(self._trained()).state_dict()
        kept = self.average.module.state_dict()
        moving = [name for name, value in trained.items() if value.is_floating_point()]
        share = (1.0 - self.options.ema_decay) * applied
        move_towards([kept[name] for name in moving], [trained[name] for name in moving], share)
        for name in trained.keys() - set(moving):  # counts of batches
            kept[name].copy_(trained[name])

    def lr_scales(self) -> dict[str, float]:
        scales = layer_decay.lr_scales(self.encoder, self.options.layer_decay)
        head = {f"head.{name}": self.options.head_lr_ratio for name, _ in self.head.named_parameters()}
        return {f"encoder.{name}": scale for name, scale in scales.items()} | head

    def exported_encoder(self) -> nn.Module:
        return self.tested()["encoder"]

    def tested(self) -> nn.ModuleDict | dict[str, nn.Module]:
        """`encoder` and `head` as they are tested: averaged, where there is an average."""
        return self._trained() if self.average is None else self.average.module

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        """(B, C) logits of `test_views`."""
        (images,) = device_images(batch, self.test_views)
        model = self.tested()
        return model["head"](model["encoder"](images)).float()

    def _trained(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "head": self.head}


def _train_view(options: FineTuneOptions, size: tuple[int, int], mean) -> View:
    augment = None
    if options.augment is not None:
        fill = tuple(min(255, round(255 * channel)) for channel in mean)
        augment = AutoAugment(**options.augment.model_dump(), fill=fill)
    whole = options.crop_scale == (1.0, 1.0)
    crop = {"crop": "center"} if whole else {"crop": "random_resized", "scale": options.crop_scale}
    return View(size, flip=options.flip, shift=options.shift, augment=augment, **crop)


def _test_view(options: FineTuneOptions, size: tuple[int, int]) -> View:
    share = options.test_crop_share or (0.875 if 128 <= min(size) <= 224 else 1.0)
    return View(size, crop="center", crop_share=share, flip=0.0)
