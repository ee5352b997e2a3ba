"""The timm architecture of a vision transformer with rotary positions: DINOv3 and EVA-02."""

import re

import timm
from torch import Tensor

from prelude.checkpoints.convert.weights import Weights
from prelude.data.errors import UserError
from prelude.pretrain.config import EncoderConfig

_GRID = 16  # rows and columns of patches that an encoder without a table of positions is judged at
_REGISTERS = 4
# (width, depth, heads, whether the MLP is gated) of timm's DINOv3 models
_DINOV3 = {
    (384, 12, 6, False): "small",
    (384, 12, 6, True): "small_plus",
    (768, 12, 12, False): "base",
    (1024, 24, 16, False): "large",
    (1280, 32, 20, True): "huge_plus",
    (4096, 40, 32, True): "7b",
}
# (width, depth, heads, hidden width) of timm's EVA-02 models
_EVA02 = {
    (192, 12, 3, 512): "tiny",
    (384, 12, 6, 1024): "small",
    (768, 12, 12, 2048): "base",
    (1024, 24, 16, 2730): "large",
}


def is_eva(tensors: dict[str, Tensor]) -> bool:
    """Whether these names are of timm's EVA and not of its plain ViT."""
    return any(re.match(r"blocks\.\d+\.(gamma_1$|attn\.(q_bias$|q_proj\.)|mlp\.fc1_g\.)", name) for name in tensors)


def eva_config(weights: Weights, image_size: int | None) -> EncoderConfig:
    """image_size: pixels; None: 16 patches a side where the file has no table of positions. Raises UserError."""
    tensors, where = weights.tensors, weights.where
    width, patch = len(tensors["patch_embed.proj.weight"]), tensors["patch_embed.proj.weight"].shape[-1]
    heads = weights.num_heads
    if heads is None:
        raise UserError(
            f"{where} does not tell the number of its attention heads, and no model of width {width} is known; write "
            f"{weights.before_word}num_heads=N."
        )
    depth = 1 + max(int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name)))
    hidden = next((t.shape[1] for n, t in sorted(tensors.items()) if n.endswith(".mlp.fc2.weight")), 4 * width)
    kwargs = {"embed_dim": width, "depth": depth, "num_heads": heads, "mlp_ratio": _ratio(width, hidden)}
    if "pos_embed" not in tensors:
        name, more, size = _dinov3(weights, kwargs)
        size = (image_size or size,) * 2
    else:
        name, more, size = _eva02(weights, kwargs, hidden)
    return EncoderConfig(
        name=name,
        image_size=size[0] if size[0] == size[1] else size,
        patch_size=None if f"_patch{patch}_" in name else patch,
        pos_embed="learned" if "pos_embed" in tensors else "sincos",
        kwargs=more,
    )


def _dinov3(weights: Weights, shape: dict) -> tuple[str, dict, int]:
    tensors = weights.tensors
    gated = any(name.endswith(".mlp.fc1_g.weight") for name in tensors)
    known = _DINOV3.get((shape["embed_dim"], shape["depth"], shape["num_heads"], gated))
    name = f"vit_{known or ('small_plus' if gated else 'small')}_patch16_dinov3"
    kwargs = {} if known and timm.is_model(name) else dict(shape)
    kwargs["global_pool"] = "token"  # what is evaluated; timm's default is the mean
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    if registers != _REGISTERS:
        kwargs["num_reg_tokens"] = registers
    if any(name.endswith(".attn.q_bias") for name in tensors):
        kwargs["qkv_bias"] = True
    return name, kwargs, _GRID * tensors["patch_embed.proj.weight"].shape[-1]


def _eva02(weights: Weights, shape: dict, hidden: int) -> tuple[str, dict, tuple[int, int]]:
    tensors, where = weights.tensors, weights.where
    if weights.grid is None:
        raise UserError(
            f"{where} has a table of positions that fits no square of patches; write "
            f"{weights.before_word}grid=ROWSxCOLUMNS."
        )
    packed = any(name.endswith(".attn.qkv.weight") for name in tensors)
    known = _EVA02.get((shape["embed_dim"], shape["depth"], shape["num_heads"], hidden))
    name = f"eva02_{known or ('tiny' if packed else 'base')}_patch14_224"
    kwargs = {} if known else dict(shape)
    if "fc_norm.weight" not in tensors:
        kwargs |= {"use_fc_norm": False, "use_post_transformer_norm": True}
    if any(name.endswith(".attn.norm.weight") for name in tensors):
        kwargs["scale_attn_inner"] = True
    side = tensors["patch_embed.proj.weight"].shape[-1]
    return name, kwargs, (weights.grid[0] * side, weights.grid[1] * side)


def _ratio(width: int, hidden: int) -> float:
    """timm takes the whole part of width times this."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
