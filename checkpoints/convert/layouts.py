"""One network's tensors, under the names of whoever published them, brought to timm's names.

Each layout is recognised by its keys and renamed whole: every tensor of the network is either an encoder's, or left out
under a name that a message can give. Nothing is found by a part of a name inside another.
"""

import re
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from prelude.checkpoints.convert.renaming import Layout, Tensors, any_name, joined_qkv, rename, without
from prelude.checkpoints.convert.rotary import dinov3, dinov3_of_transformers, eva02
from prelude.data.counting import counted
from prelude.data.errors import UserError


def layout_of(tensors: Tensors, where: str) -> Layout:
    """Raises UserError for a network of no known layout."""
    for recognised, convert in _LAYOUTS:
        if recognised(tensors):
            return convert(tensors, where)
    shown = sorted(tensors)
    raise UserError(
        f"{where} is in no layout that is known: it has {counted(len(shown), 'tensor')}, such as "
        f"{', '.join(shown[:4])}; "
        "docs/encoders.md lists those that are."
    )


# ---- the block of facebookresearch, whose names are timm's


def _mae(tensors: Tensors, where: str) -> Layout:
    """With its decoder: the whole of a pretraining file."""
    parts = {n: t for n, t in tensors.items() if n.startswith("decoder_") or n == "mask_token"}
    own = {n: t for n, t in parts.items() if n != "decoder_pos_embed"}  # a formula's table, which any grid has
    inner = _timm_vit({n: t for n, t in tensors.items() if n not in parts}, where)
    left_out = inner.left_out | {f"decoder.{n}": t for n, t in parts.items()}
    return replace(inner, name="MAE", resampling="plain", norm_eps=1e-6, left_out=left_out, own=own)


def _dinov2(tensors: Tensors, where: str) -> Layout:
    """Blocks may be in chunks, whose second number counts through."""
    renamed = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
        renamed[name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")] = tensor
    if len(renamed) < len(tensors):
        raise UserError(f"{where} names blocks twice; it is no DINOv2 file that can be read.")
    left_out = {"mask_token": renamed.pop("mask_token")}
    if "register_tokens" not in renamed:
        return Layout("DINOv2", renamed, "offset", norm_eps=1e-6, left_out=left_out)
    _with_registers(renamed, renamed.pop("register_tokens"), where)
    return Layout("DINOv2 with registers", renamed, "timm", False, 1e-6, left_out=left_out)


def _with_registers(tensors: Tensors, registers: Tensor, where: str) -> None:
    """timm gives prefix tokens no rows then: the class row is added to the class token, registers never had one."""
    for name in ("pos_embed", "cls_token"):
        if name not in tensors:
            raise UserError(f"{where} lacks {name}, so its class token cannot be told; fetch it again.")
    table = tensors["pos_embed"]
    tensors["reg_token"] = registers
    tensors["cls_token"] = tensors["cls_token"] + table[:, :1]
    tensors["pos_embed"] = table[:, 1:]


def _timm_vit(tensors: Tensors, where: str) -> Layout:
    kept, left_out = without(tensors, "head.")
    return Layout("ViT, timm layout", kept, left_out=left_out, table_has_prefix=None)


def _eva(tensors: Tensors, where: str) -> Layout:
    """timm's EVA under its own names, and EVA's first models, which have the same."""
    kept, left_out = without(tensors, "head.", "lm_head.", "mask_token")
    told = {"table_has_prefix": "reg_token" not in kept, "untold": "its rotations", "left_out": left_out}
    return Layout("EVA, timm layout", kept, **told)


def _beit(tensors: Tensors, where: str) -> Layout:
    """As published, which is timm's too. The numbers of pairs are no weights, but follow from the grid."""
    kept, left_out = without(tensors, "head.", "lm_head.", "mask_token")
    left_out |= {name: t for name, t in kept.items() if name.endswith("relative_position_index")}
    kept = {name: tensor for name, tensor in kept.items() if name not in left_out}
    return Layout("BEiT", kept, untold="its attention heads and its pooling", left_out=left_out)


# ---- torchvision


def _torchvision_vit(tensors: Tensors, where: str) -> Layout:
    block = r"^encoder\.layers\.encoder_layer_(\d+)\."
    rules = [
        (r"^class_token$", "cls_token"),
        (r"^encoder\.pos_embedding$", "pos_embed"),
        (r"^conv_proj\.", "patch_embed.proj."),
        (block + r"ln_([12])\.", r"blocks.\1.norm\2."),
        (block + r"self_attention\.in_proj_", r"blocks.\1.attn.qkv."),
        (block + r"self_attention\.out_proj\.", r"blocks.\1.attn.proj."),
        (block + r"mlp\.(?:0|linear_1)\.", r"blocks.\1.mlp.fc1."),
        (block + r"mlp\.(?:3|linear_2)\.", r"blocks.\1.mlp.fc2."),
        (r"^encoder\.ln\.", "norm."),
    ]
    kept, left_out = without(tensors, "heads.")
    return Layout("torchvision ViT", rename(kept, rules), "corners", norm_eps=1e-6, left_out=left_out)


def _torchvision_convnext(tensors: Tensors, where: str) -> Layout:
    kept, left_out = without(tensors, "classifier.2.")
    inner = {"0": "conv_dw", "2": "norm", "3": "mlp.fc1", "5": "mlp.fc2"}
    renamed = {}
    for name, tensor in kept.items():
        block = re.match(r"features\.([1357])\.(\d+)\.(layer_scale|block\.([0235])\.)", name)
        down = re.match(r"features\.([246])\.([01])\.", name)
        if block:
            stage, rest = (int(block[1]) - 1) // 2, name[block.end() :]
            if block[4] is None:
                renamed[f"stages.{stage}.blocks.{block[2]}.gamma"] = tensor.flatten()  # (C, 1, 1) to (C,)
            else:
                renamed[f"stages.{stage}.blocks.{block[2]}.{inner[block[4]]}.{rest}"] = tensor
        elif down:
            renamed[f"stages.{int(down[1]) // 2}.downsample.{down[2]}.{name[down.end() :]}"] = tensor
        else:
            renamed[re.sub(r"^classifier\.0\.", "head.norm.", re.sub(r"^features\.0\.", "stem.", name))] = tensor
    return Layout("torchvision ConvNeXt", renamed, norm_eps=1e-6, left_out=left_out)


def _convnext(tensors: Tensors, where: str) -> Layout:
    """The original names, which SparK and DINOv3 have too; DINOv3 has its last norm twice."""
    kept, left_out = without(tensors, "head.")
    for name in [name for name in kept if name.startswith("norms.3.")]:
        left_out[name] = kept.pop(name)
        if not torch.equal(left_out[name], kept.get(name.replace("norms.3.", "norm."), left_out[name].new_empty(0))):
            raise UserError(f"{where} has two last norms that differ, norm and norms.3; fetch it again.")
    rules = [
        (r"^downsample_layers\.0\.", "stem."),
        (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
        (r"^stages\.(\d)\.(\d+)\.dwconv\.", r"stages.\1.blocks.\2.conv_dw."),
        (r"^stages\.(\d)\.(\d+)\.pwconv([12])\.", r"stages.\1.blocks.\2.mlp.fc\3."),
        (r"^stages\.(\d)\.(\d+)\.(norm\.|gamma$)", r"stages.\1.blocks.\2.\3"),
        (r"^norm\.", "head.norm."),
    ]
    renamed = rename(kept, rules)
    may_lack = () if any(name.startswith("head.norm.") for name in renamed) else ("head.norm.weight", "head.norm.bias")
    return Layout("ConvNeXt, original names", renamed, norm_eps=1e-6, may_lack=may_lack, left_out=left_out)


def _timm_convnext(tensors: Tensors, where: str) -> Layout:
    kept, left_out = without(tensors, "head.fc.")
    return Layout("ConvNeXt, timm layout", kept, norm_eps=1e-6, left_out=left_out)


def _resnet(tensors: Tensors, where: str) -> Layout:
    kept, left_out = without(tensors, "fc.")
    return Layout("ResNet", kept, left_out=left_out)


# ---- transformers


def _transformers(tensors: Tensors, where: str) -> Layout:
    """ViT, I-JEPA and DINOv2 on disk, and ViTMAE with its decoder."""
    decoder = {n.removeprefix("decoder."): t for n, t in tensors.items() if n.startswith("decoder.")}
    left_out = {n: t for n, t in tensors.items() if n.startswith(("pooler.", "classifier.", "decoder."))}
    kept = {n: t for n, t in tensors.items() if n not in left_out}
    kept = joined_qkv(rename(kept, _TRANSFORMERS), where)
    for name in [name for name in kept if name == "mask_token"]:
        left_out[name] = kept.pop(name)
    if "reg_token" in kept:
        _with_registers(kept, kept["reg_token"], where)
        return Layout("transformers DINOv2 with registers", kept, "timm", False, left_out=left_out)
    own = {}
    if decoder:
        decoder.pop("decoder_pos_embed", None)
        own = joined_qkv(rename(decoder, _TRANSFORMERS_DECODER), where)
    name = "transformers ViTMAE" if own else "transformers"
    return Layout(name, kept, "plain", left_out=left_out, own=own)


def _transformers_resnet(tensors: Tensors, where: str) -> Layout:
    kept, left_out = without(tensors, "classifier.")
    renamed = {}
    for name, tensor in kept.items():
        unit = re.match(r"encoder\.stages\.(\d)\.layers\.(\d+)\.(shortcut|layer\.([012]))\.(conv|norm)[a-z]+\.", name)
        if unit:
            place = f"layer{int(unit[1]) + 1}.{unit[2]}"
            if unit[4] is None:
                place += f".downsample.{0 if unit[5] == 'conv' else 1}"
            else:
                place += f".{'conv' if unit[5] == 'conv' else 'bn'}{int(unit[4]) + 1}"
            renamed[f"{place}.{name[unit.end() :]}"] = tensor
        else:
            renamed[next((to + name.removeprefix(first) for first, to in _STEM if name.startswith(first)), name)] = (
                tensor
            )
    return Layout("transformers ResNet", renamed, left_out=left_out)


_STEM = [("embedder.embedder.convolution.", "conv1."), ("embedder.embedder.normalization.", "bn1.")]


def _block_rules(found: str, wanted: str) -> list[tuple[str, str]]:
    return [
        (found + r"attention\.attention\.(query|key|value)\.", wanted + r"attn.\2."),
        (found + r"attention\.output\.dense\.", wanted + "attn.proj."),
        (found + r"layernorm_before\.", wanted + "norm1."),
        (found + r"layernorm_after\.", wanted + "norm2."),
        (found + r"intermediate\.dense\.", wanted + "mlp.fc1."),
        (found + r"output\.dense\.", wanted + "mlp.fc2."),
        (found + r"(norm[12]\.|mlp\.fc[12]\.)", wanted + r"\2"),
        (found + r"mlp\.weights_in\.", wanted + "mlp.fc1."),
        (found + r"mlp\.weights_out\.", wanted + "mlp.fc2."),
        (found + r"layer_scale([12])\.lambda1$", wanted + r"ls\2.gamma"),
    ]


_TRANSFORMERS = [
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    *_block_rules(r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
]
_TRANSFORMERS_DECODER = [
    # Published files have the first name; transformers 5 writes the second.
    *_block_rules(r"^(?:decoder_layers|decoder_encoder\.layer)\.(\d+)\.", r"decoder_blocks.\1."),
    (r"^(mask_token$|decoder_embed\.|decoder_norm\.|decoder_pred\.)", r"\1"),
]


# ---- what is known and has no place here


def _refusal(what: str, instead: str) -> Callable[[Tensors, str], Layout]:
    def refuse(tensors: Tensors, where: str) -> Layout:
        raise UserError(f"{where} is {what}, which cannot be loaded: {instead}.")

    return refuse


_ROTNET = _refusal(
    "a network of RotNet's (its NIN or AlexNet)",
    "timm has no such architecture; write the weights of a timm encoder",
)
_SAPIENS = _refusal("a Sapiens-2 model", "timm has no such architecture; write the weights of a timm encoder")
_IN_MEMORY = _refusal(
    "the state of a transformers model in memory",
    "save it with save_pretrained(FOLDER), and write FOLDER",
)

# In this order: an earlier one's keys may have a later one's among them.
_LAYOUTS: list[tuple[Callable[[Tensors], bool], Callable[[Tensors, str], Layout]]] = [
    (lambda t: any_name(t, r"_feature_blocks\."), _ROTNET),
    (lambda t: any_name(t, r".*attn\.wq\.") and any_name(t, r".*ffn\.w12\."), _SAPIENS),
    (lambda t: "storage_tokens" in t or "rope_embed.periods" in t, dinov3),
    (lambda t: "embeddings.patch_embeddings.weight" in t, dinov3_of_transformers),
    (lambda t: any_name(t, r"embeddings\.patch_embeddings\.projection\.") and any_name(t, r"layers\.\d"), _IN_MEMORY),
    (lambda t: any_name(t, r"embeddings\.patch_embeddings\.projection\."), _transformers),
    (lambda t: any_name(t, r"embedder\.embedder\.") and any_name(t, r"encoder\.stages\.\d"), _transformers_resnet),
    (lambda t: any_name(t, r"conv_proj\.") and "class_token" in t, _torchvision_vit),
    (lambda t: any_name(t, r"decoder_blocks\.") and any_name(t, r"blocks\.\d"), _mae),
    (lambda t: "mask_token" in t and t["mask_token"].ndim == 2 and any_name(t, r"blocks\..*ls1\.gamma"), _dinov2),
    (lambda t: any_name(t, r"(blocks\.\d+\.attn|rel_pos_bias)\.relative_position_bias_table$"), _beit),
    (lambda t: any_name(t, r"blocks\.\d+\.mlp\.w3\."), eva02),
    (lambda t: any_name(t, r"blocks\.\d+\.(gamma_1$|mlp\.fc1_g\.|attn\.q_bias$)"), _eva),
    (lambda t: any_name(t, r"blocks\.\d+\.attn\.qkv\."), _timm_vit),
    (lambda t: any_name(t, r"downsample_layers\."), _convnext),
    (lambda t: any_name(t, r"features\.0\.0\.") and any_name(t, r".*layer_scale$"), _torchvision_convnext),
    (lambda t: any_name(t, r"stages\.\d\.blocks\.\d+\.conv_dw\."), _timm_convnext),
    (lambda t: any_name(t, r"layer1\.0\.conv1\."), _resnet),
]
