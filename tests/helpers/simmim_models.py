"""Small SimMIM models whose weights and images are closed forms, so that no random generator has to agree.

Tensor number i of the list is filled with 0.2 sin(0.37 j + 0.11 i), norm weights one more.
"""

import torch

from prelude.objectives.masking import PatchMask
from prelude.objectives.options import SimMIMOptions
from prelude.objectives.simmim import SimMIM
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import build_encoder

CELLS = ["1011 0110 1101 0110", "0110 1101 1011 1100"]
SWIN = EncoderConfig(
    name="swin_tiny_patch4_window7_224",
    image_size=32,
    kwargs={"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "drop_path_rate": 0.0},
)
VIT = EncoderConfig(
    name="vit_tiny_patch16_224",
    image_size=32,
    patch_size=4,
    pos_embed="learned",
    kwargs={"embed_dim": 16, "depth": 2, "num_heads": 2},
)
BLOCK = "norm1.weight norm1.bias {table} attn.qkv.weight attn.qkv.bias attn.proj.weight attn.proj.bias norm2.weight "
BLOCK += "norm2.bias mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias"


def block(path: str, table: str = "") -> list[str]:
    return [f"encoder.{path}.{name}" for name in BLOCK.format(table=table).split()]


def swin_names() -> list[str]:
    names = ["encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.bias", "encoder.patch_embed.norm.weight"]
    names += ["encoder.patch_embed.norm.bias", "mask_token"]
    for stage in (0, 1):
        if stage:  # timm's merging layer belongs to the stage that it leads to
            merging = ("norm.weight", "norm.bias", "reduction.weight")
            names += [f"encoder.layers.1.downsample.{name}" for name in merging]
        for place in (0, 1):
            names += block(f"layers.{stage}.blocks.{place}", "attn.relative_position_bias_table")
    return [*names, "encoder.norm.weight", "encoder.norm.bias", "head.weight", "head.bias"]


def vit_names() -> list[str]:
    names = ["encoder.cls_token", "encoder.pos_embed", "encoder.patch_embed.proj.weight"]
    names += ["encoder.patch_embed.proj.bias", "mask_token", *block("blocks.0"), *block("blocks.1")]
    return [*names, "encoder.norm.weight", "encoder.norm.bias", "head.weight", "head.bias"]


def closed_form(encoder: EncoderConfig, names: list[str], **options) -> SimMIM:
    objective = SimMIM(
        build_encoder(encoder, seed=0),
        SimMIMOptions(mask_patch=8, **options),
        image_size=(32, 32),
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
    ).double()
    parameters = dict(objective.named_parameters())
    assert sorted(names) == sorted(parameters)
    for i, name in enumerate(names):
        parameter = parameters[name]
        values = 0.2 * torch.sin(0.37 * torch.arange(parameter.numel(), dtype=torch.float64) + 0.11 * i)
        if "norm" in name and name.endswith("weight"):
            values += 1
        parameter.data.copy_(values.view_as(parameter))
        if encoder is VIT and name.endswith("qkv.bias"):  # the official transformer has no bias of keys
            parameter.data[16:32] = 0
    return objective.train()


def images(width: int = 32, count: int = 2) -> torch.Tensor:
    b, c, r, q = torch.meshgrid(
        *(torch.arange(x, dtype=torch.float64) for x in (count, 3, width, width)), indexing="ij"
    )
    return torch.sin(0.05 * (width * r + q) + c + 0.7 * b)


def the_mask(only: int | None = None) -> PatchMask:
    hidden = torch.tensor([[int(cell) for cell in cells.replace(" ", "")] for cells in CELLS])
    order = hidden.argsort(dim=1, stable=True)  # (B, 16): visible first
    restore = order.argsort(dim=1)
    mask = PatchMask(order[:, :6], order[:, 6:], restore)
    assert torch.equal(mask.hidden, hidden.bool())
    return mask if only is None else PatchMask(*(part[only, None] for part in (mask.keep, mask.removed, mask.restore)))


def outcome(objective, only: int | None = None):
    pixels, mask = images(), the_mask(only)
    pixels = pixels if only is None else pixels[only, None]
    features = objective.encode(pixels, mask.hidden)
    predicted = objective.decode(features)
    return features, predicted, objective.loss(objective.reconstruction(pixels, predicted, mask)).total
