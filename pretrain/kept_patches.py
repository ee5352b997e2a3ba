"""Vision transformers of timm run on a chosen part of their patches: plain ViTs, EVA with rotary positions, BEiT.

- A patch that is not kept is neither projected nor read.
- Positions go with their patches: rows of the table, rotations, and biases of pairs are those that the kept patches
  have on the full grid, whatever their number and order.
- With all patches kept, the features are those of timm's `forward_features`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prelude.data.errors import UserError


@dataclass(frozen=True)
class _Family:
    methods: tuple[str, ...]  # a subclass that changes one of them computes something else
    norms_all: str  # arguments of timm with which every token has the final norm
    plain_pool: str  # with which pooling has no weights, besides `global_pool`
    positions: str  # with which it has positions


_FAMILIES = {
    VisionTransformer: _Family(
        ("forward_features", "_pos_embed"), "fc_norm: false, final_norm: true", ", fc_norm: false", "pos_embed: learn"
    ),
    Eva: _Family(
        ("forward_features", "_pos_embed"),
        "use_fc_norm: false, use_post_transformer_norm: true",
        ", use_fc_norm: false",
        "use_abs_pos_emb: true",
    ),
    Beit: _Family(("forward_features",), "global_pool: token", "", "use_rel_pos_bias: true"),
}
_WHY_NOT = {
    "NaFlexVit": "takes the grid's size from the patches that it is shown, so that a part of them would lie elsewhere",
    "VisionTransformerRelPos": "computes biases for the patches of whole images only",
    "VisionTransformerDistilled": "has a second class token, which only the labels of another network train",
}


def is_transformer(model: nn.Module) -> bool:
    """Whether it has timm's blocks, patches and prefix tokens."""
    return isinstance(model, tuple(_FAMILIES))


def check_tokens(model: nn.Module, name: str) -> None:
    """Refuses an architecture that cannot run on a part of its patches as timm runs it on all. Raises UserError."""
    family = next((kind for kind in _FAMILIES if isinstance(model, kind)), None)
    if family is None or any(
        getattr(type(model), method) is not getattr(family, method) for method in _FAMILIES[family].methods
    ):
        kind = type(model).__name__
        why = _WHY_NOT.get(kind, "cannot run on a part of its patches as this objective does")
        raise UserError(
            f"encoder.name={name} builds a {kind}, which {why}; write a timm VisionTransformer, EVA or BEiT, such as "
            "encoder.name=vit_base_patch16_224."
        )
    if type(model.patch_embed) is not PatchEmbed:
        raise UserError(
            f"encoder.name={name} cuts patches with a {type(model.patch_embed).__name__}, which mixes neighbouring "
            "patches; write a plain one, such as encoder.name=vit_base_patch16_224."
        )
    write, rope = _FAMILIES[family], getattr(model, "rope", None)
    if model.pos_embed is None and rope is None and not _has_biases(model):
        raise UserError(f"encoder.name={name} has no table of positions; write encoder.kwargs={{{write.positions}}}.")
    if isinstance(model.norm, nn.Identity):
        raise UserError(
            f"encoder.name={name} norms only what it pools, and this objective reads every token after the final "
            f"norm; write encoder.kwargs={{{write.norms_all}}}."
        )
    if getattr(model, "attn_pool", None) is not None:
        pool = "avg" if model.cls_token is None else "token"
        raise UserError(
            f"encoder.name={name} pools with attention, whose weights this objective would never train; write "
            f"encoder.kwargs={{global_pool: {pool}{write.plain_pool}}}."
        )
    if not isinstance(getattr(model, "patch_drop", None), nn.Identity | None):
        raise UserError(
            "encoder.kwargs.patch_drop_rate drops patches a second time, besides those that the objective hides; "
            "leave it out."
        )
    for kind in _moved_at_random(rope):
        raise UserError(
            f"encoder.kwargs.rope_{kind}_coords moves positions at random at every call, so that encoder and teacher "
            "would see the same patch at different places; leave it out."
        )


def hold_rotations(model: nn.Module) -> None:
    """Keeps the rotations of the model's own grid as a buffer, outside the state dict.

    An EVA for images of any size computes them at every call, in part on the CPU, and the host then waits for the
    device.
    """
    rope = getattr(model, "rope", None)
    if not isinstance(model, Eva) or rope is None or not model.dynamic_img_size or model.rope_mixed:
        return
    if not _moved_at_random(rope):
        model.register_buffer("held_rotations", rope.get_embed(shape=model.patch_embed.grid_size), persistent=False)


def token_features(
    model: nn.Module,
    images: Tensor,
    keep: Tensor | None = None,
    visible: Tensor | None = None,
    maps: list[Tensor] | None = None,
) -> Tensor:
    """Features of the prefix tokens and of the kept patches, after the final norm.

    images: (B, C, H, W). keep: (B, K) indices of patches in raster order, or None for all. visible: with `keep` only,
    bool (B, prefix + K, prefix + K), True where a token (row) sees another (column). maps: with `keep` only, a list
    that takes what enters the first block and what leaves each. Returns (B, prefix + K, D).
    """
    if keep is None and not hasattr(model, "held_rotations"):
        return model.forward_features(images)
    tokens = model.pos_drop(_embedded(model, images, keep))
    visible = None if visible is None else visible[:, None]  # the same for all heads
    if isinstance(model, Beit):
        tokens = _run_beit(model, tokens, keep, visible, maps)
    else:
        tokens = run_blocks(
            model.blocks,
            model.norm_pre(tokens),
            checkpointing=model.grad_checkpointing,
            visible=visible,
            rotations=_rotations(model, keep),
            maps=maps,
        )
    return model.norm(tokens)


def is_plain(model: nn.Module) -> bool:
    """Whether all that tells its tokens apart is the table of positions, so that patches of another kind can enter."""
    return isinstance(model, VisionTransformer) and getattr(model, "rope", None) is None


def features_of_tokens(model: VisionTransformer, tokens: Tensor) -> Tensor:
    """Features of the prefix tokens and of patches that were embedded elsewhere, after the final norm.

    tokens: (B, K, D), positions included; prefix tokens have none. Returns (B, prefix + K, D).
    """
    prefix = [token.expand(len(tokens), -1, -1).to(tokens.dtype) for token in prefix_tokens(model)]
    tokens = model.norm_pre(model.pos_drop(torch.cat([*prefix, tokens], dim=1)))
    return model.norm(run_blocks(model.blocks, tokens, checkpointing=model.grad_checkpointing))


def prefix_tokens(model: nn.Module) -> list[nn.Parameter]:
    """The class token, (1, 1, D), and the registers, (1, R, D), of a model that has them; they come before patches."""
    return [token for token in (model.cls_token, getattr(model, "reg_token", None)) if token is not None]


def gather_patches(images: Tensor, patch_size: tuple[int, int], ids: Tensor) -> Tensor:
    """The pixels of some patches, read straight from the images without laying out the others.

    images: (B, C, H, W). ids: (B, K) in raster order. Returns (B, K, C, p_h, p_w).
    """
    height, width = patch_size
    num_columns = images.shape[3] // width
    grid = images.unflatten(3, (num_columns, width)).unflatten(2, (-1, height))  # (B, C, rows, p_h, columns, p_w)
    sample = torch.arange(len(images), device=images.device)[:, None]
    return grid[sample, :, ids // num_columns, :, ids % num_columns]


def run_blocks(
    blocks: Iterable[nn.Module],
    tokens: Tensor,
    *,
    checkpointing: bool,
    visible: Tensor | None = None,
    rotations: Iterable[Tensor] | None = None,
    maps: list[Tensor] | None = None,
) -> Tensor:
    """Blocks in order, activations recomputed in the backward pass where `checkpointing`. (B, N, D) to the same.

    visible: bool, broadcast to (B, heads, N, N), True where a token (row) sees another (column). rotations: for each
    block, sines and cosines of every patch, as timm's EVA takes them. maps: takes what enters the first block and what
    leaves each.
    """
    options = {} if visible is None else {"attn_mask": visible}
    _note(maps, tokens)
    for block, rotation in zip(blocks, rotations or (None for _ in blocks), strict=True):
        options |= {} if rotation is None else {"rope": rotation}
        if checkpointing and torch.is_grad_enabled():
            tokens = checkpoint(block, tokens, use_reentrant=False, **options)
        else:
            tokens = block(tokens, **options)
        _note(maps, tokens)
    return tokens


def _note(maps: list[Tensor] | None, tokens: Tensor) -> None:
    if maps is not None:
        maps.append(tokens)


# ---- what tells a token where its patch lies


def _embedded(model: nn.Module, images: Tensor, keep: Tensor | None) -> Tensor:
    """Prefix tokens and kept patches with the table's positions. Returns (B, prefix + K, D)."""
    embed, table = model.patch_embed, model.pos_embed
    has_prefix_rows = not getattr(model, "no_embed_class", False)
    num_prefix_rows = model.num_prefix_tokens if has_prefix_rows else 0
    if keep is None:
        tokens = embed(images).flatten(1, -2)
        rows = None if table is None else table[:, num_prefix_rows:]
    else:
        patches = gather_patches(images, embed.patch_size, keep).flatten(2)  # (B, K, C * p_h * p_w)
        # A convolution whose stride is its kernel is one matrix product per patch; only kept patches pay for it.
        tokens = embed.norm(F.linear(patches, embed.proj.weight.flatten(1), embed.proj.bias))
        rows = None if table is None else F.embedding(keep + num_prefix_rows, table[0])
    tokens = tokens if rows is None else tokens + rows
    prefix = prefix_tokens(model)
    if not prefix:
        return tokens
    prefix = torch.cat(prefix, dim=1)  # (1, prefix, D)
    if table is not None and has_prefix_rows:
        prefix = prefix + table[:, :num_prefix_rows]
    return torch.cat([prefix.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)


def _rotations(model: nn.Module, keep: Tensor | None) -> Iterable[Tensor] | None:
    """For each block the rotary embedding of the kept patches: (B, 1 or heads, K, 2 * head width), sines first.

    Rows are taken from the table of the full grid: coordinates, and what normalises them, are the whole image's.
    """
    rope = getattr(model, "rope", None)
    if rope is None:
        return None
    table = getattr(model, "held_rotations", None)
    if table is None:
        fixed = not model.dynamic_img_size and hasattr(rope, "feat_shape")
        table = rope.get_embed() if fixed else rope.get_embed(shape=model.patch_embed.grid_size)
    if model.rope_mixed:  # (depth, heads, N, 2 * head width): learned, for each block and head
        return (of_block[:, keep].transpose(0, 1) for of_block in table)
    rotation = table if keep is None else table[keep][:, None]
    return (rotation for _ in model.blocks)


def _moved_at_random(rope: nn.Module | None) -> list[str]:
    return [kind for kind in ("shift", "jitter", "rescale") if getattr(rope, f"{kind}_coords", None)]


# ---- BEiT, whose own forward takes the biases of whole images only


def _has_biases(model: nn.Module) -> bool:
    if not isinstance(model, Beit):
        return False
    return model.rel_pos_bias is not None or model.blocks[0].attn.relative_position_bias_table is not None


def _run_beit(model: Beit, tokens: Tensor, keep: Tensor, visible: Tensor | None, maps: list[Tensor] | None) -> Tensor:
    ids = F.pad(keep + 1, (1, 0))  # (B, 1 + K): the class token is the first of timm's pairs
    shared = []
    if visible is not None:
        shared.append(tokens.new_zeros(visible.shape).masked_fill(~visible, -torch.inf))
    if model.rel_pos_bias is not None:
        shared.append(_biases(model.rel_pos_bias, ids))
    _note(maps, tokens)
    for block in model.blocks:
        if model.grad_checkpointing and torch.is_grad_enabled():
            tokens = checkpoint(_beit_block, block, tokens, ids, shared, use_reentrant=False)
        else:
            tokens = _beit_block(block, tokens, ids, shared)
        _note(maps, tokens)
    return tokens


def _beit_block(block: nn.Module, tokens: Tensor, ids: Tensor, shared: list[Tensor]) -> Tensor:
    """timm's block, with the biases of the kept pairs in the place of all."""
    biases = shared if block.attn.relative_position_bias_table is None else [*shared, _biases(block.attn, ids)]
    attended = _beit_attention(block.attn, block.norm1(tokens), sum(biases) if biases else None)
    tokens = tokens + block.drop_path1(attended if block.gamma_1 is None else block.gamma_1 * attended)
    mixed = block.mlp(block.norm2(tokens))
    return tokens + block.drop_path2(mixed if block.gamma_2 is None else block.gamma_2 * mixed)


def _beit_attention(attention: nn.Module, tokens: Tensor, bias: Tensor | None) -> Tensor:
    parts = (attention.q_bias, attention.k_bias, attention.v_bias)
    qkv = F.linear(tokens, attention.qkv.weight, None if attention.q_bias is None else torch.cat(parts))
    heads = qkv.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, N, head width)
    dropout = attention.attn_drop.p if attention.training else 0.0
    attended = F.scaled_dot_product_attention(*heads, attn_mask=bias, dropout_p=dropout)
    return attention.proj_drop(attention.proj(attended.transpose(1, 2).flatten(2)))


def _biases(of: nn.Module, ids: Tensor) -> Tensor:
    """(B, heads, n, n) of all pairs of ids, (B, n): rows see columns."""
    index = of.relative_position_index[ids[:, :, None], ids[:, None, :]]  # (B, n, n)
    return F.embedding(index, of.relative_position_bias_table).permute(0, 3, 1, 2)
