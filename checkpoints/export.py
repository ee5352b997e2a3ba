"""An encoder as a folder that plain timm loads: `timm.create_model("local-dir:DIR", pretrained=True)`.

One that timm lacks (`encoder.name=module:function`) becomes a folder of weights and the name of its function.

- Nothing of ours is needed to load it: weights under timm's names, and timm's own config.json.
- Published only after timm has loaded it in this process and its features agree with ours.
- The folder appears whole: it is written beside its place, and takes it in one operation. Where the file system cannot
  exchange two folders (NFS), a kill between two renames leaves the earlier export aside, and the next export brings it
  back first.
"""

import ctypes
import json
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from prelude.checkpoints.own_export import own_card, own_config, own_reloaded
from prelude.checkpoints.sources import EXPORT_SECTION, OpenedEncoder, open_encoder
from prelude.data.errors import RunStopped, UserError
from prelude.pretrain.encoders import seeded
from prelude.pretrain.files import remove, save_file, sync_to_disk
from prelude.pretrain.named_code import is_named
from prelude.pretrain.own_encoder import gives, is_own

# The same weights in the same operations on the same machine; relative to features that are larger than one.
TOLERANCE = 1e-6
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)


@dataclass(frozen=True)
class ExportReport:
    path: Path
    architecture: str  # timm's name, or module:function
    fingerprint: str  # of the weights
    max_difference: float  # absolute, between features of the reloaded model and of ours
    num_parameters: int

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.architecture}, {self.num_parameters:,} parameters; features of "
            f"{'its function' if is_named(self.architecture) else 'plain timm'} differ from ours by at most "
            f"{self.max_difference:.1e}"
        )


def export_encoder(source: str, to: str | Path) -> ExportReport:
    """Writes the encoder of `source` (see `open_encoder`) to the folder `to`, replacing an earlier export there.

    Raises UserError when `to` holds anything that is not an export of ours, or the disk refuses; RunStopped when
    timm's features differ from ours, in which case nothing is published.
    """
    to = Path(to)
    _refuse_to_overwrite(to)
    encoder = open_encoder(source)
    if encoder.config.norm_eps is not None:
        raise UserError(
            f"{source} has LayerNorms of eps {encoder.config.norm_eps:g}, which timm's config.json cannot say; open "
            "the weights that it comes from as SOURCE#norm_eps=1e-6, whose features differ in the sixth digit."
        )
    draft = _beside(to, ".tmp-")
    try:
        if not os.path.lexists(to) and _aside(to).is_dir():
            os.rename(_aside(to), to)  # a kill came between two renames
        remove(draft)
        draft.mkdir(parents=True)
        tensors = {name: tensor.contiguous() for name, tensor in encoder.model.state_dict().items()}
        save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
        own = is_own(encoder.config)
        settings = own_config(encoder) if own else _timm_config(encoder)
        (draft / "config.json").write_text(json.dumps(settings | {EXPORT_SECTION: _section(encoder)}, indent=2) + "\n")
        difference = _feature_difference(encoder, draft)
        card = own_card(encoder) if own else _loading(encoder, to.absolute().name)
        (draft / "README.md").write_text(_card(encoder) + card)
        _publish(draft, to)
    except (OSError, SafetensorError) as error:
        raise UserError(f"The export cannot be written to {to} ({error}); make room there or name another.") from error
    finally:
        with suppress(OSError):
            remove(draft)
    numel = sum(tensor.numel() for tensor in encoder.model.parameters())
    return ExportReport(to, encoder.config.name, encoder.fingerprint, difference, numel)


def _refuse_to_overwrite(to: Path) -> None:
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return
    try:
        ours = EXPORT_SECTION in json.loads((to / "config.json").read_text())
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise UserError(f"{to} exists and is no earlier export; name a new folder, or empty this one first.")


def _publish(draft: Path, to: Path) -> None:
    for path in (*draft.iterdir(), draft):
        sync_to_disk(path)  # or a power cut could leave the new names with nothing behind them
    if not os.path.lexists(to):
        os.rename(draft, to)
    elif not _exchanged(draft, to):
        _replace_in_two_steps(draft, to)
    sync_to_disk(draft.parent)


def _exchanged(draft: Path, to: Path) -> bool:
    """Lets two folders take each other's place in one operation; false where the system or file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    return libc.renameat2(_HERE, os.fsencode(draft), _HERE, os.fsencode(to), _EXCHANGE) == 0


def _replace_in_two_steps(draft: Path, to: Path) -> None:
    aside = _aside(to)
    remove(aside)
    os.rename(to, aside)
    try:
        os.rename(draft, to)
    except OSError:
        os.rename(aside, to)
        raise
    with suppress(OSError):
        remove(aside)


def _aside(to: Path) -> Path:
    return _beside(to, ".tmp-earlier-")


def _beside(to: Path, prefix: str) -> Path:
    return to.absolute().parent / f"{prefix}{to.absolute().name}"


# ---- what timm reads


def _timm_config(encoder: OpenedEncoder) -> dict:
    """config.json: how to build the architecture, how to feed it, and a section of ours that timm reads past."""
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


def _section(encoder: OpenedEncoder) -> dict:
    """Of ours, in config.json: all that opens the folder here."""
    return {
        "encoder": encoder.config.model_dump(mode="json"),
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "fingerprint": encoder.fingerprint,
        "origin": encoder.origin,
    }


def _model_arguments(encoder: OpenedEncoder) -> dict:
    """Arguments of timm.create_model that shape the weights; what regularised the pretraining stays behind."""
    config = encoder.config
    arguments = {key: value for key, value in config.kwargs.items() if not key.endswith("_rate")}
    if config.patch_size is not None:
        arguments["patch_size"] = config.patch_size
    if config.in_chans != 3:
        arguments["in_chans"] = config.in_chans
    if _takes_image_size(config.name, config.size, arguments):
        arguments["img_size"] = list(config.size)
    return arguments


def _takes_image_size(name: str, size: tuple[int, int], arguments: dict) -> bool:
    """Whether the architecture is built for one size (its table of positions) or takes any."""
    try:
        with torch.device("meta"):
            timm.create_model(name, pretrained=False, num_classes=0, img_size=size, **arguments)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return False
    return True


# ---- the proof, and the card


@torch.no_grad()
def _feature_difference(encoder: OpenedEncoder, folder: Path) -> float:
    """Largest difference of pooled and unpooled features. Raises RunStopped above the tolerance."""
    own = is_own(encoder.config)
    with seeded(0):
        reloaded = (own_reloaded(folder) if own else timm.create_model(f"local-dir:{folder}", pretrained=True)).eval()
    images = torch.randn(2, encoder.config.in_chans, *encoder.config.size, generator=torch.Generator().manual_seed(0))
    largest = 0.0
    for ours, timms in zip(_features(encoder.model, images), _features(reloaded, images), strict=True):
        difference = (ours - timms).abs().max().item() if ours.shape == timms.shape else math.inf
        largest = max(largest, difference)
        if not difference <= TOLERANCE * max(1.0, ours.abs().max().item()):
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


def _card(encoder: OpenedEncoder) -> str:
    origin, config = encoder.origin, encoder.config
    height, width = config.size
    whose = "" if is_own(config) else "timm "
    facts = {
        "Architecture": f"{whose}`{config.name}`, {encoder.model.num_features} features, {height} x {width} pixels",
        "Objective": origin.get("objective"),
        "Optimizer steps": origin.get("step"),
        "Data set": origin.get("data") and f"fingerprint `{origin['data']}`",
        "Pixels": f"in [0, 1], minus {list(encoder.mean)}, divided by {list(encoder.std)}",
        "Weights": f"fingerprint `{encoder.fingerprint}`",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value)
    return f"""# {encoder.name}

An image encoder that was pretrained without labels. It has no classifier.

| | |
|---|---|
{table}
"""


def _loading(encoder: OpenedEncoder, folder: str) -> str:
    config = encoder.config
    height, width = config.size
    return f"""
```python
import timm
encoder = timm.create_model("local-dir:{folder}", pretrained=True).eval()
features = encoder(images)  # (B, {encoder.config.in_chans}, {height}, {width}) to (B, {encoder.model.num_features})
```

With `num_classes=N` timm adds a fresh classifier for fine-tuning. timm {timm.__version__} wrote this folder.
"""
