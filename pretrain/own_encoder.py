"""Encoders that timm lacks: `encoder.name=module:function`, a function that returns any network.

    function(image_size=(H, W), **encoder.kwargs) -> nn.Module          weights drawn there, from torch's generator

Where images have other than three channels, it is called with their number as `in_chans` too.

| the network has | which gives | needed by |
|---|---|---|
| `forward(images)` | pooled features (B, D) | everything |
| `forward_maps(images)` | one map (B, C, h, w) a stage, fine to coarse | SparK, features of stages |
| `forward_tokens(images, keep=None)`, `patch_size` | (B, prefix + K, D), of kept patches alone | MAE, I-JEPA |

- The network stays as it is: its classes, its names of parameters, its initial weights.
- What it gives is found out by running it once without numbers, on torch's meta device, or with numbers where it
  cannot run there. Of tokens it is found out with numbers that hidden pixels do not reach them.
- A network that timm built, changed by the function or not, is taken as timm's.
- The function must name `image_size` among its parameters, so that no name in a stranger's checkpoint can call a
  function that was never meant to build an encoder.
"""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.pretrain import named_code, warm_start
from prelude.pretrain.config import Config, EncoderConfig

_GIVES = "_gives"  # of a network that is not timm's
_EXPANDED = "_had_expanded"  # see `had_expanded`
_FORM = "module:function"
_TOLERANCE = 1e-4  # of the largest feature: the same numbers, summed in another order
_CHANNELS = 3  # unless images have others


@dataclass(frozen=True)
class TokenLayout:
    """Of an encoder that runs on a part of its patches."""

    patch_size: tuple[int, int]  # pixels
    grid: tuple[int, int]  # rows and columns of patches
    width: int  # D of a token
    num_prefix: int  # tokens before those of the patches
    num_heads: int | None  # of its attention, where it says so


@dataclass(frozen=True)
class Gives:
    """What a network of the user's gives for images of one size."""

    name: str  # encoder.name
    width: int  # D of the pooled features
    maps: tuple[tuple[int, int, int], ...] = ()  # (C, h, w) of each stage, fine to coarse
    tokens: TokenLayout | None = None


def is_own(config: EncoderConfig) -> bool:
    return named_code.is_named(config.name)


def gives(model: nn.Module) -> Gives | None:
    """None for a model of timm's."""
    return getattr(model, _GIVES, None)


def arguments(config: EncoderConfig) -> dict[str, Any]:
    """What the function is called with."""
    channels = {} if config.in_chans == _CHANNELS else {"in_chans": config.in_chans}
    return {"image_size": config.size, **channels, **config.kwargs}


def create(config: EncoderConfig) -> nn.Module:
    """What the function returns. Raises UserError, in one sentence, for whatever is wrong with it."""
    function = _function(config)
    try:
        model = function(**arguments(config))
    except named_code.RAISED as error:
        raise UserError(f"{_called(config)} fails with {named_code.reason(error, config.name)}.") from error
    if not isinstance(model, nn.Module):
        raise UserError(
            f"{_called(config)} returns a {type(model).__name__} and no torch.nn.Module; return the network."
        )
    if not any(parameter.numel() for parameter in model.parameters()):
        raise UserError(f"{_called(config)} returns a {type(model).__name__} without a weight; return the network.")
    _refuse_unsaved(model, config)
    _spread_out(model)
    warm_start.keep(model)  # its weights are the function's affair
    return model


def lay_out(config: EncoderConfig) -> nn.Module:
    """The network without numbers, described. One that cannot be made without is made with them first."""
    try:
        with torch.device("meta"):
            return describe(create(config), config)
    except UserError:
        _function(config)  # a wrong name or setting is wrong with numbers too
    with torch.random.fork_rng(devices=[]):
        return describe(create(config), config).to("meta")


def describe(model: nn.Module, config: EncoderConfig) -> nn.Module:
    """Notes on the network what it gives, see `gives`. Raises UserError for what is no encoder."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            width = _pooled_width(model, config)
            if _is_timms(model):
                if width != model.head_hidden_size:
                    raise _wrong(config, "its pooled features", f"{width} wide", f"{model.head_hidden_size} wide")
                return model
            found = Gives(config.name, width, _maps(model, config), _tokens(model, config))
    finally:
        for part, training in modes.items():
            part.training = training
    setattr(model, _GIVES, found)
    for name, value in (("num_features", width), ("grad_checkpointing", False)):
        if not hasattr(model, name):
            setattr(model, name, value)
    return model


def check_tokens(config: EncoderConfig) -> None:
    """Refuses tokens that depend on what they must not, found out on two images of noise. Raises UserError."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = describe(create(config), config).eval()
        images, other = torch.randn(2, 2, config.in_chans, *config.size)
    layout = gives(model).tokens
    num_patches = layout.grid[0] * layout.grid[1]
    keep = torch.stack([torch.randperm(num_patches, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    keep = keep[:, : max(num_patches // 2, 1)]  # (2, K)
    hidden = torch.ones(2, num_patches).scatter(1, keep, 0.0).view(2, 1, *layout.grid)
    hidden = hidden.repeat_interleave(layout.patch_size[0], 2).repeat_interleave(layout.patch_size[1], 3)
    with torch.no_grad():
        tokens = _run(model.forward_tokens, config, images, keep)
        if _differ(tokens, _run(model.forward_tokens, config, torch.where(hidden > 0, other, images), keep)):
            raise _leak(config, "change when pixels of hidden patches change")
        turned = _run(model.forward_tokens, config, images, keep.flip(1))
        prefix = layout.num_prefix
        if _differ(tokens[:, prefix:], turned[:, prefix:].flip(1)):
            raise _leak(config, "change with the order of `keep`; a token goes with its patch and the patch's position")
        if not _differ(tokens, _run(model.forward_tokens, config, torch.where(hidden > 0, images, other), keep)):
            raise _leak(config, "stay the same when pixels of kept patches change")


def refuse_settings(config: Config) -> None:
    """Refuses what a run asks of the network and the network does not offer. Raises UserError."""
    if not is_own(config.encoder):
        return
    model = lay_out(config.encoder)
    for asked, method, instead in (
        (config.train.gradient_checkpointing, "set_grad_checkpointing", "train.gradient_checkpointing=false"),
        (config.optimizer.layer_decay < 1, "group_matcher", "optimizer.layer_decay=1"),
    ):
        if asked and not hasattr(model, method):
            raise UserError(
                f"encoder.name={config.encoder.name} has no {method}, as timm's models have; write one, or {instead}."
            )


# ---- the function


def _function(config: EncoderConfig) -> Callable:
    function = named_code.load("encoder.name", config.name, _FORM)
    for key in ("patch_size", "pos_embed", "norm_eps"):
        value = getattr(config, key)
        if value != EncoderConfig.model_fields[key].default:
            raise UserError(
                f"encoder.{key} is not handed to encoder.name={config.name}; write encoder.kwargs.{key}={value}, where "
                "its function has such a setting, or leave it out."
            )
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        parameters = {}
    if "image_size" not in parameters:
        raise UserError(
            f"encoder.name={config.name} is no function with a parameter image_size; write one, which takes "
            "image_size=(height, width) and encoder.kwargs, and returns the network."
        )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return function
    if config.in_chans != _CHANNELS and "in_chans" not in parameters:
        raise UserError(
            f"encoder.name={config.name} has no parameter in_chans, and images have "
            f"{counted(config.in_chans, 'channel')}; "
            "write one, which takes their number."
        )
    for key in config.kwargs:
        if key not in parameters or key == "image_size":
            near = difflib.get_close_matches(key, parameters, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near and near[0] != key else "leave it out."
            raise UserError(f"encoder.kwargs.{key} is no setting of encoder.name={config.name}; {hint}")
    return function


def _called(config: EncoderConfig) -> str:
    given = ", ".join(f"{key}={value}" for key, value in arguments(config).items())
    return f"encoder.name={config.name}, called with {given},"


def _refuse_unsaved(model: nn.Module, config: EncoderConfig) -> None:
    """What no checkpoint can hold, and every reader of one would miss."""
    held = {*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers(remove_duplicate=False))}
    for name, value in model.state_dict().items():
        if name in held and isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized:
            continue
        raise UserError(
            f"{_called(config)} returns a network with {name} in its state_dict, which is no plain parameter or buffer "
            "and which no checkpoint can hold; write register_buffer(NAME, tensor, persistent=False) for what its "
            "settings tell, and no get_extra_state."
        )


def _spread_out(model: nn.Module) -> None:
    """Gives expanded tensors memory of their own for every element: nothing can be written into them otherwise."""
    for parameter in filter(_is_expanded, model.parameters()):
        parameter.data = _copied(parameter)
        setattr(model, _EXPANDED, True)
    copies = {}  # by the buffer, which may have several names
    for part in model.modules():
        for name, buffer in part._buffers.items():
            if buffer is None or name in part._non_persistent_buffers_set or not _is_expanded(buffer):
                continue
            part._buffers[name] = copies.setdefault(buffer, _copied(buffer))
            setattr(model, _EXPANDED, True)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _is_expanded(tensor: Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def had_expanded(model: nn.Module) -> bool:
    """Whether the function's own network has tensors that torch cannot copy into."""
    return getattr(model, _EXPANDED, False)


# ---- what the network gives


def _is_timms(model: nn.Module) -> bool:
    return all(hasattr(model, name) for name in ("pretrained_cfg", "head_hidden_size", "forward_intermediates"))


def _images(model: nn.Module, config: EncoderConfig) -> Tensor:
    device = next(model.parameters()).device
    return torch.zeros(2, config.in_chans, *config.size, device=device)


def _run(method: Callable, config: EncoderConfig, *inputs: Any) -> Any:
    try:
        return method(*inputs)
    except named_code.RAISED as error:
        height, width = config.size
        raise UserError(
            f"encoder.name={config.name}: {method.__name__} fails on 2 images of "
            f"{config.in_chans} x {height} x {width} with {named_code.reason(error, config.name)}."
        ) from error


def _pooled_width(model: nn.Module, config: EncoderConfig) -> int:
    pooled = _run(model.forward, config, _images(model, config))
    if not (isinstance(pooled, Tensor) and pooled.ndim == 2 and len(pooled) == 2 and pooled.is_floating_point()):
        raise _wrong(config, "forward", _shown(pooled), "pooled features of shape (2, D)")
    return pooled.shape[1]


def _maps(model: nn.Module, config: EncoderConfig) -> tuple[tuple[int, int, int], ...]:
    if not hasattr(model, "forward_maps"):
        return ()
    maps = _run(model.forward_maps, config, _images(model, config))
    sound = isinstance(maps, (list, tuple)) and maps and all(isinstance(one, Tensor) for one in maps)
    if not sound or any(one.ndim != 4 or len(one) != 2 for one in maps):
        raise _wrong(config, "forward_maps", _shown(maps), "a list of maps of shape (2, C, h, w)")
    shapes = tuple(tuple(one.shape[1:]) for one in maps)
    if any(earlier[1] < later[1] for earlier, later in zip(shapes, shapes[1:], strict=False)):
        raise _wrong(config, "forward_maps", _shown(maps), "maps from fine to coarse")
    return shapes


def _tokens(model: nn.Module, config: EncoderConfig) -> TokenLayout | None:
    if not hasattr(model, "forward_tokens"):
        return None
    patch = getattr(model, "patch_size", None)
    patch = (patch, patch) if isinstance(patch, int) else patch
    if not (isinstance(patch, (list, tuple)) and len(patch) == 2 and all(isinstance(p, int) and p > 0 for p in patch)):
        raise _wrong(config, "patch_size", repr(patch), "a number of pixels, or (height, width)")
    if any(side % part for side, part in zip(config.size, patch, strict=True)):
        raise UserError(
            f"encoder.image_size={config.image_size} is not a whole number of patches of {patch[0]} x {patch[1]} "
            f"pixels, the patch_size of encoder.name={config.name}; write another."
        )
    grid = (config.size[0] // patch[0], config.size[1] // patch[1])
    num_patches, images = grid[0] * grid[1], _images(model, config)
    whole = _run(model.forward_tokens, config, images)
    if not (isinstance(whole, Tensor) and whole.ndim == 3 and len(whole) == 2 and whole.shape[1] >= num_patches):
        wanted = f"tokens of shape (2, prefix + {num_patches}, D) for {grid[0]} x {grid[1]} patches"
        raise _wrong(config, "forward_tokens", _shown(whole), wanted)
    num_prefix, width = whole.shape[1] - num_patches, whole.shape[2]
    kept = max(num_patches // 2, 1)
    part = _run(model.forward_tokens, config, images, torch.arange(kept, device=images.device).expand(2, -1))
    if not (isinstance(part, Tensor) and part.shape == (2, num_prefix + kept, width)):
        wanted = f"(2, {num_prefix} + {kept}, {width})"
        raise _wrong(config, f"forward_tokens with {kept} patches to keep", _shown(part), wanted)
    heads = getattr(model, "num_heads", None)
    return TokenLayout(tuple(patch), grid, width, num_prefix, heads if isinstance(heads, int) else None)


def _wrong(config: EncoderConfig, what: str, found: str, wanted: str) -> UserError:
    return UserError(
        f"encoder.name={config.name}: {what} gives {found}, where this needs {wanted}; see docs/encoders.md."
    )


def _leak(config: EncoderConfig, what: str) -> UserError:
    return UserError(f"encoder.name={config.name}: tokens of forward_tokens {what}; see docs/encoders.md.")


def _differ(one: Tensor, other: Tensor) -> bool:
    return not torch.allclose(one, other, rtol=0, atol=_TOLERANCE * one.abs().max().clamp(min=1e-12).item())


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {', '.join(_shown(one) for one in value[:4]) or 'nothing'}"
    return f"a {type(value).__name__}"
