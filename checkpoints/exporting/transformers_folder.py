"""An encoder as a folder that `transformers.AutoModel.from_pretrained` opens, with nothing drawn at random.

- A plain ViT becomes a Dinov2Model, with registers a Dinov2WithRegistersModel: the vision transformers of transformers
  whose pooled output is the class token. A ViTModel would add a layer of its own, with random weights.
- A plain ResNet becomes a ResNetModel.
- Every other architecture keeps timm's folder, which transformers opens by its own integration (TimmWrapperModel).
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from timm.layers import Mlp
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from prelude.checkpoints.convert.layers import first_difference, layers_of
from prelude.checkpoints.exporting.parity import DTYPES, TOLERANCES, Proof, images_for, prove, rounded
from prelude.checkpoints.sources import EXPORT_SECTION, OpenedEncoder
from prelude.data.errors import RunStopped, UserError
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import lay_out_encoder, seeded
from prelude.pretrain.files import save_file

Converted = tuple[dict, dict[str, Tensor]]  # config.json, and tensors by their published names


def write_transformers(encoder: OpenedEncoder, folder: Path, dtype: str, section: dict) -> Proof:
    """section: ours, for config.json. Where the architecture has no counterpart, `folder` holds timm's already.

    Raises UserError where transformers is missing, RunStopped where it computes something else.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(
            "--format transformers needs transformers; write pip install 'prelude-ssl[transformers]'."
        ) from None
    ours = rounded(encoder, dtype)
    if converted := convert(encoder.model, encoder.config.size):
        config, tensors = converted
        config |= {"dtype": dtype, EXPORT_SECTION: section}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessor(encoder), indent=2) + "\n")
        tensors = {name: _cast(tensor, dtype) for name, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with seeded(0), _no_progress_bar():
        model, found = transformers.AutoModel.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    if at_random := [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]:
        raise RunStopped(
            f"transformers {transformers.__version__} does not find {at_random[0]} and {len(at_random) - 1} other "
            f"tensors of {encoder.name} in their places, so nothing was exported; write --format timm."
        )
    return prove(
        encoder, f"transformers {transformers.__version__}", _outputs(model.eval()), ours,
        images=[images_for(encoder)], tolerance=TOLERANCES["float32"], note=type(model).__name__,
    )  # fmt: skip


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _outputs(model: nn.Module) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Unpooled features; pooled ones where transformers pools as timm does."""

    def outputs(images: Tensor) -> tuple[Tensor, ...]:
        found = model(pixel_values=images)
        unpooled, pooled = found.last_hidden_state, found.pooler_output
        return unpooled, pooled.flatten(1) if pooled is not None else unpooled.mean(1)

    return outputs


def _cast(tensor: Tensor, dtype: str) -> Tensor:
    return (tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor).contiguous()


def is_converted(encoder: OpenedEncoder) -> bool:
    """Whether transformers has an architecture of its own for it."""
    return convert(encoder.model, encoder.config.size) is not None


def parts_turned_off(config: EncoderConfig) -> list[str]:
    """Settings that are null and without which timm builds another network. transformers hands settings to timm's
    factory, which drops those that are null."""
    return [key for key, value in config.kwargs.items() if value is None and _matters(config, key)]


def _matters(config: EncoderConfig, key: str) -> bool:
    without = {name: value for name, value in config.kwargs.items() if name != key}
    ours, theirs = (lay_out_encoder(config.model_copy(update={"kwargs": each})) for each in (config.kwargs, without))
    same = [[(name, tensor.shape) for name, tensor in model.state_dict().items()] for model in (ours, theirs)]
    return same[0] != same[1] or first_difference(layers_of(ours), layers_of(theirs)) is not None


def convert(model: nn.Module, size: tuple[int, int]) -> Converted | None:
    """None for an architecture that transformers has no counterpart of its own for."""
    if type(model) is VisionTransformer and _is_plain_vit(model) and size[0] == size[1]:
        return _vit(model, size)
    if type(model) is ResNet and _is_plain_resnet(model):
        return _resnet(model)
    return None


# ---- vision transformers


def _is_plain_vit(model: VisionTransformer) -> bool:
    patch = model.patch_embed
    return (
        model.cls_token is not None
        and model.global_pool == "token"
        and isinstance(model.norm, nn.LayerNorm)
        and not any(isinstance(module, nn.Module) and not isinstance(module, nn.Identity)
                    for module in (model.norm_pre, model.fc_norm, patch.norm))
        and patch.patch_size[0] == patch.patch_size[1]
        and patch.proj.bias is not None
        and isinstance(model.pos_embed, Tensor)
        and all(_is_plain_block(block) for block in model.blocks)
    )  # fmt: skip


def _is_plain_block(block: nn.Module) -> bool:
    attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    return (
        type(block) is Block
        and type(attention) is Attention
        and isinstance(attention.q_norm, nn.Identity)
        and isinstance(getattr(attention, "norm", nn.Identity()), nn.Identity)
        and type(mlp) is Mlp
        and isinstance(mlp.act, nn.GELU)
        and mlp.act.approximate == "none"
        and isinstance(mlp.norm, nn.Identity)
        and mlp.fc1.bias is not None
        and mlp.fc1.out_features % mlp.fc1.in_features == 0
        and all(isinstance(norm, nn.LayerNorm) and norm.weight is not None for norm in (block.norm1, block.norm2))
    )


def _vit(model: VisionTransformer, size: tuple[int, int]) -> Converted:
    width, registers = model.embed_dim, model.num_prefix_tokens - 1
    table, prefix = model.pos_embed, model.num_prefix_tokens
    if model.no_embed_class:
        table = torch.cat([table.new_zeros(1, prefix, width), table], 1)
    tensors = {
        "embeddings.cls_token": model.cls_token,
        "embeddings.mask_token": table.new_zeros(1, width),
        "embeddings.position_embeddings": torch.cat([table[:, :1], table[:, prefix:]], 1),
        "embeddings.patch_embeddings.projection.weight": model.patch_embed.proj.weight,
        "embeddings.patch_embeddings.projection.bias": model.patch_embed.proj.bias,
        "layernorm.weight": model.norm.weight,
        "layernorm.bias": model.norm.bias,
    }
    if registers:
        tensors["embeddings.register_tokens"] = model.reg_token + table[:, 1:prefix]
    for number, block in enumerate(model.blocks):
        tensors |= {f"encoder.layer.{number}.{name}": tensor for name, tensor in _block(block, width).items()}
    config = {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": width,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": model.blocks[0].attn.num_heads,
        "mlp_ratio": model.blocks[0].mlp.fc1.out_features // width,
        "hidden_act": "gelu",
        "layer_norm_eps": model.norm.eps,
        "image_size": size[0],
        "patch_size": model.patch_embed.patch_size[0],
        "num_channels": model.patch_embed.proj.in_channels,
        "qkv_bias": model.blocks[0].attn.qkv.bias is not None,
        "layerscale_value": 1.0,
        "use_swiglu_ffn": False,
    }
    if registers:
        config["num_register_tokens"] = registers
    return config, {name: tensor.detach() for name, tensor in tensors.items()}


def _block(block: Block, width: int) -> dict[str, Tensor]:
    found = {
        "attention.output.dense.weight": block.attn.proj.weight,
        "attention.output.dense.bias": block.attn.proj.bias,
    }
    for index, part in enumerate(("query", "key", "value")):
        rows = slice(index * width, (index + 1) * width)
        found[f"attention.attention.{part}.weight"] = block.attn.qkv.weight[rows]
        if block.attn.qkv.bias is not None:
            found[f"attention.attention.{part}.bias"] = block.attn.qkv.bias[rows]
    for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
        module = block.get_submodule(name)
        found |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    for number, scale in ((1, block.ls1), (2, block.ls2)):
        one = block.norm1.weight.new_ones(width)
        found[f"layer_scale{number}.lambda1"] = one if isinstance(scale, nn.Identity) else scale.gamma
    return found


# ---- residual networks


def _is_plain_resnet(model: ResNet) -> bool:
    """The stem of one convolution, ReLU, the stride in the middle, shortcuts of one convolution and one norm, pooled by
    the mean, and nothing dilated."""
    blocks = [block for stage in _stages(model) for block in stage]
    return (
        type(model.conv1) is nn.Conv2d
        and model.conv1.kernel_size == (7, 7)
        and isinstance(model.maxpool, nn.MaxPool2d)
        and isinstance(model.act1, nn.ReLU)
        and model.global_pool.pool_type == "avg"
        and model.feature_info[-1]["reduction"] == 32
        and len({type(block) for block in blocks}) == 1
        and type(blocks[0]) in (BasicBlock, Bottleneck)
        and all(_is_plain_residual(block) for block in blocks)
        and all(type(module) is nn.BatchNorm2d for module in (model.bn1, *(block.bn1 for block in blocks)))
    )


def _is_plain_residual(block: nn.Module) -> bool:
    shortcut = block.downsample
    unlike = isinstance(block, Bottleneck) and (
        block.conv2.groups != 1
        or block.conv1.out_channels * 4 != block.conv3.out_channels
        or block.conv1.stride != (1, 1)
    )
    return (
        block.se is None
        and (block.aa is None or isinstance(block.aa, nn.Identity))
        and (shortcut is None or [type(part) for part in shortcut] == [nn.Conv2d, nn.BatchNorm2d])
        and (shortcut is None or shortcut[0].kernel_size == (1, 1))
        and not unlike
    )


def _stages(model: ResNet) -> list[nn.Module]:
    return [model.layer1, model.layer2, model.layer3, model.layer4]


def _resnet(model: ResNet) -> Converted:
    tensors = _unit("embedder.embedder", model.conv1, model.bn1)
    bottleneck = isinstance(model.layer1[0], Bottleneck)
    parts = (1, 2, 3) if bottleneck else (1, 2)
    for stage, blocks in enumerate(_stages(model)):
        for number, block in enumerate(blocks):
            place = f"encoder.stages.{stage}.layers.{number}"
            for index, part in enumerate(parts):
                conv, norm = getattr(block, f"conv{part}"), getattr(block, f"bn{part}")
                tensors |= _unit(f"{place}.layer.{index}", conv, norm)
            if block.downsample is not None:
                tensors |= _unit(f"{place}.shortcut", *block.downsample)
    config = {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "num_channels": model.conv1.in_channels,
        "embedding_size": model.conv1.out_channels,
        "hidden_sizes": [
            (blocks[-1].conv3 if bottleneck else blocks[-1].conv2).out_channels for blocks in _stages(model)
        ],
        "depths": [len(blocks) for blocks in _stages(model)],
        "layer_type": "bottleneck" if bottleneck else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }
    return config, tensors


def _unit(place: str, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> dict[str, Tensor]:
    found = {f"{place}.convolution.weight": conv.weight.detach()}
    return found | {f"{place}.normalization.{name}": tensor.detach() for name, tensor in norm.state_dict().items()}


# ---- pixels


def _preprocessor(encoder: OpenedEncoder) -> dict:
    """Images of any size resized to the encoder's, and normalised as in training."""
    height, width = encoder.config.size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
    }
