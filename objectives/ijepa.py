"""I-JEPA (Assran et al., "Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture",
arXiv 2301.08243).

From one large visible part of an image, predict what a slowly moving copy of the encoder makes of four other parts:

    target    = layer_norm(teacher(image))                    read out at the patches of each target block
    context   = encoder(patches of the context block that no target covers)
    predicted = predictor(context, mask token + position of every patch of a target block), one block at a time
    loss      = mean of smooth_l1(predicted - target)
    teacher   = m * teacher + (1 - m) * encoder               after every optimizer step; m rises to 1

- The teacher sees the whole image; hidden pixels never reach the encoder; no gradient reaches the teacher.
- Targets and loss are float32 at least, under any autocast.
- What is evaluated and exported is the teacher.
- `contrastive_weight` adds VICReg's terms on each block's mean prediction, as C-JEPA does (arXiv 2410.19560).
"""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from prelude.data.batch import Batch, View, ViewPlan
from prelude.data.errors import UserError
from prelude.objectives.blocks import BlockMasks, MultiBlock
from prelude.objectives.contrastive_term import BlockTerm
from prelude.objectives.momentum_teacher import follow, momentum_teacher
from prelude.objectives.official_blocks import OfficialMultiBlock
from prelude.objectives.options import IJEPAOptions
from prelude.objectives.patch_pictures import Panel, block_panels, page
from prelude.objectives.predictor import Predictor
from prelude.objectives.token_blocks import added_by
from prelude.pretrain.batch_norm import synchronise
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import check_encoder, forward_tokens, token_layout
from prelude.pretrain.feature_health import feature_health, teacher_cosine
from prelude.pretrain.images import denormalise
from prelude.pretrain.images import images as device_images
from prelude.pretrain.kept_patches import prefix_tokens
from prelude.pretrain.objective import Loss, Objective
from prelude.pretrain.schedules import Progress, linear
from prelude.pretrain.warm_start import drawn_parts, is_warm

_NUM_PICTURES = 6
_INIT_STD = 0.02  # of the official code
_USUAL_VALUES = 768  # of a patch of 16 x 16 x 3
_USUAL_DEPTH = 12
_LOOKED_AT = 500  # steps, among which all sizes of blocks come up


class IJEPA(Objective):
    Options = IJEPAOptions
    contrast = BlockTerm  # made of the encoder's width and the projector's
    lengths_change = True
    max_zero_stage = 2  # the teacher follows whole weights, which stage 3 cuts up
    remedies = {
        "same_features": "lower optimizer.lr, or raise objective.momentum",
        "few_dimensions": "lower optimizer.lr, or raise objective.momentum",
    }

    def __init__(self, encoder: nn.Module, options: IJEPAOptions, *, image_size, mean, std):
        super().__init__(encoder, options, image_size=image_size, mean=mean, std=std)
        # The official code resizes with torchvision's default, which is bilinear.
        view = View(size=image_size, scale=options.crop_scale, interpolation="bilinear", flip=options.flip)
        self.views = ViewPlan(views=(view,), mean=mean, std=std)
        layout = token_layout(encoder)
        self.grid, self.num_prefix = layout.grid, layout.num_prefix  # (rows, columns)
        self.predictor = Predictor(
            layout.width,
            self.grid,
            width=options.predictor_dim,
            depth=options.predictor_depth,
            num_heads=_num_heads(options, layout.num_heads),
        )
        # Drawn with the weights, so from the run's seed alone: what a step's draws depend on beside its number.
        self.salt = int(torch.randint(2**62, ()))
        self.blocks = _sampler(options, self.grid, self.salt)
        self._initialise()
        synchronise(self)
        self.teacher = momentum_teacher(encoder)
        self.accumulates = not self.compares_samples(options)
        if options.contrastive_weight:
            self.vicreg = self.contrast(layout.width, options.contrastive_projector)

    @classmethod
    def check(cls, options: IJEPAOptions, encoder: EncoderConfig) -> None:
        summary = check_encoder(encoder, tokens=True)
        heads = _num_heads(options, summary.num_heads)
        if heads is None:
            raise UserError(
                f"objective.predictor_num_heads=encoder asks encoder.name={encoder.name} for its num_heads, which it "
                "does not say; write a number that divides objective.predictor_dim."
            )
        if options.predictor_dim % heads or options.predictor_dim % 4:
            raise UserError(
                f"objective.predictor_dim={options.predictor_dim} must be a multiple of 4 and of its {heads} attention "
                f"heads; write objective.predictor_num_heads=12 with objective.predictor_dim=384, as in the paper."
            )
        _refuse_grid(options, summary.grid)

    @classmethod
    def compares_samples(cls, options: IJEPAOptions) -> bool:
        return bool(options.contrastive_weight)

    def forward(self, batch: Batch, progress: Progress) -> Loss:
        (images,) = device_images(batch, self.views)  # (B, C, H, W)
        masks = self.blocks.draw(batch.seeds, progress.step)
        features = self.teach(images)
        target = self.normalised(features)  # (B, N, D)
        context = self.encode_context(images, masks)
        predicted = self.predict_targets(context, masks)
        pooled = predicted.detach().float().mean((1, 2))
        parts = feature_health(features.mean(1)) | {
            "teacher_cosine": self.agreement(context, target, masks.context).mean(),
            "prediction_std": pooled.std(0, correction=0).mean(),
        }
        wanted = gather(target, masks.targets)  # (B, M, T, D)
        total = self.error(predicted, wanted).mean()
        if self.options.contrastive_weight:
            contrastive = self.vicreg(predicted.mean(2), wanted.mean(2))
            parts |= {"prediction": total.detach(), "contrastive": contrastive.detach()}
            total = total + self.options.contrastive_weight * contrastive
        return Loss(total, parts)

    def compiled_parts(self) -> list[nn.Module]:
        holders = (self.encoder, self.teacher, self.predictor)
        return [block for holder in holders for block in getattr(holder, "blocks", [])]

    def telling_steps(self) -> tuple[int, int]:
        """By the tokens of each width: blocks have other sizes in every step."""
        sizes = [self.blocks.sizes(step) for step in range(_LOOKED_AT)]
        first = {of_step: step for step, of_step in reversed(list(enumerate(sizes)))}
        by_sizes = {of_step: self._weight(step) for of_step, step in first.items()}
        mean = sum(by_sizes[of_step] for of_step in sizes) / len(sizes)
        usual = min(by_sizes, key=lambda of_step: abs(by_sizes[of_step] - mean))
        return first[usual], first[max(by_sizes, key=by_sizes.__getitem__)]

    def _weight(self, step: int) -> int:
        """About what a step's gradients need: numbers of tokens times width and depth of what they pass through."""
        masks = self.blocks.draw(torch.zeros(1, dtype=torch.int64), step)
        context, (count, target) = masks.context.shape[1], masks.targets.shape[1:]
        asked = count * (context + target) if self.options.predictor == "repeat" else context + count * target
        of_predictor = len(self.predictor.blocks) * self.predictor.proj.in_features
        depth = len(getattr(self.encoder, "blocks", ())) or _USUAL_DEPTH  # an encoder of one's own need not have any
        return context * depth * self.predictor.proj.out_features + asked * of_predictor

    @torch.no_grad()
    def teach(self, images: Tensor) -> Tensor:
        """The teacher's features of every patch of whole images. Returns (B, N, D)."""
        return forward_tokens(self.teacher, images)[:, self.num_prefix :]

    def normalised(self, features: Tensor) -> Tensor:
        """Targets: features with mean 0 and variance 1 over the D channels of each patch, in float32 at least."""
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            return F.layer_norm(features, features.shape[-1:])

    def encode_context(self, images: Tensor, masks: BlockMasks) -> Tensor:
        """The encoder's features of the context. Returns (B, K, D)."""
        return forward_tokens(self.encoder, images, masks.context)[:, self.num_prefix :]

    def predict_targets(self, context: Tensor, masks: BlockMasks) -> Tensor:
        """context: (B, K, D). Returns (B, M, T, D)."""
        checkpointing = self.encoder.grad_checkpointing
        if self.options.predictor == "repeat":
            return self.predictor(context, masks.context, masks.targets, checkpointing=checkpointing)
        num_blocks, length = masks.targets.shape[1:]
        visible = packed_visibility(context.shape[1], num_blocks, length, context.device)
        joined = self.predictor(
            context, masks.context, masks.targets.flatten(1)[:, None], visible, checkpointing=checkpointing
        )  # (B, 1, M * T, D)
        return joined.squeeze(1).unflatten(1, (num_blocks, length))

    def error(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Smooth L1 (beta 1) of each patch: (..., D), (..., D) to (...), in the target's precision."""
        with torch.autocast(target.device.type, enabled=False):
            return F.smooth_l1_loss(predicted.to(target.dtype), target, reduction="none").mean(-1)

    @torch.no_grad()
    def agreement(self, context: Tensor, target: Tensor, ids: Tensor) -> Tensor:
        """How alike encoder and teacher see the same patches, as `teacher_cosine`: near 0 where the teacher has lost
        the encoder that it should follow.

        context: (B, K, D) of the encoder at patches ids, (B, K). target: (B, N, D) of the teacher. Returns (B,).
        """
        return teacher_cosine(self.normalised(context), gather(target, ids))

    def after_step(self, progress: Progress, applied: Tensor) -> None:
        done = progress.step - 1  # steps before the one that was just applied
        o = self.options
        momentum = linear(o.momentum, o.momentum_end, done / progress.num_steps)
        follow(self.teacher, self.encoder, (1.0 - momentum) * applied)

    def exported_encoder(self) -> nn.Module:
        return self.teacher

    def train(self, mode: bool = True) -> "IJEPA":
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Image.Image]:
        """One row an image: the image, the context, and each target block with the context that predicts it.

        Block sizes are those of the run's first step; places are the samples' own.
        """
        batch = batch.head(_NUM_PICTURES)
        (images,) = device_images(batch, self.views)
        masks = self.blocks.draw(batch.seeds, 0)
        return {"blocks": page(self.block_rows(images, masks))}

    def block_rows(self, images: Tensor, masks: BlockMasks) -> list[list[Panel]]:
        pixels = denormalise(images, self.views).cpu()
        return [
            block_panels(pixels[i], self.grid, masks.context[i].tolist(), masks.targets[i].tolist())
            for i in range(len(images))
        ]

    def _initialise(self) -> None:
        """Normal weights of standard deviation 0.02, no bias, as the official code effectively starts; an encoder that
        comes with weights keeps them."""
        for part in drawn_parts(self, self.encoder, self.predictor):
            for module in part.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    std = self._patch_init_std(module) if isinstance(module, nn.Conv2d) else _INIT_STD
                    nn.init.trunc_normal_(module.weight, std=std)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
                elif isinstance(module, nn.LayerNorm):
                    module.reset_parameters()
            if self.options.depth_scaled_init:
                for layer, block in enumerate(part.blocks, start=1):
                    for written in added_by(block):
                        written.weight.data.div_((2 * layer) ** 0.5)
        of_encoder = [] if is_warm(self.encoder) else prefix_tokens(self.encoder)
        for token in (*of_encoder, self.predictor.mask_token):
            nn.init.trunc_normal_(token, std=_INIT_STD)

    def _patch_init_std(self, projection: nn.Conv2d) -> float:
        wanted = self.options.patch_init_std
        return _INIT_STD * (_USUAL_VALUES / projection.weight[0].numel()) ** 0.5 if wanted == "balanced" else wanted


def gather(values: Tensor, ids: Tensor) -> Tensor:
    """Rows of (B, N, D) at ids (B, ...). Returns (B, ..., D)."""
    sample = torch.arange(len(values), device=values.device).view(-1, *[1] * (ids.ndim - 1))
    return values[sample, ids]


def packed_visibility(num_context: int, num_blocks: int, block_length: int, device) -> Tensor:
    """Which token sees which when all targets share one sequence. Returns (1, 1, L, L) bool.

    Context sees context; a mask token sees context and its own block. Unlike in the paper's computation, context
    tokens do not see mask tokens.
    """
    blocks = torch.arange(1, num_blocks + 1, device=device).repeat_interleave(block_length)
    group = torch.cat([blocks.new_zeros(num_context), blocks])  # (L,), 0 for context
    return ((group[None, :] == 0) | (group[None, :] == group[:, None]))[None, None]


def _sampler(options: IJEPAOptions, grid: tuple[int, int], salt: int) -> MultiBlock | OfficialMultiBlock:
    cls = OfficialMultiBlock if options.masks == "official" else MultiBlock
    o = options
    return cls(grid, o.num_targets, o.target_scale, o.target_aspect, o.context_scale, salt)


def _num_heads(options: IJEPAOptions, of_encoder: int) -> int:
    return of_encoder if options.predictor_num_heads == "encoder" else options.predictor_num_heads


def _refuse_grid(options: IJEPAOptions, grid: tuple[int, int]) -> None:
    """Blocks that are too small or leave no context, with a scale of the same kind that works on this grid."""
    problem = _sampler(options, grid, 0).problem()
    if problem is None:
        return
    where = f"objective.target_scale={list(options.target_scale)} on {grid[0]} x {grid[1]} patches {problem}"
    for factor in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2.0, 3.0, 4.0):
        scale = tuple(round(end * factor, 3) for end in options.target_scale)
        changed = options.model_copy(update={"target_scale": scale})
        if 0 < scale[0] and scale[1] < 1 and _sampler(changed, grid, 0).problem() is None:
            raise UserError(f"{where}; write objective.target_scale={list(scale)}, or a smaller encoder.patch_size.")
    raise UserError(f"{where}, and no scale does better; write a smaller encoder.patch_size, or fewer num_targets.")
