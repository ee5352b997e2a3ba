"""Published files: which format one has, and the encoder in it.

A file is a container (what a training script or a release puts around a network: several networks, wrappers,
prefixes) around a network in one of the layouts of `layouts`. Both are told by their keys, never by the file's name.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from prelude.checkpoints.convert.files import CONFIG
from prelude.checkpoints.convert.layouts import layout_of
from prelude.checkpoints.convert.renaming import Layout, Tensors
from prelude.checkpoints.convert.weights import Weights, prefix_tokens
from prelude.data.errors import UserError

_PREFIXES = ("module.", "_orig_mod.", "backbone.", "teacher.", "encoder.", "model.")
# Of transformers, beside a head or decoder; and how an encoder's names begin.
_BASES = ("vit.", "ijepa.", "dinov2.", "dinov2_with_registers.", "resnet.")
_FIRST = ("embeddings.patch_embeddings.projection.", "embedder.embedder.convolution.")
_WRAPPERS = ("model", "state_dict", "module", "network", "model_state_dict")
# Attention heads are in no file. Width to number, as all of these formats have them (I-JEPA's 1408 has 88 a head).
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24}


@dataclass(frozen=True)
class _Container:
    """One network out of a file, and what else the file holds."""

    name: str  # of the method; "": no method can be told
    tensors: Tensors
    left_out: dict[str, int] = field(default_factory=dict)
    own: dict[str, Tensors] = field(default_factory=dict)  # see Weights.own
    wrapper: str = ""


def weights_in(tree: Mapping, where: str, part: str | None = None, settings: Mapping | None = None) -> Weights:
    """The encoder of a file's content.

    part: one of several networks that a file may hold (`encoder` of I-JEPA, `student` of DINO); None: the one that
    its paper evaluates. settings: config.json of `transformers`, where there is one. Raises UserError.
    """
    container = _opened(tree, where, part)
    if other := [name for name, t in container.tensors.items() if t.layout != torch.strided or t.is_quantized]:
        raise UserError(f"{where} has {other[0]} in a sparse or quantised form; save it as a plain tensor.")
    _refuse_settings(settings, where)
    layout = layout_of(_without_base(_stripped(container.tensors)), where)
    layout = _told_by_table(layout, container)
    _refuse_lost_class_token(layout, where)
    tensors = {name: _plain(tensor) for name, tensor in layout.tensors.items()}
    own = dict(container.own) | ({"mae": layout.own} if layout.own else {})
    return Weights(
        where=where,
        format=_format(container, layout),
        tensors=tensors,
        resampling=layout.resampling,
        prefix_rows=_prefix_rows(layout),
        grid=_square_grid(tensors, _prefix_rows(layout)),
        num_heads=_num_heads(tensors, settings, layout),
        pixels=layout.pixels,
        norm_eps=(settings or {}).get("layer_norm_eps", layout.norm_eps),
        may_lack=layout.may_lack,
        left_out=container.left_out | _by_kind(layout.left_out),
        notes=_notes(layout.tensors) + layout.notes,
        untold=layout.untold,
        own={method: {name: _plain(t) for name, t in parts.items()} for method, parts in own.items()},
    )


# ---- containers


def _opened(tree: Mapping, where: str, part: str | None) -> _Container:
    """In the order of the published formats: an earlier one's keys may have a later one's among them."""
    if "encoder" in tree and "predictor" in tree and isinstance(tree["encoder"], Mapping):
        return _jepa(tree, where, part)
    if "student" in tree and "teacher" in tree or isinstance(tree.get("teacher"), Mapping):
        return _dino(tree, where, part)
    module = tree.get("module")
    if isinstance(module, Mapping) and any(name.startswith("sparse_encoder.sp_cnn.") for name in module):
        _refuse_part(part, where, ())
        return _spark(module)
    container = _unwrapped(tree, where, part)
    names = _stripped(container.tensors)
    if all(any(name.startswith(kind) for name in names) for kind in ("backbone.", "projector.", "bn.")):
        return _barlow(names)
    return container


def _jepa(tree: Mapping, where: str, part: str | None) -> _Container:
    parts = tuple(name for name in ("target_encoder", "encoder") if isinstance(tree.get(name), Mapping))
    _refuse_part(part, where, parts)
    chosen = part or parts[0]
    tensors = _stripped(_tensors(tree[chosen]))
    method, own = ("DSeq-JEPA", "dseqjepa") if "cls_token" in tensors else ("I-JEPA", "ijepa")
    rules = [(r"^predictor_(embed|blocks|norm|proj)\.", r"predictor.\1."), (r"^mask_token$", "predictor.mask_token")]
    predictor = _stripped(_tensors(tree["predictor"]))
    left_out = {name: len(_tensors(tree[name])) for name in parts if name != chosen} | {"predictor": len(predictor)}
    named = {}
    for name, tensor in predictor.items():
        if name != "predictor_pos_embed":  # a formula's table
            named[next((re.sub(rule, to, name) for rule, to in rules if re.match(rule, name)), name)] = tensor
    return _Container(f"{method} ({chosen})", tensors, left_out, {own: named})


def _dino(tree: Mapping, where: str, part: str | None) -> _Container:
    parts = tuple(name for name in ("teacher", "student") if isinstance(tree.get(name), Mapping))
    _refuse_part(part, where, parts)
    chosen = part or parts[0]
    tensors = _stripped(_tensors(tree[chosen]))
    backbone = {name: tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
    rest = [name for name in tensors if name not in backbone]
    if not backbone:
        raise UserError(f"{where} has no backbone in its {chosen}; its tensors begin with {sorted(tensors)[:3]}.")
    left_out = {name: len(_tensors(tree[name])) for name in parts if name != chosen}
    for name in rest:
        left_out[name.split(".")[0]] = left_out.get(name.split(".")[0], 0) + 1
    return _Container(f"DINO ({chosen})" if "student" in parts else f"DINOv2 ({chosen})", backbone, left_out)


def _spark(module: Mapping) -> _Container:
    tensors = _tensors(module)
    encoder = {n.removeprefix("sparse_encoder.sp_cnn."): t for n, t in tensors.items() if n.startswith("sparse_enc")}
    conv = {"up_sample": 0, "conv.0": 1, "conv.1": 2, "conv.3": 4, "conv.4": 5}
    own, left_out = {}, {}
    for name, tensor in tensors.items():
        if name.startswith("sparse_encoder."):
            continue
        kind = name.split(".")[0]
        left_out[kind] = left_out.get(kind, 0) + 1
        block = re.match(r"dense_decoder\.dec\.(\d+)\.(up_sample|conv\.[0134])\.", name)
        if block:
            own[f"decoder.blocks.{block[1]}.{conv[block[2]]}.{name[block.end() :]}"] = tensor
        elif kind in ("dense_decoder", "densify_norms", "densify_projs", "mask_tokens"):
            name = re.sub(r"^dense_decoder\.proj\.", "decoder.to_pixels.", name)
            name = re.sub(r"^densify_norms\.(\d+)\.", r"densify.\1.norm.", name)
            name = re.sub(r"^densify_projs\.(\d+)\.", r"densify.\1.projection.", name)
            own[re.sub(r"^mask_tokens\.(\d+)$", r"densify.\1.mask_token", name)] = tensor
    return _Container("SparK", encoder, left_out, {"spark": own})


def _barlow(tensors: Tensors) -> _Container:
    backbone = {name: tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
    projector = {name: tensor for name, tensor in tensors.items() if name.startswith("projector.")}
    left_out = {"projector": len(projector), "bn": len(tensors) - len(backbone) - len(projector)}
    return _Container("Barlow Twins", backbone, left_out, {"barlow_twins": projector})


def _unwrapped(tree: Mapping, where: str, part: str | None) -> _Container:
    """A network alone, or under the name that a training script gives it."""
    nested = [name for name, value in tree.items() if isinstance(value, Mapping) and _tensors(value)]
    parts = tuple(name for name in (*_WRAPPERS, "ema", "model_ema") if name in nested)
    _refuse_part(part, where, parts)
    if parts:
        chosen = part or parts[0]
        left_out = {name: len(_tensors(tree[name])) for name in parts if name != chosen}
        inner = tree[chosen]
        return _Container("", _tensors(inner), left_out, wrapper=chosen)
    tensors = _tensors(tree)
    if not tensors:
        raise UserError(f"{where} holds no tensors by name: its keys are {', '.join(map(str, tree)) or 'none'}.")
    return _Container("", tensors)


def _refuse_part(part: str | None, where: str, parts: tuple[str, ...]) -> None:
    if part and part not in parts:
        choice = f"write one of {', '.join('#' + name for name in parts)}" if parts else f"leave #{part} out"
        raise UserError(f"{where} has no {part}; {choice}.")


# ---- what a network's tensors tell beside their names


def _told_by_table(layout: Layout, container: _Container) -> Layout:
    """Methods whose encoders look like timm's are told by the container or by a table that is a formula's."""
    if layout.name != "ViT, timm layout":
        return layout
    has_class, rows = "cls_token" in layout.tensors, _table_rows(layout.tensors)
    if container.name.startswith("DSeq-JEPA"):
        return replace(layout, resampling="sincos", table_has_prefix=False, norm_eps=1e-6)
    if container.name.startswith("I-JEPA"):
        return replace(layout, resampling="sincos", norm_eps=1e-6)
    if container.name.startswith("DINO"):
        return replace(layout, resampling="offset", norm_eps=1e-6)
    prefix = int(has_class)
    fixed = rows is not None and Weights("", "", layout.tensors, grid=_square(rows - prefix), prefix_rows=prefix)
    if fixed and fixed.has_sincos_table:
        name, rule = ("MAE", "plain") if has_class else ("I-JEPA", "sincos")
        return replace(layout, name=f"{name} (encoder)", resampling=rule, norm_eps=1e-6)
    has_head = "fc_norm.weight" in layout.tensors or any(name.startswith("head.") for name in layout.left_out)
    if container.wrapper == "model" and has_class and has_head:
        return replace(layout, name="MAE, fine-tuned", resampling="plain", norm_eps=1e-6)
    return layout


def _format(container: _Container, layout: Layout) -> str:
    if not container.name:
        return layout.name
    if "ViT, timm" in layout.name:
        return container.name
    return layout.name if layout.name.startswith("DINOv") else f"{container.name}, {layout.name}"


def _prefix_rows(layout: Layout) -> int:
    """Rows of prefix tokens in the table. Beside registers, by its length: mostly timm gives them none."""
    prefix, rows = prefix_tokens(layout.tensors), _table_rows(layout.tensors)
    if layout.table_has_prefix is not None:
        return prefix if layout.table_has_prefix else 0
    if "reg_token" not in layout.tensors or rows is None:
        return prefix
    return 0 if _square(rows) or not _square(rows - prefix) else prefix


def _refuse_lost_class_token(layout: Layout, where: str) -> None:
    rows = _table_rows(layout.tensors)
    if rows is None or "cls_token" in layout.tensors or _square(rows) or not _square(rows - 1):
        return
    raise UserError(
        f"{where} ({layout.name}) lacks cls_token, for which its table of positions has a row; fetch or save it again."
    )


def _table_rows(tensors: Tensors) -> int | None:
    table = tensors.get("pos_embed")
    return table.shape[1] if table is not None and table.ndim == 3 else None


def _square_grid(tensors: Tensors, prefix: int) -> tuple[int, int] | None:
    rows = _table_rows(tensors)
    return None if rows is None else _square(rows - prefix)


def _square(count: int) -> tuple[int, int] | None:
    side = round(max(count, 0) ** 0.5)
    return (side, side) if side and side * side == count else None


def _num_heads(tensors: Tensors, settings: Mapping | None, layout: Layout) -> int | None:
    if settings and "num_attention_heads" in settings:
        return settings["num_attention_heads"]
    if layout.num_heads:
        return layout.num_heads
    projection = tensors.get("patch_embed.proj.weight")
    return None if projection is None or layout.untold else _HEADS.get(len(projection))


def _notes(tensors: Tensors) -> tuple[str, ...]:
    halves = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values() if _is_half(t)})
    return tuple(f"{name} as float32" for name in halves)


def _is_half(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float32


def _plain(tensor: Tensor) -> Tensor:
    return tensor.float() if _is_half(tensor) else tensor


def _refuse_settings(settings: Mapping | None, where: str) -> None:
    """What a config of `transformers` may say, and no tensor does: timm's architecture computes one of the ways."""
    kind = str((settings or {}).get("model_type", ""))
    if kind.startswith("dinov3_vit"):
        return _refuse_settings_of_dinov3(settings, where)
    for key, ours in _COMPUTED.get(kind, {}).items():
        if settings.get(key, ours) != ours:
            raise UserError(
                f"{where} has {key}={settings[key]} in its {CONFIG}, and timm's architecture computes as with "
                f"{key}={ours}; write weights that were trained so."
            )


_COMPUTED = {kind: {"hidden_act": "gelu"} for kind in ("vit", "vit_mae", "ijepa", "dinov2", "dinov2_with_registers")}
_COMPUTED["resnet"] = {"hidden_act": "relu", "downsample_in_first_stage": False, "downsample_in_bottleneck": False}


def _refuse_settings_of_dinov3(settings: Mapping, where: str) -> None:
    kind, ours = ("a gated MLP", "silu") if settings.get("use_gated_mlp") else ("an MLP", "gelu")
    if (found := settings.get("hidden_act", "gelu")) != ours:
        raise UserError(f"{where} has {kind} with hidden_act={found}, and timm's is {ours}; fetch it again.")
    theta = settings.get("rope_theta", (settings.get("rope_parameters") or {}).get("rope_theta", 100.0))
    if theta != 100.0:
        raise UserError(f"{where} has rotary positions of base {theta:g}, and timm's DINOv3 of 100; fetch it again.")


# ---- mappings of tensors


def _tensors(tree: Mapping) -> Tensors:
    return {name: value for name, value in tree.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _stripped(tensors: Tensors) -> Tensors:
    """Without a prefix that every name has; again, until there is none."""
    for prefix in _PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _stripped({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    return tensors


def _without_base(tensors: Tensors) -> Tensors:
    """transformers names a network inside a larger model; what the larger model adds has no such prefix."""
    for base in _BASES:
        if any(f"{base}{first}weight" in tensors for first in _FIRST):
            return {name.removeprefix(base): tensor for name, tensor in tensors.items()}
    return tensors


def _by_kind(left_out: Tensors) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in left_out:
        counts[name.split(".")[0]] = counts.get(name.split(".")[0], 0) + 1
    return counts
