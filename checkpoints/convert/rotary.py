"""Vision transformers with rotary positions, brought to the names of timm's EVA: DINOv3 as published and of
`transformers`, and EVA-02.

What a file holds of its rotations are no weights: timm computes them from the grid, so another size of image needs no
resampling. They are checked, because a model with others has the same names and shapes:

| file | holds | timm has |
|---|---|---|
| DINOv3 | `rope_embed.periods`, 100 ** (4 m / width of a head), rounded to bfloat16 | the same, not rounded |
| EVA-02 | `rope.freqs_cos`, `freqs_sin` of each patch, for coordinates as on a grid of 16 x 16 | the same |

DINOv3's rounded periods differ from timm's by up to 0.2 %, features by some 1e-4; here they are timm's.
"""

import re

import torch

from prelude.checkpoints.convert.renaming import Layout, Tensors, joined_qkv, rename, without
from prelude.data.errors import UserError

_BASE, _ROUNDING = 100.0, 0.01  # of DINOv3's periods; above what bfloat16 changes, below any other base
_EVA_GRID, _EVA_BASE, _EVA_TOLERANCE = 16, 10000.0, 1e-2
_CLIP_PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # which EVA-02 takes
_FORMULA = "rotary periods by their formula, those of the file being rounded to bfloat16"


def dinov3(tensors: Tensors, where: str) -> Layout:
    """As published, and the backbone of a training checkpoint."""
    _refuse_class_norm(tensors, where)
    kept, left_out = without(tensors, "rope_embed.", "mask_token", "local_cls_norm.", "head.")
    masks = {name: tensor for name, tensor in kept.items() if name.endswith(".attn.qkv.bias_mask")}
    left_out |= {f"bias_mask.{name}": mask for name, mask in masks.items()}
    biases = {name: tensor for name, tensor in kept.items() if name.endswith(".attn.qkv.bias")}
    kept = {name: tensor for name, tensor in kept.items() if name not in masks and name not in biases}
    for name, bias in biases.items():
        mask = masks.get(f"{name}_mask")
        if mask is not None and not mask.isfinite().all():
            raise UserError(f"{where} has numbers that are not finite in {name}_mask; fetch it again.")
        query, key, value = (bias if mask is None else bias * mask).chunk(3)
        if key.any():
            raise UserError(
                f"{where} has a bias of keys in {name}, for which timm's model has no place; fetch it again."
            )
        stem = name.removesuffix("qkv.bias")
        kept |= {f"{stem}q_bias": query, f"{stem}v_bias": value}
    rules = [
        (r"^storage_tokens$", "reg_token"),
        (r"^blocks\.(\d+)\.ls([12])\.gamma$", r"blocks.\1.gamma_\2"),
        (r"^blocks\.(\d+)\.mlp\.w1\.", r"blocks.\1.mlp.fc1_g."),
        (r"^blocks\.(\d+)\.mlp\.w2\.", r"blocks.\1.mlp.fc1_x."),
        (r"^blocks\.(\d+)\.mlp\.w3\.", r"blocks.\1.mlp.fc2."),
    ]
    periods = tensors.get("rope_embed.periods")
    return _dinov3("DINOv3", rename(_without_zero_biases(kept), rules), left_out, where, periods)


def dinov3_of_transformers(tensors: Tensors, where: str) -> Layout:
    kept, left_out = without(tensors, "embeddings.mask_token", "classifier.", "head.")
    block = r"^(?:layer|encoder\.layer|model\.layer)\.(\d+)\."
    rules = [
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
        (block + r"attention\.q_proj\.bias$", r"blocks.\1.attn.q_bias"),
        (block + r"attention\.v_proj\.bias$", r"blocks.\1.attn.v_bias"),
        (block + r"attention\.q_proj\.", r"blocks.\1.attn.query."),
        (block + r"attention\.k_proj\.", r"blocks.\1.attn.key."),
        (block + r"attention\.v_proj\.", r"blocks.\1.attn.value."),
        (block + r"attention\.o_proj\.", r"blocks.\1.attn.proj."),
        (block + r"layer_scale([12])\.lambda1$", r"blocks.\1.gamma_\2"),
        (block + r"mlp\.gate_proj\.", r"blocks.\1.mlp.fc1_g."),
        (block + r"mlp\.down_proj\.", r"blocks.\1.mlp.fc2."),
        (block + r"(norm[12]\.)", r"blocks.\1.\2"),
        (block + r"mlp\.up_proj\.", r"blocks.\1.mlp." + ("fc1_x." if _is_gated(tensors) else "fc1.")),
    ]
    kept = joined_qkv(rename(kept, rules), where, kinds=("weight",))
    return _dinov3("transformers DINOv3", _without_zero_biases(kept), left_out, where, None)


def eva02(tensors: Tensors, where: str) -> Layout:
    """The last norm is that of the pretraining, of every token; fine-tuned files have one after the pooling."""
    kept, left_out = without(tensors, "rope.", "mask_token", "lm_head.", "head.")
    of_blocks = {name: tensor for name, tensor in kept.items() if ".attn.rope." in name}
    left_out |= {f"rope.{name}": tensor for name, tensor in of_blocks.items()}
    kept = {name: tensor for name, tensor in kept.items() if name not in of_blocks}
    block = r"^blocks\.(\d+)\."
    rules = [
        (block + r"attn\.inner_attn_ln\.", r"blocks.\1.attn.norm."),
        (block + r"mlp\.ffn_ln\.", r"blocks.\1.mlp.norm."),
        (block + r"mlp\.w12\.", r"blocks.\1.mlp.fc1."),
        (block + r"mlp\.w1\.", r"blocks.\1.mlp.fc1_g."),
        (block + r"mlp\.w2\.", r"blocks.\1.mlp.fc1_x."),
        (block + r"mlp\.w3\.", r"blocks.\1.mlp.fc2."),
    ]
    if not any(re.match(block + r"attn\.qkv\.", name) for name in kept):
        rules += [(block + r"attn\.([qv])_bias$", r"blocks.\1.attn.\2_proj.bias")]
    kept = rename(kept, rules)
    num_heads = _check_rotations(left_out, kept, where)
    name = "EVA-02, fine-tuned" if "fc_norm.weight" in kept else "EVA-02"
    return Layout(
        name, kept, "plain", norm_eps=1e-6, left_out=left_out, num_heads=num_heads, pixels=_CLIP_PIXELS
    )  # fmt: skip


# ---- what the parts of a file tell


def _dinov3(name: str, tensors: Tensors, left_out: Tensors, where: str, periods) -> Layout:
    num_heads, notes = None, ()
    if periods is not None:
        count = len(periods)
        formula = _BASE ** (torch.arange(count, dtype=torch.float64) / count)
        if not ((periods.double() / formula - 1).abs() <= _ROUNDING).all():
            raise UserError(
                f"{where} has rotary periods that are not DINOv3's, {_BASE:g} ** (m / {count}); timm's model would "
                "compute others, so fetch it again."
            )
        width = tensors["cls_token"].shape[-1] if "cls_token" in tensors else 0
        num_heads, notes = (width // (4 * count) or None), (_FORMULA,)
    elif "cls_token" in tensors:
        width = tensors["cls_token"].shape[-1]
        num_heads = {1280: 20, 4096: 32}.get(width)  # other widths as everywhere
    return Layout(name, tensors, norm_eps=1e-5, left_out=left_out, num_heads=num_heads, notes=notes)


def _without_zero_biases(tensors: Tensors) -> Tensors:
    """Distilled models have biases that are masked to zero, and timm's model of them has none."""
    biases = {name: t for name, t in tensors.items() if name.endswith((".attn.q_bias", ".attn.v_bias"))}
    if any(bias.any() for bias in biases.values()):
        return tensors
    return {name: tensor for name, tensor in tensors.items() if name not in biases}


def _refuse_class_norm(tensors: Tensors, where: str) -> None:
    if any(name.startswith("cls_norm.") for name in tensors):
        raise UserError(
            f"{where} has a last norm of its own for the class token (cls_norm), which timm's model has not; write "
            "weights without one."
        )


def _is_gated(tensors: Tensors) -> bool:
    return any(".mlp.gate_proj." in name for name in tensors)


def _check_rotations(tables: Tensors, tensors: Tensors, where: str) -> int | None:
    """Attention heads, from the width of a row. Raises UserError for rotations that timm's model would not compute."""
    cosines = {name: table for name, table in tables.items() if name.endswith("rope.freqs_cos")}
    if not cosines or "pos_embed" not in tensors:
        return None
    for left_out, table in cosines.items():
        name = left_out.replace("rope.blocks.", "blocks.")
        side = round(len(table) ** 0.5)
        frequencies = _EVA_BASE ** -(torch.arange(table.shape[1] // 4, dtype=torch.float64) * 4 / table.shape[1])
        place = torch.arange(side, dtype=torch.float64) * _EVA_GRID / side
        angles = (place[:, None] * frequencies).repeat_interleave(2, dim=1)  # (side, width of a head / 2)
        rows, columns = angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)
        formula = torch.cat([rows, columns], dim=2).flatten(0, 1).cos()
        if formula.shape != table.shape or not (formula - table).abs().max() <= _EVA_TOLERANCE:
            raise UserError(
                f"{where} has rotations in {name} that are not EVA-02's, for coordinates as on a grid of {_EVA_GRID} x "
                f"{_EVA_GRID}; timm's model would compute others, so fetch it again."
            )
    return tensors["pos_embed"].shape[-1] // next(iter(cosines.values())).shape[1]
