"""An encoder as a folder that plain timm loads: `timm.create_model("local-dir:DIR", pretrained=True)`.

One that timm lacks (`encoder.name=module:function`) becomes a folder of weights and the name of its function.
"""

import json
import math
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from prelude.checkpoints.exporting.formats import VOLUMES
from prelude.checkpoints.exporting.parity import DTYPES, Proof, rounded
from prelude.checkpoints.own_export import own_config, own_reloaded
from prelude.checkpoints.sources import EXPORT_SECTION, OpenedEncoder
from prelude.data.errors import RunStopped
from prelude.pretrain.config import is_dropout
from prelude.pretrain.encoders import of_timm, seeded
from prelude.pretrain.files import save_file
from prelude.pretrain.own_encoder import gives, is_own

# The same weights in the same operations on the same machine; relative to the largest feature.
TOLERANCE = 1e-6


def write_timm(encoder: OpenedEncoder, folder: Path, dtype: str, section: dict) -> Proof:
    """section: ours, for config.json; timm reads past it. Raises RunStopped where timm computes something else."""
    tensors = {name: _cast(tensor, dtype).contiguous() for name, tensor in encoder.model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if encoder.volume_embed:
        beside = {name: _cast(tensor, dtype).contiguous() for name, tensor in encoder.volume_embed.items()}
        save_file(beside, folder / VOLUMES, metadata={"format": "pt"})
    settings = own_config(encoder) if is_own(encoder.config) else timm_config(encoder)
    (folder / "config.json").write_text(json.dumps(settings | {EXPORT_SECTION: section}, indent=2) + "\n")
    reader = "its function" if is_own(encoder.config) else "plain timm"
    return Proof(reader, _feature_difference(encoder, rounded(encoder, dtype), folder))


def _cast(tensor: Tensor, dtype: str) -> Tensor:
    return tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor


def timm_config(encoder: OpenedEncoder) -> dict:
    """config.json: how to build the architecture, and how to feed it."""
    model, config = encoder.model, encoder.config
    known = timm.get_pretrained_cfg(config.name)
    arguments = _model_arguments(encoder)
    pretrained_cfg = {
        "num_classes": 0,
        "input_size": [config.in_chans, *config.size],
        "fixed_input_size": "img_size" in arguments,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        # timm would take the weights of another number of channels for those of three, and adapt them once more.
        "first_conv": known.first_conv if known and config.in_chans == 3 else None,
        "classifier": known.classifier if known else None,
    }
    return {
        "architecture": config.name.partition(".")[0],
        "num_classes": 0,
        "num_features": model.num_features,
        "model_args": arguments,
        "pretrained_cfg": pretrained_cfg,
    }


def _model_arguments(encoder: OpenedEncoder) -> dict:
    """Arguments of timm.create_model that shape the weights; what regularised the pretraining stays behind."""
    config = encoder.config
    arguments = {key: value for key, value in config.kwargs.items() if not is_dropout(key)}
    if config.patch_size is not None:
        arguments["patch_size"] = config.patch_size
    if config.in_chans != 3:
        arguments["in_chans"] = config.in_chans
    if takes_image_size(config.name, config.size, arguments):
        arguments["img_size"] = list(config.size)
    return arguments


def takes_any_size(encoder: OpenedEncoder) -> bool:
    """Whether timm builds the architecture for no size in particular."""
    return not takes_image_size(encoder.config.name, encoder.config.size, dict(encoder.config.kwargs))


def takes_image_size(name: str, size: tuple[int, int], arguments: dict) -> bool:
    """Whether the architecture is built for one size (its table of positions) or takes any."""
    try:
        with torch.device("meta"):
            of_timm(name, num_classes=0, img_size=size, **arguments)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return False
    return True


@torch.no_grad()
def _feature_difference(encoder: OpenedEncoder, model: nn.Module, folder: Path) -> float:
    """Largest difference of pooled and unpooled features. Raises RunStopped above the tolerance."""
    own = is_own(encoder.config)
    with seeded(0):
        reloaded = (own_reloaded(folder) if own else timm.create_model(f"local-dir:{folder}", pretrained=True)).eval()
    images = torch.randn(2, encoder.config.in_chans, *encoder.config.size, generator=torch.Generator().manual_seed(0))
    largest = 0.0
    for ours, timms in zip(_features(model, images), _features(reloaded, images), strict=True):
        difference = (ours - timms).abs().max().item() if ours.shape == timms.shape else math.inf
        largest = max(largest, difference)
        if not difference <= TOLERANCE * ours.abs().max().item():
            if own:
                raise RunStopped(
                    f"Features of {encoder.name} built anew differ by {difference:.1e}, so nothing was exported; "
                    f"{encoder.config.name} does not build the same network twice, or keeps what decides its features "
                    "in no parameter and no buffer."
                )
            raise RunStopped(
                f"timm's features of {encoder.name} differ from ours by {difference:.1e}, so nothing was exported; "
                f"timm {timm.__version__} builds {encoder.config.name} differently from how it was trained."
            )
    return largest


def _features(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    if gives(model):
        return (model(images),)
    return model.forward_features(images), model(images)
