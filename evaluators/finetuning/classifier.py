"""Supervised fine-tuning as an objective: an encoder and a linear head, trained on labelled batches.

    loss = loss(head(encoder(mixed images)), mixed and smoothed targets)      see `targets`

- The engine that pretrains also fine-tunes: same loader, schedules, checkpoints and exact resume.
- The head starts at almost nothing (a normal distribution of 2e-5), as in MAE's recipe, so that it does not push
  the encoder about before it knows anything; `head_std` says otherwise.
- Every random choice about a sample derives from its seed; only drop path draws from torch's generator, which the
  engine seeds at every step.
- Batch norm is taken over all ranks. With `ema_decay`, what is tested and exported is the average of the weights; with
  `patience`, what was best on the held-out images.
"""

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from prelude.data.batch import AutoAugment, Batch, View, ViewPlan
from prelude.data.errors import UserError
from prelude.evaluators.dense.attention import FusedAttention
from prelude.evaluators.finetuning.attention_labels import attention_to_patches, relabelled
from prelude.evaluators.finetuning.early_stopping import HeldOut
from prelude.evaluators.finetuning.recipe import FineTuneOptions
from prelude.evaluators.finetuning.targets import class_targets, finding_targets, sigmoid_loss, softmax_loss
from prelude.pretrain import layer_decay
from prelude.pretrain.batch_norm import synchronise
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import pooled_width
from prelude.pretrain.images import images as device_images
from prelude.pretrain.mixing import Mixing
from prelude.pretrain.moving_average import move_towards
from prelude.pretrain.objective import Loss, Objective
from prelude.pretrain.schedules import Progress


class Classifier(Objective):
    Options = FineTuneOptions
    max_zero_stage = 2  # tested, and averaged, outside of forward

    def __init__(
        self,
        encoder: nn.Module,
        options: FineTuneOptions,
        classes: Tensor,
        *,
        image_size,
        mean,
        std,
        findings: bool = False,
        weights: Tensor | None = None,
    ):
        """classes: (C,) int64, growing: the class numbers that there are. findings: whether labels are the answers to
        C questions, and not class numbers. weights: of the loss, see `targets`.
        """
        super().__init__(encoder, options, image_size=image_size, mean=mean, std=std)
        self.views = ViewPlan((_train_view(options, image_size, mean),), mean, std)
        self.test_views = ViewPlan((_test_view(options, image_size),), mean, std)
        self.findings, self.label_shape = findings, (len(classes),) if findings else ()
        self.register_buffer("classes", classes)
        self.register_buffer("weights", weights, persistent=False)
        self.head = _head(pooled_width(encoder), len(classes), options.head_std)
        synchronise(self)
        mixed = options.mixup or options.cutmix
        how = options.cutmix_share, options.cutmix_cell
        self.mixing = Mixing(options.mixup, options.cutmix, *how) if mixed else None
        self.average = None
        if options.ema_decay:
            self.average = ModelEmaV3(nn.ModuleDict(self._trained()), decay=options.ema_decay).requires_grad_(False)
        self.held_out = HeldOut(options, nn.ModuleDict(self._current())) if options.hold_out else None

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
        targets = self.targets(batch)  # (B, C)
        if self.mixing is None:
            return self.loss(self.head(self.encoder(images)), targets)
        mixed = self.mixing.mixed(images, targets, batch.seeds)
        if self.options.attention_labels is None:
            return self.loss(self.head(self.encoder(mixed.images)), mixed.mixed_targets())
        with FusedAttention() as last:
            logits = self.head(self.encoder(mixed.images))
        paid, grid = attention_to_patches(last, self.encoder.num_prefix_tokens), self.encoder.patch_embed.grid_size
        return self.loss(logits, relabelled(mixed, paid, grid, logits.detach(), self.options.attention_labels))

    def targets(self, batch: Batch) -> Tensor:
        """(B, C), NaN where a finding is not known."""
        smoothing = self.options.label_smoothing
        if self.findings:
            return finding_targets(batch.labels, batch.seeds, self.options.uncertain, smoothing)
        return class_targets(batch.labels, self.classes, smoothing)

    def loss(self, logits: Tensor, targets: Tensor) -> Loss:
        """logits, targets: (B, C). `accuracy` counts the class that has most of a mixed target; of findings, the
        answers that are more likely than not and right."""
        with torch.autocast(logits.device.type, enabled=False):
            loss = sigmoid_loss if self.options.loss == "sigmoid" else softmax_loss
            total = loss(logits.float(), targets, self.weights)
        return Loss(total, {"accuracy": self._accuracy(logits.detach(), targets)})

    def _accuracy(self, logits: Tensor, targets: Tensor) -> Tensor:
        if not self.findings:
            return (logits.argmax(1) == targets.argmax(1)).float().mean()
        known = targets.isfinite()
        return (((logits > 0) == (targets > 0.5)) & known).sum() / known.sum().clamp(min=1)

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

    def has_ended(self, progress: Progress) -> bool:
        return self.held_out is not None and self.held_out.has_ended(progress, self._current)

    def lr_scales(self) -> dict[str, float]:
        scales = layer_decay.lr_scales(self.encoder, self.options.layer_decay, "objective.layer_decay")
        head = {f"head.{name}": self.options.head_lr_ratio for name, _ in self.head.named_parameters()}
        return {f"encoder.{name}": scale for name, scale in scales.items()} | head

    def exported_encoder(self) -> nn.Module:
        return self.tested()["encoder"]

    def tested(self) -> nn.ModuleDict | dict[str, nn.Module]:
        """`encoder` and `head` as they are tested: those that the held-out images chose, once they have chosen any."""
        chosen = self.held_out and self.held_out.chosen
        return self._current() if chosen is None else chosen

    @torch.no_grad()
    def scores(self, batch: Batch, current: bool = False) -> Tensor:
        """(B, C) logits of `test_views`. current: of the weights as they are now, whatever was chosen."""
        (images,) = device_images(batch, self.test_views)
        model = self._current() if current else self.tested()
        return model["head"](model["encoder"](images)).float()

    def _current(self) -> nn.ModuleDict | dict[str, nn.Module]:
        """Averaged, where there is an average."""
        return self._trained() if self.average is None else self.average.module

    def _trained(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "head": self.head}


def _head(width: int, num_classes: int, std: float | str) -> nn.Linear:
    head = nn.Linear(width, num_classes)
    if std != "uniform":
        nn.init.trunc_normal_(head.weight, std=std)
        nn.init.zeros_(head.bias)
    return head


def _train_view(options: FineTuneOptions, size: tuple[int, int], mean) -> View:
    augment = None
    if options.augment is not None:
        # timm's RandAugment fills with the mean colour, torchvision's TrivialAugment with black.
        of_mean = options.augment.policy == "rand"
        fill = tuple(min(255, round(255 * channel)) if of_mean else 0 for channel in mean)
        augment = AutoAugment(**options.augment.model_dump(), fill=fill)
    whole = options.crop_scale == (1.0, 1.0)
    crop = {"crop": "center"} if whole else {"crop": "random_resized", "scale": options.crop_scale}
    look = {"interpolation": options.interpolation, "augment": augment}
    return View(size, flip=options.flip, shift=options.shift, **look, **crop)


def _test_view(options: FineTuneOptions, size: tuple[int, int]) -> View:
    share = options.test_crop_share or (0.875 if 128 <= min(size) <= 224 else 1.0)
    return View(size, crop="center", crop_share=share, interpolation=options.interpolation, flip=0.0)
