"""The timm architecture that a file's tensors belong to, for where none is named.

Shapes tell width, depth, patch and classes of layers. They do not tell attention heads, mean and standard deviation of
the pixels, nor a grid that is no square: those come from the format, from the user's words, or the file is refused.
"""

import math
import re

import timm
from torch import Tensor

from prelude.checkpoints.convert.eva import eva_config, is_eva
from prelude.checkpoints.convert.weights import Weights
from prelude.data.errors import UserError
from prelude.pretrain.config import EncoderConfig

# Width, depth, heads and hidden width of timm's plain vision transformers.
_VITS = {
    (192, 12, 3, 768): "tiny",
    (384, 12, 6, 1536): "small",
    (768, 12, 12, 3072): "base",
    (1024, 24, 16, 4096): "large",
    (1280, 32, 16, 5120): "huge",
    (1408, 40, 16, 6144): "giant",
}
_RESNETS = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
    (True, (3, 24, 36, 3)): "resnet200",
}
_CONVNEXTS = {
    ((3, 3, 9, 3), (96, 192, 384, 768)): "convnext_tiny",
    ((3, 3, 27, 3), (96, 192, 384, 768)): "convnext_small",
    ((3, 3, 27, 3), (128, 256, 512, 1024)): "convnext_base",
    ((3, 3, 27, 3), (192, 384, 768, 1536)): "convnext_large",
}
_CONVNET_SIZE = 224  # pixels that convnets were trained and are judged at; they take any


def encoder_config(weights: Weights, image_size: int | None = None) -> EncoderConfig:
    """The architecture whose `state_dict` these weights fill. image_size: pixels, of a model that takes any.

    Raises UserError.
    """
    tensors = weights.tensors
    found, first = None, None
    if "patch_embed.proj.weight" in tensors:
        found = eva_config(weights, image_size) if is_eva(tensors) else _vit(weights)
        first = "patch_embed.proj.weight"
    elif any(name.startswith("stages.") for name in tensors):
        found, first = _convnext(tensors, image_size or _CONVNET_SIZE), "stem.0.weight"
    elif "conv1.weight" in tensors:
        found, first = _resnet(tensors, image_size or _CONVNET_SIZE), "conv1.weight"
    if found and (first not in tensors or tensors[first].ndim != 4):
        return found  # damaged, as whoever fits it will say
    if found:
        return found.model_copy(update={"in_chans": tensors[first].shape[1]})
    if any(re.match(r"conv1\.\d|stem\.", name) for name in tensors):
        raise UserError(
            f"{weights.where} ({weights.format}) has a stem of several layers, and a file tells plain stems only; "
            "write timm:NAME, a folder with a config.json of timm's, or in a run encoder.name beside encoder.weights."
        )
    raise UserError(
        f"{weights.where}: {weights.format} lacks its first layer, so no architecture can be told; fetch it again."
    )


def _vit(weights: Weights) -> EncoderConfig:
    tensors, where = weights.tensors, weights.where
    projection = tensors["patch_embed.proj.weight"]
    width, patch = len(projection), projection.shape[-1]
    if projection.shape[-2] != patch:
        raise UserError(
            f"{where} has patches that are no squares, {tuple(projection.shape[2:])}; name an architecture."
        )
    if weights.num_heads is None:
        raise UserError(
            f"{where} does not tell the number of its attention heads, and no model of width {width} is known; write "
            f"{weights.before_word}num_heads=N."
        )
    if weights.grid is None:
        raise UserError(
            f"{where} has {'a' if 'pos_embed' in tensors else 'no'} table of positions that fits no square of patches; "
            f"write {weights.before_word}grid=ROWSxCOLUMNS."
        )
    blocks = [int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))]
    depth = 1 + max(blocks)
    hidden = _first(tensors, r"blocks\.\d+\.mlp\.fc2\.weight", 1, 4 * width)
    kwargs = _differences(weights, width, depth, hidden)
    name = _VITS.get((width, depth, weights.num_heads, hidden))
    if name:
        kwargs = {key: kwargs[key] for key in kwargs if key not in ("embed_dim", "depth", "num_heads", "mlp_ratio")}
    name = f"vit_{name or 'base'}_patch{patch}_224"
    if not timm.is_model(name):
        name = "vit_base_patch16_224" if "embed_dim" in kwargs else name.replace(f"_patch{patch}_", "_patch16_")
    if _is_swiglu(tensors, hidden):
        name = "vit_giant_patch14_dinov2"  # the layer's class is no keyword that a config can hold
        kwargs |= {"embed_dim": width, "depth": depth, "num_heads": weights.num_heads, "mlp_ratio": 2 * hidden / width}
    if not timm.is_model(name):
        name = {"huge": "vit_huge_patch14_224", "giant": "vit_giant_patch14_224"}[name.split("_")[1]]
    size = tuple(side * patch for side in weights.grid)
    return EncoderConfig(
        name=name,
        image_size=size[0] if size[0] == size[1] else size,
        patch_size=patch,
        pos_embed="sincos" if weights.has_sincos_table else "learned",
        norm_eps=None if weights.norm_eps in (None, 1e-6) else weights.norm_eps,
        kwargs=kwargs,
    )


def _differences(weights: Weights, width: int, depth: int, hidden: int) -> dict:
    """What differs from timm's plain ViT, which has a class token that it pools, and biases."""
    tensors = weights.tensors
    kwargs = {"embed_dim": width, "depth": depth, "num_heads": weights.num_heads}
    if hidden != 4 * width:
        kwargs["mlp_ratio"] = hidden / width
    has_class = "cls_token" in tensors
    if not has_class:
        kwargs["class_token"] = False
    if "fc_norm.weight" in tensors:
        kwargs |= {"global_pool": "avg", "fc_norm": True}
    elif not has_class:
        kwargs |= {"global_pool": "avg", "fc_norm": False}
    if "reg_token" in tensors:
        kwargs |= {"reg_tokens": tensors["reg_token"].shape[1], "no_embed_class": not weights.prefix_rows}
    elif has_class and not weights.prefix_rows:
        kwargs["no_embed_class"] = True
        if weights.format.startswith("DSeq-JEPA"):  # whose patches are averaged
            kwargs |= {"global_pool": "avg", "fc_norm": False}
    if any(name.endswith(".ls1.gamma") for name in tensors):
        kwargs["init_values"] = 1e-5
    if not any(name.endswith(".attn.qkv.bias") for name in tensors):
        kwargs["qkv_bias"] = False
    return kwargs


def _is_swiglu(tensors: dict[str, Tensor], hidden: int) -> bool:
    """A gated layer's first matrix makes gate and value at once."""
    return _first(tensors, r"blocks\.\d+\.mlp\.fc1\.weight", 0, hidden) == 2 * hidden


def _resnet(tensors: dict[str, Tensor], image_size: int) -> EncoderConfig:
    bottleneck = "layer1.0.conv3.weight" in tensors
    layers = tuple(_count(tensors, rf"layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    channels = [_first(tensors, rf"layer{stage}\.\d+\.conv1\.weight", 0, 64) for stage in (1, 2, 3, 4)]
    kwargs = {}
    if bottleneck:  # ResNeXt's have groups, wide ones more channels within
        within = channels[0]
        channels = [_first(tensors, rf"layer{stage}\.\d+\.conv3\.weight", 0, 256) // 4 for stage in (1, 2, 3, 4)]
        groups = max(1, within // _first(tensors, r"layer1\.\d+\.conv2\.weight", 1, within))
        group_width = 64 * within // (max(1, channels[0]) * groups)
        kwargs = {"cardinality": groups, "base_width": group_width} if (groups, group_width) != (1, 64) else {}
    name = _RESNETS.get((bottleneck, layers))
    if not name:
        name, kwargs = "resnet50" if bottleneck else "resnet18", kwargs | {"layers": list(layers)}
    if channels != [64, 128, 256, 512]:
        kwargs["channels"] = channels
    return EncoderConfig(name=name, image_size=image_size, kwargs=kwargs)


def _convnext(tensors: dict[str, Tensor], image_size: int) -> EncoderConfig:
    depths = tuple(_count(tensors, rf"stages\.{stage}\.blocks\.(\d+)\.") for stage in range(4))
    dims = tuple(_first(tensors, rf"stages\.{stage}\.blocks\.\d+\.conv_dw\.weight", 0, 0) for stage in range(4))
    name = _CONVNEXTS.get((depths, dims))
    kwargs = {} if name else {"depths": list(depths), "dims": list(dims)}
    return EncoderConfig(name=name or "convnext_tiny", image_size=image_size, kwargs=kwargs)


def _count(tensors: dict[str, Tensor], pattern: str) -> int:
    return 1 + max((int(found[1]) for name in tensors if (found := re.match(pattern, name))), default=-1)


def _first(tensors: dict[str, Tensor], pattern: str, dimension: int, otherwise: int) -> int:
    """A length that most of the tensors that match agree on: one that is damaged must not decide."""
    alike = [tensor for name, tensor in tensors.items() if re.fullmatch(pattern, name)]
    found = [tensor.shape[dimension] for tensor in alike if tensor.ndim > dimension and tensor.shape[dimension]]
    return max(set(found), key=found.count) if found else math.trunc(otherwise)
