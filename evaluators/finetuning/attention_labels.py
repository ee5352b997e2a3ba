"""Labels of pasted images by what the class token looks at, and not by area alone.

    transmix: s <- (s + a) / 2                                                  (TransMix, arXiv 2111.09833)
    mixpro:   s <- c a + (1 - c) s,  c = cos(targets by area, softmax(logits))  (MixPro, arXiv 2304.12043)

- a is the attention to patches that the own image keeps, of that to all patches: the class token's, in the last block,
  mean over heads. Published code draws one box, or share, for each batch; here each image has its own.
- s is the own image's share in the targets. A blend (mixup) has it in each patch, so that a = s and nothing changes.
- Neither attention nor c carries a gradient: targets are not trained.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prelude.data.errors import UserError
from prelude.evaluators.dense.attention import FusedAttention, has_attention
from prelude.evaluators.finetuning.recipe import FineTuneOptions
from prelude.pretrain.config import Config
from prelude.pretrain.mixing import Mixed


def check(options: FineTuneOptions, config: Config, model: nn.Module) -> None:
    """Raises UserError for an encoder whose attention cannot be asked, and a grid that images or patches do not fit."""
    size, cell = config.encoder.size, options.cutmix_cell
    if cell and any(side % cell for side in size):
        raise UserError(
            f"objective.cutmix_cell={cell} does not divide an image of {size[0]}x{size[1]} pixels; write a divisor."
        )
    if options.attention_labels is None:
        return
    if not has_attention(model) or getattr(model, "cls_token", None) is None:
        raise UserError(
            f"objective.attention_labels={options.attention_labels} asks the class token's attention, which "
            f"{config.encoder.name} does not tell; leave it out, or take a plain vision transformer with a class token."
        )
    if options.pooling == "own" and getattr(model, "attn_pool", None) is not None:
        raise UserError(
            f"objective.attention_labels={options.attention_labels} asks the class token's attention, and "
            f"{config.encoder.name} pools with another; write objective.pooling=mean."
        )
    if config.train.compile:
        raise UserError(
            f"objective.attention_labels={options.attention_labels} looks into the last block, which "
            "train.compile=true would hide; write train.compile=false."
        )
    patch = model.patch_embed.patch_size
    if cell and any(cell % side for side in patch):
        raise UserError(
            f"objective.cutmix_cell={cell} is no whole number of patches of {patch[0]}x{patch[1]} pixels; write a "
            f"multiple of {patch[0]}."
        )


def attention_to_patches(last: FusedAttention, num_prefix_tokens: int) -> Tensor:
    """(B, patches) that the class token has paid in the last block, mean over heads."""
    return last.weights(slice(0, 1))[:, :, 0, num_prefix_tokens:].mean(1)


@torch.no_grad()
def relabelled(mixed: Mixed, paid: Tensor, grid: tuple[int, int], logits: Tensor, how: str) -> Tensor:
    """(B, C) targets. paid: (B, patches). grid: rows and columns of patches. logits: (B, C). how: see the module."""
    kept = F.interpolate(mixed.own[:, None], size=grid, mode="nearest").flatten(1)  # (B, patches)
    by_attention = (paid * kept).sum(1) / paid.sum(1)
    if how == "transmix":
        weight = torch.full_like(by_attention, 0.5)
    else:
        weight = F.cosine_similarity(mixed.mixed_targets(), logits.float().softmax(1), dim=1)
    return mixed.mixed_targets(torch.lerp(mixed.share, by_attention, weight))
