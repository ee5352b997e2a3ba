"""Encoders: any timm architecture, built reproducibly, and run on a chosen subset of its patch tokens.

- An encoder stays a timm model under timm's own parameter names, so its weights load in plain timm.
- The same seed gives the same weights, and building one never moves a global generator.
- `check_encoder` refuses what cannot work without allocating a single weight.
- `forward_tokens` computes what timm's `forward_features` computes, for the tokens that are kept and no others:
  a patch that is not kept is neither projected nor read.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prelude.data.errors import UserError
from prelude.pretrain import encoder_names
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.position import sincos_table

_HOME_OF = {"img_size": "image_size", "patch_size": "patch_size"}  # keys of ours that kwargs must not repeat
# What timm and torch raise for settings that no model can have.
_REFUSALS = (
    TypeError,
    ValueError,
    AssertionError,
    RuntimeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    NameError,
)
_LONGEST_REASON = 200  # characters
_ALWAYS = ("num_classes", "pretrained", "in_chans")  # set here, the same for every encoder
# timm would load these, leniently, and an objective's initialisation would undo it.
_WEIGHTS = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")


@dataclass(frozen=True)
class EncoderSummary:
    """What is known of an encoder before it has weights."""

    num_parameters: int  # trained ones
    width: int  # channels of a feature
    grid: tuple[int, int] | None  # (rows, columns) of patches, where the architecture has patches
    patch_size: tuple[int, int] | None  # (height, width) in pixels
    depth: int | None = None  # blocks, of a vision transformer
    num_heads: int | None = None  # of its attention
    has_class_token: bool = False


def check_encoder(config: EncoderConfig, *, tokens: bool) -> EncoderSummary:
    """Refuses an encoder that cannot be built or, with `tokens`, cannot run on a subset of its patches.

    The architecture is laid out on the meta device, which costs a fraction of a second at any size.
    Raises UserError.
    """
    model = _laid_out_for_tokens(config) if tokens else lay_out_encoder(config)
    _check_patches_fit(model, config)
    if tokens:
        _check_tokens(model, config.name)
    table = _has_fixed_table(model, config)
    patches = model.patch_embed if isinstance(getattr(model, "patch_embed", None), PatchEmbed) else None
    fixed = model.pos_embed.numel() if table else 0
    transformer = isinstance(model, VisionTransformer)
    return EncoderSummary(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()) - fixed,
        width=model.num_features,
        grid=patches.grid_size if patches else None,
        patch_size=patches.patch_size if patches else None,
        depth=len(model.blocks) if transformer else None,
        num_heads=getattr(getattr(model.blocks[0], "attn", None), "num_heads", None) if transformer else None,
        has_class_token=bool(getattr(model, "has_class_token", False)),
    )


def lay_out_encoder(config: EncoderConfig) -> nn.Module:
    """The architecture on the meta device: shapes without numbers. Raises UserError when timm cannot build it."""
    with torch.device("meta"):
        return _create(config)


def _laid_out_for_tokens(config: EncoderConfig) -> nn.Module:
    """An architecture that takes other settings than a transformer's is told as what it is, not by its settings."""
    try:
        return lay_out_encoder(config)
    except _NoSetting as refusal:
        try:
            plain = lay_out_encoder(config.model_copy(update={"kwargs": {}, "patch_size": None}))
        except UserError:
            raise refusal from None
        if not isinstance(plain, VisionTransformer):
            _check_tokens(plain, config.name)
        raise


def build_encoder(config: EncoderConfig, *, seed: int) -> nn.Module:
    """A timm model without a classifier, with random weights that depend on `seed` alone.

    Where the architecture has a table of positions and `config.pos_embed` is `sincos`, the table is fixed and
    stored as a buffer under timm's name `pos_embed`; rows of class, distillation and register tokens are zero.
    Raises UserError.
    """
    with seeded(seed):
        model = _create(config)
    _check_patches_fit(model, config)
    if _has_fixed_table(model, config):
        table = sincos_table(model.pos_embed.shape[-1], model.patch_embed.grid_size)  # (L, D)
        prefix = table.new_zeros(model.pos_embed.shape[1] - len(table), table.shape[1])
        # A buffer, not a frozen parameter: optimizers and ZeRO partitions then never meet it.
        del model.pos_embed
        model.register_buffer("pos_embed", torch.cat([prefix, table])[None])  # (1, prefix + L, D)
    return model


def pooled_width(encoder: nn.Module) -> int:
    """D of `encoder(images)`, (B, D). timm's `num_features` leaves out a head's hidden layer (MobileNetV3)."""
    return encoder.head_hidden_size


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Weights drawn inside depend on `seed` alone; the CPU generator is as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every accelerator as well
        yield


def forward_tokens(
    vit: VisionTransformer, images: Tensor, keep: Tensor | None = None, visible: Tensor | None = None
) -> Tensor:
    """Features of the prefix tokens and of the kept patches, after the final norm.

    images: (B, 3, H, W). keep: (B, K) indices of patches in raster order, or None for all of them.
    Returns (B, prefix + K, D), patches in the order of `keep`. Position rows go with their patches, so a
    feature depends on which patches are kept and not on their order. `check_encoder(tokens=True)` has
    accepted the architecture. visible: with `keep` only, bool (B, prefix + K, prefix + K), True where a token
    (row) sees another (column); no row may be without.
    """
    if keep is None:
        return vit.forward_features(images)
    tokens = vit.norm_pre(vit.pos_drop(_embed_kept(vit, images, keep)))
    visible = None if visible is None else visible[:, None]  # the same for all heads
    return vit.norm(run_blocks(vit.blocks, tokens, checkpointing=vit.grad_checkpointing, visible=visible))


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
    blocks: Iterable[nn.Module], tokens: Tensor, *, checkpointing: bool, visible: Tensor | None = None
) -> Tensor:
    """Blocks in order, activations recomputed in the backward pass where `checkpointing`. (B, N, D) to the same.

    visible: bool, broadcast to (B, heads, N, N), True where a token (row) sees another (column).
    """
    mask = {} if visible is None else {"attn_mask": visible}
    for block in blocks:
        if checkpointing and torch.is_grad_enabled():
            tokens = checkpoint(block, tokens, use_reentrant=False, **mask)
        else:
            tokens = block(tokens, **mask)
    return tokens


def _embed_kept(vit: VisionTransformer, images: Tensor, keep: Tensor) -> Tensor:
    """Prefix tokens and kept patches with their positions. Returns (B, prefix + K, D)."""
    projection = vit.patch_embed.proj
    patches = gather_patches(images, vit.patch_embed.patch_size, keep).flatten(2)  # (B, K, C * p_h * p_w)
    # A convolution whose stride is its kernel is one matrix product per patch; only kept patches pay for it.
    tokens = vit.patch_embed.norm(F.linear(patches, projection.weight.flatten(1), projection.bias))
    num_prefix_rows = 0 if vit.no_embed_class else vit.num_prefix_tokens
    table = vit.pos_embed[0]  # (prefix rows + L, D)
    tokens = tokens + F.embedding(keep + num_prefix_rows, table)
    prefix = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
    if not prefix:
        return tokens
    prefix = torch.cat(prefix, dim=1)  # (1, prefix, D)
    if num_prefix_rows:
        prefix = prefix + table[:num_prefix_rows]
    return torch.cat([prefix.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)


def _create(config: EncoderConfig) -> nn.Module:
    name = config.name
    if not timm.is_model(name):
        hint = encoder_names.hint(name, timm.list_models())
        raise UserError(f"encoder.name={name} is not an architecture of timm {timm.__version__}; {hint}")
    for key in config.kwargs:
        if key in _HOME_OF:
            raise UserError(f"encoder.kwargs.{key} has its own key; write encoder.{_HOME_OF[key]}.")
        if key in _ALWAYS:
            raise UserError(f"encoder.kwargs.{key} is the same for every encoder here; leave it out.")
        if key in _WEIGHTS:
            raise UserError(f"encoder.kwargs.{key} loads weights without a word; write encoder.weights=SOURCE.")
    kwargs = dict(config.kwargs) | ({} if config.patch_size is None else {"patch_size": config.patch_size})
    try:
        try:
            model = _sound(timm.create_model(name, pretrained=False, num_classes=0, img_size=config.size, **kwargs))
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            model = _sound(timm.create_model(name, pretrained=False, num_classes=0, **kwargs))  # takes any size
    except _REFUSALS as error:
        if unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
            raise _no_setting(unknown[1], config) from error
        reason = " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__
        given = ", ".join(f"{key}={value}" for key, value in {"image_size": config.image_size, **kwargs}.items())
        raise UserError(
            f"timm cannot build encoder.name={name} with {given}: {reason}; correct encoder.kwargs, or write "
            "encoder.kwargs={} for the architecture as timm has it."
        ) from error
    if config.norm_eps is not None:
        _set_norm_eps(model, config)
    return model


def _set_norm_eps(model: nn.Module, config: EncoderConfig) -> None:
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    if not norms:
        raise UserError(
            f"encoder.norm_eps={config.norm_eps:g} has no effect on {config.name}, which has no LayerNorm; leave it "
            "out."
        )
    for norm in norms:
        norm.eps = config.norm_eps


def _sound(model: nn.Module) -> nn.Module:
    """timm builds transformers without a block, and weights without a value."""
    empty = next((name for name, parameter in model.named_parameters() if not parameter.numel()), None)
    if empty or not len(getattr(model, "blocks", "some")):
        raise ValueError(f"{empty or 'blocks'} would be empty")
    return model


class _NoSetting(UserError):
    """An architecture has no such setting."""


def _no_setting(key: str, config: EncoderConfig) -> _NoSetting:
    where, instead = ("patch_size", "null") if key == "patch_size" else ("kwargs", "{}")
    name = f"encoder.{where}" if where == key else f"encoder.{where}.{key}"
    return _NoSetting(
        f"{name} is no setting of encoder.name={config.name}; leave it out, or write encoder.{where}={instead} where a "
        "recipe was written for another architecture."
    )


def _check_patches_fit(model: nn.Module, config: EncoderConfig) -> None:
    embed = getattr(model, "patch_embed", None)
    if not isinstance(embed, PatchEmbed) or embed.dynamic_img_pad:
        return
    patch = embed.patch_size
    if all(side > 0 and side % part == 0 for side, part in zip(config.size, patch, strict=True)):
        return
    below = [max(side // part, 1) * part for side, part in zip(config.size, patch, strict=True)]
    above = [max(-(-side // part), 1) * part for side, part in zip(config.size, patch, strict=True)]
    choices = [below] if below == above else [below, above]
    if config.size[0] == config.size[1] and patch[0] == patch[1]:
        choices = [sides[0] for sides in choices]
    raise UserError(
        f"encoder.image_size={_plain(config.size)} is not a whole number of patches of {_plain(patch)} "
        f"pixels; write encoder.image_size={' or '.join(str(choice) for choice in choices)}."
    )


def _plain(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def _has_fixed_table(model: nn.Module, config: EncoderConfig) -> bool:
    """Whether the model's table of positions is to be replaced by the fixed one."""
    table = getattr(model, "pos_embed", None)
    if not isinstance(table, nn.Parameter):
        if config.pos_embed == "learned":
            raise UserError(
                f"encoder.pos_embed=learned has no effect on {config.name}, which has no table of positions; "
                "leave the key out."
            )
        return False
    if config.pos_embed == "learned":
        return False
    embed = getattr(model, "patch_embed", None)
    num_prefix = getattr(model, "num_prefix_tokens", 0)
    one_row_a_token = (
        getattr(embed, "grid_size", None) is not None
        and table.ndim == 3
        and table.shape[1] - embed.num_patches in (0, num_prefix)
        and table.shape[2] % 4 == 0
    )
    if not one_row_a_token:
        raise UserError(
            f"encoder.pos_embed=sincos does not fit the table of positions of {config.name}, which has shape "
            f"{tuple(table.shape)}; write encoder.pos_embed=learned."
        )
    return True


def _check_tokens(model: nn.Module, name: str) -> None:
    """Refuses an architecture that `forward_tokens` would run differently from timm."""
    same_forward = isinstance(model, VisionTransformer) and all(
        getattr(type(model), method) is getattr(VisionTransformer, method)
        for method in ("forward_features", "_pos_embed")
    )
    if not same_forward:
        raise UserError(
            f"encoder.name={name} builds a {type(model).__name__}, which cannot run on a part of its patches as this "
            "objective does; write a timm VisionTransformer, such as encoder.name=vit_base_patch16_224."
        )
    if type(model.patch_embed) is not PatchEmbed:
        raise UserError(
            f"encoder.name={name} cuts patches with a {type(model.patch_embed).__name__}, which mixes neighbouring "
            "patches; write a plain one, such as encoder.name=vit_base_patch16_224."
        )
    if model.pos_embed is None:
        raise UserError(f"encoder.name={name} has no table of positions; write encoder.kwargs={{pos_embed: learn}}.")
    if isinstance(model.norm, nn.Identity):
        raise UserError(
            f"encoder.name={name} norms only what it pools, and this objective reads every token after the final "
            "norm; write encoder.kwargs={fc_norm: false, final_norm: true}."
        )
    if model.attn_pool is not None:
        raise UserError(
            f"encoder.name={name} pools with attention, whose weights this objective would never train; write "
            f"encoder.kwargs={{global_pool: {'token' if model.has_class_token else 'avg'}, fc_norm: false}}."
        )
    if not isinstance(model.patch_drop, nn.Identity):
        raise UserError(
            "encoder.kwargs.patch_drop_rate drops patches a second time, besides those that the objective hides; "
            "leave it out."
        )
