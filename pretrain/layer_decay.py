"""Layer-wise decay of the learning rate: the deeper below the head, the smaller the rate (arXiv 2106.08254).

    rate of a parameter = rate x decay ** (layer of the head - its layer)

What a layer is follows the published recipes:

| encoder | layers |
|---|---|
| ViTs, EVA, BEiT | 0: patches, tokens, positions; one a block; last norms and shared biases with the head (MAE, BEiT) |
| ResNets | 0: stem; stage 1; groups of 2 or 4 blocks of stage 2, of 3 or 4 of stage 3; stage 4; the head (SparK) |
| ConvNeXts | 0: stem; stages 1 and 2; groups of 3 blocks of stage 3; stage 4; final norm with the head (ConvNeXt) |
| others | as timm groups them, one a block |
"""

import re
from itertools import chain

from timm.models import ConvNeXt, ResNet
from timm.models._manipulate import group_with_matcher
from torch import nn

from prelude.data.errors import UserError
from prelude.pretrain.kept_patches import is_transformer

_HEAD = "\0"  # a name that no pattern of timm's matches: it falls into the group of the head


def lr_scales(encoder: nn.Module, decay: float, key: str = "optimizer.layer_decay") -> dict[str, float]:
    """The learning rate's multiplier of each of the encoder's parameters; the head's would be 1.

    key: of the config that says `decay`, for messages. Raises UserError for a network that does not say what its layers
    are.
    """
    if decay == 1:
        return {name: 1.0 for name, _ in encoder.named_parameters()}
    layers, head = layer_numbers(encoder, key)
    return {name: decay ** (head - layer) for name, layer in layers.items()}


def layer_numbers(encoder: nn.Module, key: str = "optimizer.layer_decay") -> tuple[dict[str, int], int]:
    """The layer of each parameter, from 0 at the image, and that of the head."""
    names = [name for name, _ in encoder.named_parameters()]
    if is_transformer(encoder):
        return _of_transformer(names, len(encoder.blocks))
    if isinstance(encoder, ConvNeXt):
        return _of_convnext(names, [len(stage.blocks) for stage in encoder.stages])
    if isinstance(encoder, ResNet):
        return _of_resnet(names, [len(encoder.layer2), len(encoder.layer3)])
    if not hasattr(encoder, "group_matcher"):
        raise UserError(
            f"A learning rate by layers needs a {type(encoder).__name__} that says what its layers are, by timm's "
            f"group_matcher(coarse); write one, or {key}=1."
        )
    matcher = encoder.group_matcher(coarse=False)
    groups = group_with_matcher(chain(((name, name) for name in names), [(_HEAD, _HEAD)]), matcher, reverse=True)
    head = groups.pop(_HEAD)
    return groups, head


def _of_transformer(names: list[str], depth: int) -> tuple[dict[str, int], int]:
    layers = {}
    for name in names:
        block = re.match(r"blocks\.(\d+)\.", name)
        after = re.match(r"(norm|fc_norm|attn_pool|head|rel_pos_bias)\.", name)
        layers[name] = int(block[1]) + 1 if block else depth + 1 if after else 0
    return layers, depth + 1


def _of_convnext(names: list[str], blocks: list[int]) -> tuple[dict[str, int], int]:
    last = 12 if blocks[2] > 9 else 6
    layers = {}
    for name in names:
        place = re.match(r"stages\.(\d+)\.(downsample|blocks\.(\d+))", name)
        if name.startswith("stem"):
            layers[name] = 0
        elif not place:
            layers[name] = last + 1
        elif place[1] == "2":
            layers[name] = min(3 + int(place[3] or 0) // 3, last - 1)  # of one that is deeper than any published
        else:
            layers[name] = {"0": 1, "1": 2, "3": last}[place[1]]
    return layers, last + 1


def _of_resnet(names: list[str], blocks: list[int]) -> tuple[dict[str, int], int]:
    chunks = (4, 4) if blocks[0] > 4 else (2, 3)
    of_stage_2, of_stage_3 = (-(-count // chunk) for count, chunk in zip(blocks, chunks, strict=True))
    last = 2 + of_stage_2 + of_stage_3
    layers = {}
    for name in names:
        place = re.match(r"layer(\d)\.(\d+)\.", name)
        stage, block = (place[1], int(place[2])) if place else ("0", 0)
        layers[name] = {
            "0": 0,
            "1": 1,
            "2": 2 + block // chunks[0],
            "3": 2 + of_stage_2 + block // chunks[1],
            "4": last,
        }[stage]
    return layers, last + 1
