"""Where an encoder looks: a map over each image from its last block, or from a stage with enough places.

Nothing of the encoder is changed: weights are read, a hook is removed again, fused attention stays on.
"""

from dataclasses import dataclass

import torch
from timm.layers import Attention
from torch import Tensor, nn

PLACES = 6  # a side of a convnet's map: the deepest stage with as many is looked at


@dataclass(frozen=True)
class Maps:
    values: Tensor  # (B, h, w) float32, not below 0
    what: str  # for a caption


@torch.no_grad()
def maps(model: nn.Module, pixels: Tensor) -> Maps | None:
    """Of a batch (B, 3, H, W), normalised. None for a model that has neither blocks nor stages.

    Plain ViTs: attention that the class token, or else the mean patch token, pays to each patch in the last block,
    mean over heads. All others: the norm of activations.
    """
    if _has_plain_attention(model):
        prefix, grid = model.num_prefix_tokens, model.patch_embed.grid_size
        weights = attention(model, pixels).mean(1)[:, :, prefix:]  # (B, N, patches)
        of_class = getattr(model, "cls_token", None) is not None
        paid = weights[:, 0] if of_class else weights[:, prefix:].mean(1)  # (B, patches)
        who = "the class token pays" if of_class else "patches pay on average"
        return Maps(paid.unflatten(1, grid), f"attention that {who} to each patch in the last block, mean over heads")
    if not hasattr(model, "forward_intermediates"):
        return None
    stages = model.forward_intermediates(pixels, intermediates_only=True)  # (B, C, h, w) each
    enough = [i for i, stage in enumerate(stages) if min(stage.shape[2:]) >= PLACES] or [0]
    chosen = stages[enough[-1]]
    height, width = chosen.shape[2:]
    place = f"stage {enough[-1]} of {len(stages)} (counted from 0, {height} x {width} places)"
    return Maps(chosen.float().norm(dim=1), f"norm of the activations of {place}")


def attention(model: nn.Module, pixels: Tensor) -> Tensor:
    """(B, heads, N, N) weights of a plain ViT's last block, each row with sum 1, prefix tokens first."""
    block, seen = model.blocks[-1].attn, []
    hook = block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        model.forward_features(pixels)
    finally:
        hook.remove()
    (tokens,) = seen  # (B, N, D)
    heads = block.qkv(tokens).unflatten(2, (3, block.num_heads, block.head_dim)).permute(2, 0, 3, 1, 4)
    queries, keys = block.q_norm(heads[0]), block.k_norm(heads[1])  # (B, heads, N, d)
    return (queries @ keys.transpose(2, 3) * block.scale).float().softmax(3)


def _has_plain_attention(model: nn.Module) -> bool:
    blocks = getattr(model, "blocks", None)
    plain = isinstance(blocks, nn.Sequential | nn.ModuleList) and isinstance(
        getattr(blocks[-1], "attn", None), Attention
    )
    return plain and hasattr(model, "num_prefix_tokens") and hasattr(getattr(model, "patch_embed", None), "grid_size")
