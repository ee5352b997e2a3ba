"""Blocks of transformers over patch tokens, and the small ones that objectives put behind an encoder."""

import re
from functools import partial

from timm.models.vision_transformer import Block
from torch import nn

LayerNorm = partial(nn.LayerNorm, eps=1e-6)
_ADDS = re.compile(r"(.*\.)?(attn\.proj|mlp\.fc2|(attn_|mlp_)?out_proj)")


def transformer_blocks(width: int, depth: int, num_heads: int) -> nn.ModuleList:
    """Pre-norm blocks as in a plain ViT: qkv bias, exact GELU, MLP four times as wide, LayerNorm eps 1e-6."""
    return nn.ModuleList(
        Block(width, num_heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth)
    )


def added_by(block: nn.Module) -> list[nn.Linear]:
    """The layers whose products a block of timm's adds to its tokens, one after the other or side by side."""
    return [layer for name, layer in block.named_modules() if _ADDS.fullmatch(name) and isinstance(layer, nn.Linear)]


def xavier_init(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every Linear, ones and zeros for every LayerNorm, in place.

    The fused query-key-value matrix counts as one D -> 3D matrix, as in the official MAE code; its bound is
    smaller than that of three D -> D matrices.
    """
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.LayerNorm):
            child.reset_parameters()
