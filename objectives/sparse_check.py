"""Whether an architecture can be encoded sparsely, and what it gives; found out without a weight.

The architecture is run once on the meta device, on packed maps, and every function that a layer applies to one is
looked at. What treats positions alike, or reduces over all of them, is right on packed maps by itself; what mixes
neighbours is right inside the layers that unpack (see `objectives/sparse_encoder.py`). Anything else is refused, with
the name of the layer: no layer type is trusted unseen, and none has to be listed that is made of known functions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from prelude.data.errors import UserError, in_one_line
from prelude.objectives.sparse_encoder import SparseEncoder, mixes_neighbours
from prelude.pretrain.behind_stages import bare_twin, idle_parameters, num_channels
from prelude.pretrain.encoders import stage_maps
from prelude.pretrain.own_encoder import gives

_POINTWISE = set(
    "add addcmul sub rsub mul div truediv true_divide neg pow sqrt rsqrt abs exp square log clamp clip "
    "clamp_min clamp_max maximum minimum relu relu6 hardtanh hardswish hardsigmoid silu gelu mish sigmoid "
    "tanh softplus elu celu selu leaky_relu prelu threshold dropout alpha_dropout to type type_as float half "
    "bfloat16 double contiguous clone detach expand_as size dim stride is_contiguous is_floating_point "
    "is_complex numel batch_norm layer_norm rms_norm group_norm instance_norm linear".split()
)
_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "is_meta"}
_REDUCTIONS = {"mean", "sum", "amax", "amin", "norm", "vector_norm", "var", "std", "var_mean"}
_CHANNEL_PARTS = {"cat", "chunk", "split", "split_with_sizes", "tensor_split", "unbind"}
_POOLS_TO_ONE = {"adaptive_avg_pool2d", "adaptive_max_pool2d"}
_LAYOUTS = {(0, 2, 3, 1), (0, 3, 1, 2)}  # channels last and back


@dataclass(frozen=True)
class Stage:
    """One of the maps that an architecture gives."""

    index: int  # in what timm's `forward_intermediates` returns
    channels: int
    stride: int  # pixels of the image from one position to the next


@dataclass(frozen=True)
class Survey:
    stages: tuple[Stage, ...]  # the last of each stride, coarse to fine
    idle: tuple[str, ...]  # names of parameters that no stage depends on
    uses_batch_norm: bool


def survey(model: nn.Module, name: str, image_size: tuple[int, int], grid: tuple[int, int]) -> Survey:
    """What `model` gives for images of this size, hidden in cells of `grid`.

    model: a timm convnet, copied to the meta device and left as it is. Raises UserError, naming the layer, for an
    architecture that cannot be encoded sparsely or does not fit the grid.
    """
    twin = bare_twin(model)
    encoder = SparseEncoder(twin)
    watch = _Watch(encoder, name)
    images = torch.empty(3, num_channels(model), *image_size, device="meta")
    visible = torch.arange(grid[0] * grid[1], device="meta").expand(3, -1)
    try:
        with watch:
            encoded = encoder(images, visible, grid)
    except _Refused as refusal:
        raise UserError(str(refusal)) from None
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError, AttributeError, UserError) as error:
        raise UserError(str(watch.refusal(in_one_line(error)))) from error
    stages = {}
    for index, packed in enumerate(encoded.maps):
        cell = encoded.positions.cell_of(packed)
        strides = [size / (cells * side) for size, cells, side in zip(image_size, grid, cell, strict=True)]
        if strides[0] != strides[1] or not strides[0].is_integer():
            raise UserError(f"encoder.name={name} has a stage of stride {strides}, not a whole number of pixels.")
        stages[int(strides[0])] = Stage(index, packed.shape[1], int(strides[0]))
    return Survey(
        stages=tuple(stages[stride] for stride in sorted(stages, reverse=True)),
        idle=idle_parameters(twin, encoded.maps),
        uses_batch_norm=any(isinstance(layer, nn.BatchNorm2d) for layer in twin.modules()),
    )


def total_stride(model: nn.Module, name: str, image_size: tuple[int, int]) -> int:
    """Pixels of the image from one position of the coarsest map to the next, taken for a power of two.

    Right for sizes that it does not divide too, so that a refusal can say what would fit. Raises UserError.
    """
    if (found := gives(model)) and not found.maps:
        raise UserError(
            f"encoder.name={name} has no forward_maps(images), which gives the map of every stage and which this "
            "objective needs; write one, or another objective."
        )
    try:
        with torch.no_grad():
            images = torch.empty(1, num_channels(model), *image_size, device="meta")
            maps = stage_maps(bare_twin(model), images)
        return 2 ** math.ceil(math.log2(max(image_size[0] / packed.shape[2] for packed in maps)))
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError, AttributeError) as error:
        raise UserError(
            f"encoder.name={name} gives no maps of its stages for images of {image_size[0]} x {image_size[1]} pixels "
            f"({in_one_line(error)}); write a convnet such as resnet50 or convnext_small."
        ) from error


class _Refused(Exception):
    pass


class _Watch(TorchFunctionMode):
    """Looks at every function that is applied to a packed map outside of the layers that unpack it."""

    def __init__(self, encoder: SparseEncoder, name: str):
        super().__init__()
        self.encoder, self.name = encoder, name
        self.running: list[tuple[str, nn.Module]] = []  # the layers that have been entered, the innermost last
        for path, layer in encoder.model.named_modules():
            # Before and after the hooks of the encoder, so that these count as the layer's own
            layer.register_forward_pre_hook(self._enter(path), prepend=True)
            layer.register_forward_hook(self._leave)

    def __torch_function__(self, func: Callable, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        positions = self.encoder.positions()
        if positions and not any(mixes_neighbours(layer) for _, layer in self.running):
            values = tree_leaves((args, kwargs))
            if any(isinstance(value, Tensor) and positions.is_packed(value) for value in values):
                packed = next(value for value in values if isinstance(value, Tensor) and positions.is_packed(value))
                if not _treats_positions_alike(func, packed, args, kwargs):
                    raise self.refusal(f"it calls {_name(func)}, which is not known to treat positions alike")
        return func(*args, **kwargs)

    def refusal(self, reason: str) -> _Refused:
        path, layer = self.running[-1] if self.running else ("itself", self.encoder.model)
        return _Refused(
            f"encoder.name={self.name} cannot be encoded sparsely because of its layer {path} "
            f"({type(layer).__name__}): {reason}; write another convnet, such as encoder.name=resnet50 or "
            "convnext_small."
        )

    def _enter(self, path: str):
        return lambda layer, args: self.running.append((path, layer))

    def _leave(self, layer: nn.Module, args: tuple, output) -> None:
        self.running.pop()


def _name(func: Callable) -> str:
    """`relu` for torch.relu, Tensor.relu_ and functional.relu; `add` for a sum written with + or +=."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        return f"attribute {func.__self__.__name__}"
    if name.startswith("__"):
        name = name.strip("_")
        return name[1:] if name[0] in "ri" and name[1:] in _POINTWISE else name
    return name.rstrip("_")


def _treats_positions_alike(func: Callable, packed: Tensor, args: tuple, kwargs: dict) -> bool:
    """Whether the result on `packed`, one of the arguments, is right wherever the active positions lie."""
    name = _name(func)
    positional = dict(enumerate(args))
    spatial = {2, 3} if packed.shape[2] == 1 else {1, 2}
    if name in _POINTWISE or name.removeprefix("attribute ") in _ATTRIBUTES:
        return True
    if name in _REDUCTIONS:
        dims = kwargs.get("dim", positional.get(2 if name in ("norm", "vector_norm") else 1))
        dims = {dim % 4 for dim in ([dims] if isinstance(dims, int) else dims or range(4))}
        return not dims & spatial or spatial <= dims
    if name in _CHANNEL_PARTS:
        return kwargs.get("dim", positional.get(2 if "split" in name or name == "chunk" else 1, 0)) % 4 not in spatial
    if name in _POOLS_TO_ONE:
        return kwargs.get("output_size", positional.get(1)) in (1, (1, 1), [1, 1])
    if name == "permute":
        dims = kwargs.get("dims", args[1:])
        return tuple(dims[0] if isinstance(dims[0], (tuple, list)) else dims) in _LAYOUTS
    if name == "getitem":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        whole = all(part == slice(None) for dim, part in enumerate(index) if dim in spatial)
        return whole and all(isinstance(part, slice) for part in index)
    if name == "conv2d":
        return args[1].shape[2:] == (1, 1) and all(
            value in (default, (default, default), [default, default])
            for key, place, default in (("stride", 3, 1), ("padding", 4, 0))
            for value in [kwargs.get(key, positional.get(place, default))]
        )
    return False
