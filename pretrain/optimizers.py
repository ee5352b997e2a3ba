"""Optimizers and their parameter groups.

- Client torch optimizers only: nothing is compiled at start.
- Two groups, decayed and not: biases and one-dimensional tensors are not decayed unless a recipe says so, and it
  may spare class, mask and register tokens too. The undecayed group may have a learning rate of its own.
- An objective may scale the rate of some parameters (layer-wise decay); each scale has its own pair of groups.
- Learning rate and weight decay are set on every group before every step, from the step counter.
"""

from collections.abc import Collection, Iterable
from dataclasses import replace

import torch
from timm.optim import Lamb, Lars
from torch import nn

from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.pretrain import layer_decay
from prelude.pretrain.config import Config
from prelude.pretrain.schedules import Progress, cosine, linear, warmup_cosine, whole_intervals

TOKENS = ("cls_token", "mask_token", "reg_token", "dist_token", "pos_embed")
# Biases and frequencies of positions and temperatures of attention, whose authors do not mean to decay them: at 0 they
# would say nothing. Parts of names, of a tensor or of a small network that computes the biases. timm's own
# `no_weight_decay` is not asked: it spares tokens, which the recipe decides on, and some of these it leaves out.
_POSITIONS = {
    "relative_position_bias_table",
    "attention_biases",  # LeViT, EfficientViT, EfficientFormer, TinyViT
    "cpb_mlp",  # Swin V2
    "meta_mlp",  # Swin V2, as timm trained it
    "rel_pos",  # MaxViT and others
    "rel_pos_h",  # MViT, SAM
    "rel_pos_w",
    "freqs",
    "logit_scale",
    "temperature",  # XCiT, EdgeNeXt
}


def parameter_groups(
    module: nn.Module,
    *,
    decay_tokens: bool,
    decay_vectors: bool = False,
    lr_scales: dict[str, float] | None = None,
    still: Collection[str] = (),
) -> list[dict]:
    """Trainable parameters in a decayed and an undecayed group, named so that they are never told apart by place.

    Decayed is what has more than one dimension and is no bias (the rule of the official MAE code), nor computes biases
    of pairs of patches, nor is a temperature; with `decay_tokens=False`, tokens and position tables are spared too, and
    with `decay_vectors` no vector is. Empty groups are left out, because DeepSpeed removes them and would shift the
    others. lr_scales: multipliers of the learning rate by name, 1 where a name is absent. still: names of parameters
    that get groups of their own, whose rate is 0 for the first `train.freeze_encoder_steps`.
    """
    scales, members = lr_scales or {}, {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        is_token = parts[-1].startswith(TOKENS)  # pos_embed_win too
        vector = (parameter.ndim <= 1 or name.endswith(".bias")) and not decay_vectors
        spared = vector or (is_token and not decay_tokens) or not _POSITIONS.isdisjoint(parts)
        members.setdefault((-scales.get(name, 1.0), spared, name in still), []).append(parameter)
    groups = []
    for (minus_scale, spared, stays), parameters in sorted(members.items(), key=lambda item: item[0]):
        name, scale = ("spared" if spared else "decayed") + (" of the encoder" if stays else ""), -minus_scale
        groups.append(
            {
                "params": parameters,
                "name": name if scale == 1 else f"{name} x {scale:.3g}",
                "decayed": not spared,
                "lr_scale": scale,
                "still": stays,
            }
        )
    return groups


def build_optimizer(
    module: nn.Module, config: Config, lr_scales: dict[str, float] | None = None
) -> torch.optim.Optimizer:
    o = config.optimizer
    scales = dict(lr_scales or {})
    if o.layer_decay < 1:
        of_encoder = layer_decay.lr_scales(module.encoder, o.layer_decay)
        scales |= {f"encoder.{name}": scale * scales.get(f"encoder.{name}", 1.0) for name, scale in of_encoder.items()}
    still = [name for name, _ in module.named_parameters() if name.startswith("encoder.")]
    groups = parameter_groups(
        module,
        decay_tokens=o.decay_tokens,
        decay_vectors=o.decay_vectors,
        lr_scales=scales,
        still=still if config.train.freeze_encoder_steps else (),
    )
    common = {"lr": config.peak_lr, "weight_decay": o.weight_decay}
    match o.name:
        case "adamw":
            return torch.optim.AdamW(groups, betas=o.betas, fused=True, **common)
        case "sgd":
            return torch.optim.SGD(groups, momentum=o.momentum, nesterov=o.nesterov, **common)
        case "lars":
            return Lars(groups, momentum=o.momentum, trust_coeff=0.001, eps=0.0, **common)
        case "lamb":
            # train.gradient_clipping is the engine's; timm's own limit of 1 would come on top
            return Lamb(groups, betas=o.betas, max_grad_norm=None, **common)


def refuse_never_moving(config: Config, num_steps: int) -> None:
    """Raises UserError where a run of so many steps would end before its encoder has moved."""
    if (still := config.train.freeze_encoder_steps) >= num_steps:
        raise UserError(
            f"train.freeze_encoder_steps={still} would hold the encoder still to the end of a run of "
            f"{counted(num_steps, 'step')}; write train.freeze_encoder_steps={num_steps // 10}, or more train.epochs."
        )


def refuse_no_rate(config: Config, start: Progress) -> None:
    """Raises UserError where a run would end before its rate is above 0. start: the run before its first step."""
    num_steps = start.num_steps
    if not any(scheduled(config, replace(start, step=step))[0] for step in range(num_steps)):
        otherwise = "optimizer.warmup_epochs=0" if config.optimizer.warmup_epochs else "optimizer.first_step=0"
        raise UserError(
            f"A run of {counted(num_steps, 'step')} would train nothing, as its learning rate is 0 from beginning to "
            f"end; write more train.epochs, a smaller train.global_batch, or {otherwise}."
        )


def scheduled(config: Config, progress: Progress) -> tuple[float, float]:
    """(learning rate, weight decay) of the next optimizer step."""
    o = config.optimizer
    step, total = progress.step + o.first_step, max(progress.num_steps - o.reach_end, 1)
    warmup, start = o.warmup_epochs * progress.steps_per_epoch, o.warmup_lr * config.lr_factor
    if o.milestones:
        passed = sum(whole_intervals(step / progress.steps_per_epoch, epoch) > 0 for epoch in o.milestones)
        peak = config.peak_lr * o.milestone_factor**passed
        lr = linear(start, peak, step / warmup) if step < warmup else peak
    else:
        end = o.min_lr * config.lr_factor
        lr = warmup_cosine(step, warmup=warmup, total=total, start=start, peak=config.peak_lr, end=end)
    end = o.weight_decay if o.weight_decay_end is None else o.weight_decay_end
    shape = {"cosine": cosine, "linear": linear}[o.weight_decay_schedule]
    return lr, shape(o.weight_decay, end, step / total)


def apply_schedule(groups: Iterable[dict], config: Config, progress: Progress) -> tuple[float, float]:
    """Sets every group for the next step; returns (learning rate, weight decay) of what is decayed, unscaled."""
    lr, weight_decay = scheduled(config, progress)
    for group in groups:
        ratio = 1.0 if group["decayed"] else config.optimizer.spared_lr_ratio
        moves = not (group["still"] and progress.step < config.train.freeze_encoder_steps)
        group["lr"] = lr * ratio * group["lr_scale"] * moves  # a rate of 0 moves no weight, and decays none
        group["weight_decay"] = weight_decay if group["decayed"] else 0.0
    return lr, weight_decay
