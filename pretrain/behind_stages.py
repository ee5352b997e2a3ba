"""Layers of an encoder that none of its maps depends on, found out without a number.

An objective that learns by the maps of stages leaves them as they were, and they lie in front of the pooled features.
"""

import copy
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from prelude.pretrain.encoders import stage_maps


def layers_behind_stages(model: nn.Module, image_size: tuple[int, int]) -> list[str]:
    """Names of its convolutions and linear layers that no stage's map depends on."""
    twin = bare_twin(model)
    with torch.enable_grad():
        maps = stage_maps(twin, torch.empty(1, num_channels(model), *image_size, device="meta"))
        return idle_layers(model, idle_parameters(twin, maps))


def idle_parameters(twin: nn.Module, maps: Iterable[Tensor]) -> tuple[str, ...]:
    """Names of parameters of a bare twin that `maps`, which it has computed, do not depend on."""
    sum(one.sum() for one in maps).backward()
    return tuple(name for name, parameter in twin.named_parameters() if parameter.grad is None)


def idle_layers(model: nn.Module, idle: Collection[str]) -> list[str]:
    """Names of the convolutions and linear layers whose weights are among the parameters `idle`."""
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    return [name for name in layers if f"{name}.weight" in idle]


def bare_twin(model: nn.Module) -> nn.Module:
    """A copy without numbers, all of whose parameters want a gradient."""
    bare = {id(value): nn.Parameter(torch.empty_like(value, device="meta")) for value in model.parameters()} | {
        id(value): torch.empty_like(value, device="meta") for value in model.buffers()
    }
    twin = copy.deepcopy(model, bare).eval()  # what deepcopy is told to have copied already is left where it is
    for layer in twin.modules():
        if hasattr(layer, "grad_checkpointing"):
            layer.grad_checkpointing = False  # what recomputes is not looked at twice
    return twin


def num_channels(model: nn.Module) -> int:
    """Of an image: its first convolution's."""
    return next((layer.in_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)), 3)
