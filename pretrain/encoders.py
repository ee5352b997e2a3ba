"""Encoders: any timm architecture, built reproducibly, and run on a chosen subset of its patch tokens.

- An encoder stays a timm model under timm's own parameter names, so its weights load in plain timm.
- The same seed gives the same weights, and building one never moves a global generator.
- `check_encoder` refuses what cannot work without allocating a single weight.
- `forward_tokens` computes what timm's `forward_features` computes, for the tokens that are kept and no others:
  a patch that is not kept is neither projected nor read.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import timm
import torch
from timm.layers import DropPath, PatchEmbed
from torch import Tensor, nn

from prelude.data.errors import UserError, in_one_line
from prelude.pretrain import encoder_names, own_encoder
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.kept_patches import check_tokens, hold_rotations, is_transformer, token_features
from prelude.pretrain.named_code import REFUSALS
from prelude.pretrain.own_encoder import TokenLayout, gives, is_own
from prelude.pretrain.position import sincos_table

# keys of ours that kwargs must not repeat
_HOME_OF = {"img_size": "encoder.image_size", "patch_size": "encoder.patch_size", "in_chans": "data.channels"}
_LONGEST_REASON = 200  # characters
_ALWAYS = ("num_classes", "pretrained")  # set here, the same for every encoder
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
    if gives(model):
        return _summary_of_own(model, config, tokens)
    _check_patches_fit(model, config, tokens)
    if tokens:
        check_tokens(model, config.name)
    table = not is_own(config) and _has_fixed_table(model, config)
    patches = model.patch_embed if isinstance(getattr(model, "patch_embed", None), PatchEmbed) else None
    fixed = model.pos_embed.numel() if table else 0
    transformer = is_transformer(model)
    return EncoderSummary(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()) - fixed,
        width=model.num_features,
        grid=patches.grid_size if patches else None,
        patch_size=patches.patch_size if patches else None,
        depth=len(model.blocks) if transformer else None,
        num_heads=_num_heads(model) if transformer else None,
        has_class_token=transformer and model.cls_token is not None,
    )


def refuse_checkpointing(config: EncoderConfig) -> None:
    """Raises UserError for an encoder that cannot compute its activations again."""
    try:
        lay_out_encoder(config).set_grad_checkpointing(True)
    except (AssertionError, AttributeError, NotImplementedError):  # as timm's models say so
        raise UserError(
            f"encoder.name={config.name} has no gradient checkpointing; write train.gradient_checkpointing=false."
        ) from None


def _summary_of_own(model: nn.Module, config: EncoderConfig, tokens: bool) -> EncoderSummary:
    found = gives(model)
    if tokens and found.tokens is None:
        raise UserError(
            f"encoder.name={config.name} has no forward_tokens(images, keep), which this objective needs to show it a "
            "part of an image's patches; write one, or another objective."
        )
    if tokens:
        own_encoder.check_tokens(config)
    layout = found.tokens
    return EncoderSummary(
        num_parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        width=found.width,
        grid=layout.grid if layout else None,
        patch_size=layout.patch_size if layout else None,
        num_heads=layout.num_heads if layout else None,
    )


def lay_out_encoder(config: EncoderConfig) -> nn.Module:
    """The architecture on the meta device: shapes without numbers. Raises UserError when timm cannot build it."""
    if is_own(config):
        return own_encoder.lay_out(config)
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
        if not is_transformer(plain):
            check_tokens(plain, config.name)
        raise


def build_encoder(config: EncoderConfig, *, seed: int) -> nn.Module:
    """A timm model without a classifier, with random weights that depend on `seed` alone.

    Where the architecture has a table of positions and `config.pos_embed` is `sincos`, the table is fixed and
    stored as a buffer under timm's name `pos_embed`; rows of class, distillation and register tokens are zero.
    Raises UserError.
    """
    with seeded(seed):
        if is_own(config):
            return own_encoder.describe(own_encoder.create(config), config)
        model = _create(config)
    _check_patches_fit(model, config)
    if _has_fixed_table(model, config):
        table = sincos_table(model.pos_embed.shape[-1], model.patch_embed.grid_size)  # (L, D)
        prefix = table.new_zeros(model.pos_embed.shape[1] - len(table), table.shape[1])
        # A buffer, not a frozen parameter: optimizers and ZeRO partitions then never meet it.
        del model.pos_embed
        model.register_buffer("pos_embed", torch.cat([prefix, table])[None])  # (1, prefix + L, D)
    hold_rotations(model)
    return model


def drops_paths(encoder: nn.Module) -> bool:
    """Whether it skips blocks at random in training. Where no setting says so, some of timm's do."""
    return any(isinstance(layer, DropPath) and layer.drop_prob for layer in encoder.modules())


def pooled_width(encoder: nn.Module) -> int:
    """D of `encoder(images)`, (B, D). timm's `num_features` leaves out a head's hidden layer (MobileNetV3)."""
    found = gives(encoder)
    return found.width if found else encoder.head_hidden_size


def stage_maps(encoder: nn.Module, images: Tensor) -> list[Tensor]:
    """The map (B, C, h, w) of every stage, fine to coarse, of an encoder that has stages."""
    if gives(encoder):
        return list(encoder.forward_maps(images))
    return encoder.forward_intermediates(images, intermediates_only=True)


def token_layout(encoder: nn.Module) -> TokenLayout:
    """Of an encoder that `check_encoder(tokens=True)` has accepted."""
    if found := gives(encoder):
        return found.tokens
    embed, prefix = encoder.patch_embed, encoder.num_prefix_tokens
    return TokenLayout(embed.patch_size, embed.grid_size, encoder.embed_dim, prefix, _num_heads(encoder))


def _num_heads(vit: nn.Module) -> int | None:
    """None where a block has several attentions side by side."""
    block = vit.blocks[0]
    return getattr(getattr(block, "attn", block), "num_heads", None)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Weights drawn inside depend on `seed` alone; the CPU generator is as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every accelerator as well
        yield


def forward_tokens(vit: nn.Module, images: Tensor, keep: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
    """Features of the prefix tokens and of the kept patches, after the final norm.

    images: (B, C, H, W). keep: (B, K) indices of patches in raster order, or None for all of them.
    Returns (B, prefix + K, D), patches in the order of `keep`. Position rows go with their patches, so a
    feature depends on which patches are kept and not on their order. `check_encoder(tokens=True)` has
    accepted the architecture. visible: with `keep` only, bool (B, prefix + K, prefix + K), True where a token
    (row) sees another (column); no row may be without.
    """
    if gives(vit):
        return vit.forward_tokens(images) if keep is None else vit.forward_tokens(images, keep)
    return token_features(vit, images, keep, visible)


def block_maps(vit: nn.Module, images: Tensor, keep: Tensor) -> list[Tensor]:
    """What enters the first block and what leaves each, depth + 1 tensors (B, prefix + K, D), of the kept patches.

    The final norm takes no part. vit: a model of timm's that `check_encoder(tokens=True)` has accepted.
    """
    maps: list[Tensor] = []
    token_features(vit, images, keep, maps=maps)
    return maps


def _create(config: EncoderConfig) -> nn.Module:
    name = config.name
    if not timm.is_model(name):
        hint = encoder_names.hint(name, timm.list_models())
        raise UserError(f"encoder.name={name} is not an architecture of timm {timm.__version__}; {hint}")
    for key in config.kwargs:
        if key in _HOME_OF:
            raise UserError(f"encoder.kwargs.{key} has its own key; write {_HOME_OF[key]}.")
        if key in _ALWAYS:
            raise UserError(f"encoder.kwargs.{key} is the same for every encoder here; leave it out.")
        if key in _WEIGHTS:
            raise UserError(f"encoder.kwargs.{key} loads weights without a word; write encoder.weights=SOURCE.")
    kwargs = dict(config.kwargs) | ({} if config.patch_size is None else {"patch_size": config.patch_size})
    if config.in_chans != 3:
        kwargs["in_chans"] = config.in_chans
    try:
        try:
            model = _sound(of_timm(name, num_classes=0, img_size=config.size, **kwargs))
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            model = _sound(of_timm(name, num_classes=0, **kwargs))  # takes any size
    except REFUSALS as error:
        _refuse_two_sides(config)
        if unknown := re.search(r"unexpected keyword argument '([^']+)'", str(error)):
            raise _no_setting(unknown[1], config) from error
        reason = in_one_line(error, _LONGEST_REASON)
        given = ", ".join(f"{key}={value}" for key, value in {"image_size": config.image_size, **kwargs}.items())
        raise UserError(
            f"timm cannot build encoder.name={name} with {given}: {reason}; correct encoder.kwargs, or write "
            "encoder.kwargs={} for the architecture as timm has it."
        ) from error
    if _has_two_sides(config.patch_size) and tuple(getattr(_cut_by(model), "patch_size", ())) != config.patch_size:
        raise _no_two_sides(config)
    if config.norm_eps is not None:
        _set_norm_eps(model, config)
    return model


def of_timm(name: str, **kwargs) -> nn.Module:
    """With random weights. `timm.create_model` would drop what is null, be it a setting that turns a part off or one
    that the model does not have."""
    if None not in kwargs.values():
        return timm.create_model(name, pretrained=False, **kwargs)
    architecture, tag = timm.models.split_model_name_tag(name)
    return timm.models.model_entrypoint(architecture)(pretrained=False, pretrained_cfg=tag or None, **kwargs)


def _refuse_two_sides(config: EncoderConfig) -> None:
    """Raises UserError for an architecture that can be built with square patches alone."""
    if _has_two_sides(config.patch_size):
        try:
            lay_out_encoder(config.model_copy(update={"patch_size": max(config.patch_size)}))
        except UserError:
            return  # there is more that it cannot
        raise _no_two_sides(config)


def _no_two_sides(config: EncoderConfig) -> UserError:
    return UserError(
        f"encoder.patch_size={list(config.patch_size)} has two sides, which encoder.name={config.name} does not take; "
        "write one number, or a vision transformer."
    )


def _has_two_sides(patch: int | tuple[int, int] | None) -> bool:
    return isinstance(patch, tuple) and patch[0] != patch[1]


def _cut_by(model: nn.Module) -> PatchEmbed | None:
    embed = getattr(model, "patch_embed", None)
    return embed if isinstance(embed, PatchEmbed) else None


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
    if key == "in_chans":
        return _NoSetting(
            f"encoder.name={config.name} reads three channels only, and data.channels is {config.in_chans}; write "
            "another encoder.name, or data.channels=3."
        )
    if ":" in key:
        return _NoSetting(
            f"encoder.kwargs has {key} for one word, as YAML has it; write a space after each colon, as in "
            f"encoder.kwargs={{{key.replace(':', ': ', 1)}}}."
        )
    where, instead = ("patch_size", "null") if key == "patch_size" else ("kwargs", "{}")
    name = f"encoder.{where}" if where == key else f"encoder.{where}.{key}"
    return _NoSetting(
        f"{name} is no setting of encoder.name={config.name}; leave it out, or write encoder.{where}={instead} where a "
        "recipe was written for another architecture."
    )


def _check_patches_fit(model: nn.Module, config: EncoderConfig, tokens: bool = False) -> None:
    """tokens: whether patches are taken one by one, out of an image that is not padded."""
    embed = getattr(model, "patch_embed", None)
    padded = getattr(embed, "dynamic_img_pad", False) and getattr(model, "dynamic_img_size", True)
    if not isinstance(embed, PatchEmbed) or (padded and not tokens):
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
