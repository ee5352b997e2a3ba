"""A timm convnet that encodes the visible part of an image and nothing else, without a change to its definition.

While a sparse encoding runs, every tensor between the encoder's layers is a packed map of active positions (see
`objectives/active_positions.py`). Only layers that mix neighbours have to see the map as a whole; hooks unpack what
they are given, and pack what they return:

    convolution     zeros at inactive positions: a submanifold convolution, whose output is read where it is active
    max pooling     the lowest number there, so that they never win
    average pooling the mean over the active positions of a window (and over padding, where the layer counts it)
    enlargement     by repetition only

- Pixels of hidden cells are dropped before the first layer: nothing can depend on them.
- The encoder's parameters, buffers, classes and names stay timm's, and outside of a sparse encoding its results too.
- The visible cells belong to one call: encodings may be nested, and recomputed by activation checkpointing after
  other encodings have run.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prelude.objectives.active_positions import ActivePositions
from prelude.pretrain.encoders import stage_maps


@dataclass(frozen=True)
class Encoded:
    """The maps of all stages, packed, and where their positions lie."""

    maps: list[Tensor]  # each (B, C, 1, m)
    positions: ActivePositions


class SparseEncoder:
    """Sparse encodings by `model`, any timm convnet that `objectives.sparse_check` has accepted."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._active: ActivePositions | None = None
        self._recomputed: ActivePositions | None = None
        for layer in model.modules():
            if mixes_neighbours(layer):
                layer.register_forward_pre_hook(self._unpack_input)
                layer.register_forward_hook(self._pack_output)

    def __call__(self, images: Tensor, visible: Tensor, grid: tuple[int, int]) -> Encoded:
        """images: (B, C, H, W). visible: (B, K) cells of `grid` (rows, columns), in raster order."""
        positions = ActivePositions(visible, grid)
        with self._encoding(positions):
            maps = stage_maps(self.model, positions.pack(images))
        self._remember_for_recomputation(maps, positions)
        return Encoded(maps, positions)

    def positions(self) -> ActivePositions | None:
        """Those of the encoding that runs, or is recomputed by the backward pass; None outside of both."""
        if self._active is None and self._recomputed is not None and torch._C._current_graph_task_id() != -1:
            return self._recomputed
        return self._active

    @contextmanager
    def _encoding(self, positions: ActivePositions):
        outer, self._active = self._active, positions
        try:
            yield
        finally:
            self._active = outer

    def _remember_for_recomputation(self, maps: list[Tensor], positions: ActivePositions) -> None:
        """Activation checkpointing runs layers again during the backward pass, when the call is long over.

        The backward pass reaches an encoding by its outputs, and goes through all of it before it reaches an earlier
        one, because autograd takes what was computed last first.
        """
        if not any(getattr(module, "grad_checkpointing", False) for module in self.model.modules()):
            return

        def remember(_grad):
            self._recomputed = positions

        for packed in maps:
            if packed.requires_grad:
                packed.register_hook(remember)

    def _unpack_input(self, layer: nn.Module, args: tuple):
        positions = self.positions()
        if positions is None:
            return None
        packed, *rest = args
        # Not minus infinity: a compiled pooling cannot tell that from its padding, and goes back to an index outside
        lowest = torch.finfo(packed.dtype).min
        maps = positions.unpack(packed, fill=lowest if isinstance(layer, nn.MaxPool2d) else 0.0)
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
            # oneDNN 3.x corrupts memory in the backward pass of a strided 1x1 convolution with channels last
            maps = maps.contiguous()
        return (maps, *rest)

    def _pack_output(self, layer: nn.Module, args: tuple, output: Tensor):
        positions = self.positions()
        if positions is None:
            return None
        packed = positions.pack(output)
        if isinstance(layer, nn.AvgPool2d):
            packed = packed / positions.pack(_window_shares(layer, args[0], positions)).to(packed.dtype)
        return packed


def mixes_neighbours(layer: nn.Module) -> bool:
    """Whether this is a convolution, pooling or enlargement, and so must see the map as a whole."""
    if isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros":
        return layer.kernel_size != (1, 1) or layer.stride != (1, 1) or layer.padding not in ((0, 0), "same", "valid")
    if isinstance(layer, nn.Upsample):
        return layer.mode == "nearest"  # others mix what lies on both sides of a cell's border
    return isinstance(layer, (nn.MaxPool2d, nn.AvgPool2d))


@torch.no_grad()
def _window_shares(layer: nn.AvgPool2d, maps: Tensor, positions: ActivePositions) -> Tensor:
    """(B, 1, H', W'): the share of what the layer divides by that is active, or padding that it counts."""
    everywhere = maps.new_ones(len(maps), 1, *maps.shape[2:])
    active = positions.unpack(positions.pack(everywhere))
    return layer.forward(active) + 1 - layer.forward(everywhere)
