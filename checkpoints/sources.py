"""Encoders from wherever they are: a run, a checkpoint, an export, timm's pretrained weights, or chance.

- Whatever the source, what comes back is a timm model in eval mode whose weights want no gradient.
- Every tensor of the model comes from the source under its own name and shape, or the source is refused.
- Folders are read as safetensors and JSON; nothing in them can run code.
- `fingerprint` is the same for the same weights, wherever they lie.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prelude.checkpoints import store
from prelude.data.batch import IMAGENET_MEAN, IMAGENET_STD
from prelude.data.errors import UserError
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import build_encoder, seeded

EXPORT_SECTION = "prelude"  # of an export's config.json; timm reads past it
_TIMM, _RANDOM = "timm:", "random:"
_KINDS = "a run folder, a checkpoint folder, an exported folder, timm:NAME, or random: before one of these"


@dataclass(frozen=True)
class OpenedEncoder:
    model: nn.Module  # images (B, 3, H, W), normalised by mean and std, to pooled features (B, D)
    config: EncoderConfig
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    name: str  # for a table or a plot: the source, short
    fingerprint: str  # of the weights
    origin: dict = field(default_factory=dict)  # what is known of how it was trained: objective, step, data


@dataclass(frozen=True)
class Description:
    """What a source says about its encoder before any weight is read."""

    config: EncoderConfig
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    name: str
    weights: Path | None = None  # a safetensors file; None: timm's own
    prefix: str = ""  # of the encoder's tensors in that file
    origin: dict = field(default_factory=dict)


def open_encoder(source: str, *, seed: int = 0) -> OpenedEncoder:
    """Opens `source`: a folder of a run (its newest complete checkpoint), of a checkpoint or of an export;
    `timm:NAME`, timm's pretrained weights; `random:SOURCE`, the same architecture with weights drawn from `seed`.

    Raises UserError when there is no such source, when it is damaged, or when it does not fit its architecture.
    """
    source = str(source)
    if source.startswith(_RANDOM):
        described = describe(source.removeprefix(_RANDOM))
        model = build_encoder(described.config, seed=seed)
        name, origin = f"{_RANDOM}{described.name}", {}
    else:
        described = describe(source)
        model = _with_weights(described) if described.weights else _from_timm(described.name)
        name, origin = described.name, described.origin
    model.eval().requires_grad_(False)
    config, mean, std = described.config, described.mean, described.std
    return OpenedEncoder(model, config, mean, std, name, fingerprint(model), origin)


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes and bytes of a model's parameters and persistent buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- what each kind of source says


def describe(source: str) -> Description:
    """Raises UserError for a source that is none, or is damaged."""
    if source.startswith(_TIMM):
        return _describe_timm(source.removeprefix(_TIMM))
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; write {_KINDS}.")
    if (folder / store.MANIFEST).exists() or folder.name.startswith("step-"):
        return _describe_checkpoint(folder)
    if (folder / "config.json").exists():
        return _describe_export(folder)
    for checkpoints in (folder / "checkpoints", folder):
        if newest := store.Store(checkpoints).newest():
            return _describe_checkpoint(newest)
    raise UserError(f"{folder} holds no complete checkpoint and no export; write {_KINDS}.")


def _describe_checkpoint(folder: Path) -> Description:
    if why := store.problem(folder, files=(store.MODEL, store.STATE)):
        raise UserError(f"{folder} is no complete checkpoint: {why}; write the run's folder to take its newest one.")
    saved = json.loads((folder / store.STATE).read_text())
    meta = saved["meta"]
    objective = meta.get("config", {}).get("objective", {}).get("name")
    data = meta.get("loader", {}).get("fingerprint")
    run = folder.absolute().parent.parent.name
    return Description(
        config=EncoderConfig.model_validate(meta["encoder"]),
        mean=tuple(meta["mean"]),
        std=tuple(meta["std"]),
        name=f"{run}/{folder.name}",
        weights=folder / store.MODEL,
        prefix=meta["exported"],
        origin={"objective": objective, "step": saved["step"], "data": data},
    )


def _describe_export(folder: Path) -> Description:
    try:
        ours = json.loads((folder / "config.json").read_text())[EXPORT_SECTION]
        return Description(
            config=EncoderConfig.model_validate(ours["encoder"]),
            mean=tuple(ours["mean"]),
            std=tuple(ours["std"]),
            name=folder.absolute().name,
            weights=folder / "model.safetensors",
            origin=ours["origin"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder / 'config.json'} is not one that an export writes; write a folder that was exported from a run."
        ) from None


def _describe_timm(name: str) -> Description:
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if cfg is None:
        raise UserError(f"timm {timm.__version__} has no model {name}; timm.list_models(pretrained=True) names them.")
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=0)
    learned = isinstance(getattr(model, "pos_embed", None), nn.Parameter)
    return Description(
        # The table of positions is part of the weights; where there is none, the key keeps its default.
        config=EncoderConfig(
            name=name, image_size=tuple(cfg.input_size[1:]), **({"pos_embed": "learned"} if learned else {})
        ),
        mean=tuple(cfg.mean or IMAGENET_MEAN),
        std=tuple(cfg.std or IMAGENET_STD),
        name=_TIMM + name,
    )


# ---- the weights


def _with_weights(described: Description) -> nn.Module:
    model = build_encoder(described.config, seed=0)
    tensors = _read(described.weights, described.prefix)
    _refuse_misfit(model, tensors, described)
    model.load_state_dict(tensors, strict=True)
    return model


def _read(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors below `prefix`, under their names without it; the others stay on disk."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); export or save it again.") from None


def _refuse_misfit(model: nn.Module, tensors: dict[str, Tensor], described: Description) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    mistakes = [f"{name} is missing" for name in shapes if name not in found]
    mistakes += [f"{name} has no place" for name in found if name not in shapes]
    mistakes += [f"{n} is {found[n]} instead of {shapes[n]}" for n in shapes if n in found and found[n] != shapes[n]]
    if mistakes:
        more = f", and {len(mistakes) - 5} more" if len(mistakes) > 5 else ""
        raise UserError(
            f"{described.weights} does not hold the weights of {described.config.name}: "
            f"{', '.join(mistakes[:5])}{more}; use the timm version that it was trained with."
        )


def _from_timm(name: str) -> nn.Module:
    name = name.removeprefix(_TIMM)
    try:
        with seeded(0):
            return timm.create_model(name, pretrained=True, num_classes=0)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"The pretrained weights of {name} could not be fetched ({reason}); connect to the network, or copy them "
            f"into the Hugging Face cache of this machine."
        ) from error
