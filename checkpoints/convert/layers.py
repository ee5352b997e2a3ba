"""What of an encoder's function is in no tensor: the kind of each layer, and its plain settings.

Two networks may agree in every name and shape and compute different things, with another activation, ε, stride or
padding. What a configuration may choose beside weights is left out: what drops at random, pooling, and all that
follows from the size of images (positions, windows, patches) or of maps (the output stride).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

_GEOMETRY = ("kernel_size", "stride", "padding", "dilation")
_SETTINGS = (
    *_GEOMETRY, "groups", "padding_mode", "ceil_mode", "count_include_pad", "eps", "approximate", "negative_slope",
    "num_heads", "rotate_half", "temperature",
)  # fmt: skip
_NOTHING = "Identity"
_CHOSEN = ("global_pool", "flatten", "attn_pool")  # parts of names of what pools
_PUBLISHED = ("torch", "timm")  # packages whose classes mean the same everywhere; a user may rename his own


@dataclass(frozen=True)
class Layer:
    kind: str  # its class; "": one of the user's own
    has_tensors: bool  # in itself or below, so that names of tensors tell whether it is there
    settings: Mapping[str, object]


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """By name, without those of which a configuration may choose."""
    holders = {name[:end] for name in model.state_dict() for end, sign in enumerate(name) if sign == "."}
    return {
        name: Layer(_kind(layer), name in holders, _settings(layer))
        for name, layer in model.named_modules()
        if name and not set(name.split(".")) & set(_CHOSEN)
    }


def first_difference(theirs: Mapping[str, Layer], ours: Mapping[str, Layer]) -> tuple[str, str] | None:
    """What `theirs` has in a layer, and `ours`, in words; None where names of tensors tell all that differs."""
    absent = Layer(_NOTHING, False, {})
    ignored = _GEOMETRY if _spread(theirs, ours) else ()
    for name in (*theirs, *(name for name in ours if name not in theirs)):
        found, wanted = theirs.get(name, absent), ours.get(name, absent)
        alone = absent in (found, wanted) and not _has_parent(name, theirs, ours)
        if alone or found.has_tensors != wanted.has_tensors:
            continue
        if found.kind != wanted.kind and found.kind and wanted.kind:
            return f"{_counted(found.kind)} as {name}", _counted(wanted.kind)
        for key in _differing(found, wanted, ignored):
            return f"{key}={found.settings[key]} in {name}", f"{key}={wanted.settings[key]}"
    return None


def _has_parent(name: str, *networks: Mapping[str, Layer]) -> bool:
    """Whether what would hold a layer is the same in all: parts of what differs as a whole are not told."""
    parent = name.rpartition(".")[0]
    return all(not parent or parent in layers for layers in networks)


def _spread(theirs: Mapping[str, Layer], ours: Mapping[str, Layer]) -> bool:
    """Whether convolutions look further apart in one of the two, as another output stride (for maps) wants of them."""
    pairs = ((theirs[name].settings, ours[name].settings) for name in theirs if name in ours)
    return any(found.get("dilation") != wanted.get("dilation") for found, wanted in pairs)


def _differing(found: Layer, wanted: Layer, ignored: tuple[str, ...]) -> list[str]:
    keys = [key for key in found.settings if key in wanted.settings and found.settings[key] != wanted.settings[key]]
    if found.has_tensors and "kernel_size" in keys:  # its shape tells, or its patches are resampled
        ignored = _GEOMETRY
    return [key for key in keys if key not in ignored]


def _kind(layer: nn.Module) -> str:
    name = type(layer).__qualname__
    if name.startswith(("Drop", "PatchDrop")):
        return _NOTHING
    return name if type(layer).__module__.partition(".")[0] in _PUBLISHED else ""


def _settings(layer: nn.Module) -> dict:
    plain = (bool, int, float, str, tuple)
    return {key: value for key in _SETTINGS if isinstance(value := vars(layer).get(key), plain)}


def _counted(kind: str) -> str:
    if kind == _NOTHING:
        return "nothing"
    return f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}"
