"""Supervised fine-tuning as an objective: an encoder and a linear head, trained on labelled batches.

    loss = cross_entropy(head(encoder(mixed images)), mixed and smoothed targets)

- The engine that pretrains also fine-tunes: same loader, schedules, checkpoints and exact resume.
- The head starts at almost nothing (a normal distribution of 2e-5), as in MAE's recipe, so that it does not push
  the encoder about before it knows anything.
- Every random choice about a sample derives from its seed; only drop path draws from torch's generator, which the
  engine seeds at every step.
- Batch norm is taken over all ranks. With `ema_decay`, what is tested and exported is the average of the weights.
"""

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from prelude.data.batch import AutoAugment, Batch, View, ViewPlan
from prelude.data.errors import UserError
from prelude.evaluators.finetuning.recipe import FineTuneOptions
from prelude.pretrain import layer_decay
from prelude.pretrain.batch_norm import synchronise
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import pooled_width
from prelude.pretrain.images import images as device_images
from prelude.pretrain.mixing import Mixing
from prelude.pretrain.moving_average import move_towards
from prelude.pretrain.objective import Loss, Objective
from prelude.pretrain.schedules import Progress

_HEAD_STD = 2e-5


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
        (images,) = device_images(batch, self.views)  # (B, C, H, W)
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
