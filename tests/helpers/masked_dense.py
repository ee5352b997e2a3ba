"""SparK's encoder as it is usually written: every layer runs on whole maps, which are then multiplied by the mask.

The reference for sparse encodings, in forward and gradient, and their rival in speed. It knows convolutions, batch and
layer norms, global response norm, max pooling, and timm's squeeze-and-excitation.
"""

from contextlib import contextmanager

import torch
from timm.layers import BatchNormAct2d, SEModule
from timm.layers.grn import GlobalResponseNorm
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn


def encode(model: nn.Module, images: Tensor, visible: Tensor, grid: tuple[int, int]) -> list[Tensor]:
    """The maps of all stages, (B, C, H, W), zero at inactive positions. visible: (B, K) cells of `grid`.

    Running statistics of batch norms are not those of a sparse encoding afterwards.
    """
    mask = torch.zeros(len(visible), grid[0] * grid[1], device=images.device, dtype=images.dtype)
    mask = mask.scatter_(1, visible, 1.0).view(-1, 1, *grid)
    with _masked(model, mask):
        maps = model.forward_intermediates(images * enlarged(mask, images), intermediates_only=True)
    return [features * enlarged(mask, features) for features in maps]


def enlarged(mask: Tensor, like: Tensor, channels_last: bool = False) -> Tensor:
    """(B, 1, rows, columns) to the size of `like`: (B, 1, H, W), or (B, H, W, 1)."""
    height, width = like.shape[1:3] if channels_last else like.shape[2:]
    large = mask.repeat_interleave(height // mask.shape[2], 2).repeat_interleave(width // mask.shape[3], 3)
    return large.permute(0, 2, 3, 1) if channels_last else large


@contextmanager
def _masked(model: nn.Module, mask: Tensor):
    def mask_output(layer, args, output):
        return output.masked_fill(enlarged(mask, output, _is_channels_last(layer)) == 0, 0)

    def mask_input(layer, args):
        return (args[0] * enlarged(mask, args[0], _is_channels_last(layer)),)

    def hide_from_maximum(layer, args):
        return (args[0].masked_fill(enlarged(mask, args[0]) == 0, -torch.inf),)

    def mean_over_visible(layer, args):
        return (args[0] / mask.mean((2, 3), keepdim=True),)

    def normed(layer, args, output):
        return _batch_norm(layer, args[0], enlarged(mask, args[0]))

    squeezed = {}
    for layer in model.modules():
        if isinstance(layer, (SEModule, SqueezeExcite)):
            first = layer.fc1 if isinstance(layer, SEModule) else layer.conv_reduce
            squeezed |= {id(part): part is first for part in layer.modules()}
    handles = []
    for layer in model.modules():
        if id(layer) in squeezed:
            handles += [layer.register_forward_pre_hook(mean_over_visible)] if squeezed[id(layer)] else []
        elif isinstance(layer, nn.BatchNorm2d):
            handles.append(layer.register_forward_hook(normed))
        elif isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.LayerNorm, GlobalResponseNorm)):
            handles.append(layer.register_forward_hook(mask_output))
        if isinstance(layer, nn.MaxPool2d):
            handles.append(layer.register_forward_pre_hook(hide_from_maximum))
        if isinstance(layer, GlobalResponseNorm):
            handles.append(layer.register_forward_pre_hook(mask_input))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_channels_last(layer: nn.Module) -> bool:
    return type(layer) is nn.LayerNorm or getattr(layer, "channel_dim", 1) == -1 or type(layer).__name__ == "LayerNorm"


def _batch_norm(layer: nn.BatchNorm2d, x: Tensor, mask: Tensor) -> Tensor:
    mean, variance = layer.running_mean, layer.running_var
    if layer.training:
        count = mask.sum()
        mean = (x * mask).sum((0, 2, 3)) / count
        variance = ((x - mean[:, None, None]).square() * mask).sum((0, 2, 3)) / count
    scale = (variance + layer.eps).rsqrt() * layer.weight
    out = x * scale[:, None, None] + (layer.bias - mean * scale)[:, None, None]
    if isinstance(layer, BatchNormAct2d):
        out = layer.act(layer.drop(out))
    return out * mask
