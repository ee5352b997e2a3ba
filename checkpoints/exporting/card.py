"""README.md of an export, in the form of the Hugging Face hub: what it is, where it comes from, how to load it."""

import json
from dataclasses import dataclass
from pathlib import Path

import timm
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from prelude.checkpoints.exporting.formats import DType, Format
from prelude.checkpoints.exporting.parity import Proof
from prelude.checkpoints.own_export import own_card
from prelude.checkpoints.source_names import run_of
from prelude.checkpoints.sources import OpenedEncoder
from prelude.data.errors import UserError
from prelude.pretrain.encoders import pooled_width
from prelude.pretrain.own_encoder import is_own

README = "README.md"
_NO_LICENSE = "unknown"
_LIBRARIES = {"timm": "timm", "transformers": "transformers", "onnx": "onnx", "torch": "pytorch"}
_METRICS = {"top1": "accuracy", "auc": "roc_auc", "map": "mean_average_precision", "auroc": "roc_auc"}


@dataclass(frozen=True)
class Card:
    encoder: OpenedEncoder
    folder: str  # name of the export's; of several formats, NAME/FORMAT
    source: str
    format: Format
    dtype: DType
    proof: Proof
    license: str | None


def write_card(card: Card, folder: Path) -> None:
    """Writes README.md, and reads it back as the hub would."""
    (folder / README).write_text(f"---\n{_front_matter(card)}---\n\n{_facts(card)}\n{_loading(card)}")
    _read_back(folder / README)


def check_card(folder: Path) -> None:
    """Raises UserError where the hub would not take README.md: offline, by its own package's rules."""
    path = folder / README
    if _read_back(path).get("license") in (None, "", _NO_LICENSE):
        raise UserError("The hub wants a licence; add --license ID, such as apache-2.0 or cc-by-nc-4.0.")


def _read_back(path: Path) -> dict:
    """The front matter as the hub reads it. Raises UserError where it cannot."""
    try:
        found = ModelCard.load(path).data.to_dict()
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise UserError(f"{path} has no front matter that the hub takes ({error}); export again.") from None
    for key in ("library_name", "pipeline_tag", "tags"):
        if not found.get(key):
            raise UserError(f"{path} says no {key}, without which the hub does not list it; export again.")
    return found


def _front_matter(card: Card) -> str:
    results, objective = _results(card), card.encoder.origin.get("objective")
    data = ModelCardData(
        library_name=_LIBRARIES[card.format],
        license=card.license or _NO_LICENSE,
        pipeline_tag="image-feature-extraction",
        tags=[
            "image-feature-extraction",
            "self-supervised-learning",
            *filter(None, [objective]),
        ],
        model_name=Path(card.folder).parts[0] if results else None,
        eval_results=results or None,
    )
    return data.to_yaml() + "\n"


def _results(card: Card) -> list[EvalResult]:
    """What the run's evaluations found of these very weights; of rounded ones none has been made."""
    run = run_of(card.source)
    if run is None or card.dtype != "float32":
        return []
    found = []
    for path in sorted(run.glob("evaluations/*.json")):
        try:
            result = json.loads(path.read_text())
            if result["encoder"]["fingerprint"] != card.encoder.fingerprint:
                continue
            test = result["data"]["test"]
            found += [
                EvalResult(
                    task_type="image-classification",
                    dataset_type="private",
                    dataset_config=test["fingerprint"],  # the hub's readers tell sets apart by it, and not by names
                    dataset_name=f"{test['num_samples']} test images, fingerprint {test['fingerprint']}",
                    metric_type=_METRICS[name],
                    metric_name=f"{result['evaluator'].replace('_', ' ')}, {name}",
                    metric_value=round(number["value"], 2),
                )
                for name, number in result["numbers"].items()
                if name in _METRICS
            ]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another's file, or half of one: a card is no place to complain of it
    return found


def _facts(card: Card) -> str:
    encoder, origin, config = card.encoder, card.encoder.origin, card.encoder.config
    height, width = config.size
    whose = "" if is_own(config) else "timm "
    rounded = "" if card.dtype == "float32" else "rounded from those of "
    facts = {
        "Architecture": f"{whose}`{config.name}`, {pooled_width(encoder.model)} features",
        "Input": f"{config.in_chans} x {height} x {width} pixels, bicubic",
        "Volumes": _of_volumes(card),
        "Objective": origin.get("objective"),
        "Optimizer steps": origin.get("step"),
        "Data set": origin.get("data") and f"fingerprint `{origin['data']}`",
        "Started from": origin.get("weights"),
        "Pixels": f"in [0, 1], minus {list(encoder.mean)}, divided by {list(encoder.std)}",
        "Weights": f"{card.dtype}, {rounded}fingerprint `{encoder.fingerprint}`",
        "Compared": f"features of {card.proof.reader} differ by at most {card.proof.difference:.1e}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value)
    return f"""# {encoder.name}

An image encoder that was pretrained without labels. It has no classifier.

| | |
|---|---|
{table}
"""


def _of_volumes(card: Card) -> str | None:
    if not card.encoder.volume_embed or card.format != "timm":
        return None
    _, channels, *patch = card.encoder.volume_embed["weight"].shape
    sides = " x ".join(map(str, patch))
    return f"`volume_embed.safetensors`, which timm does not read, projects patches of {channels} x {sides} voxels"


def _loading(card: Card) -> str:
    """How to load it; the blocks of code are run by a test, in the folder's parent."""
    encoder, config = card.encoder, card.encoder.config
    if is_own(config):
        return own_card(encoder)
    shape = f"(B, {config.in_chans}, {config.size[0]}, {config.size[1]})"
    pooled = f"(B, {pooled_width(encoder.model)})"
    match card.format:
        case "timm":
            return f"""```python
import timm
encoder = timm.create_model("local-dir:{card.folder}", pretrained=True).eval()
features = encoder(images)  # {shape} to {pooled}
```

With `num_classes=N` timm adds a fresh classifier for fine-tuning. timm {timm.__version__} wrote this folder.
"""
        case "transformers":
            # Without a type transformers computes in that of the weights, for which images would have to be cast.
            wide, dtype = ("", "") if card.dtype == "float32" else ("import torch\n", ", dtype=torch.float32")
            flat = ".flatten(1)" if card.proof.note == "ResNetModel" else ""
            return f"""```python
{wide}from transformers import AutoModel
encoder = AutoModel.from_pretrained("./{card.folder}"{dtype}).eval()
found = encoder(pixel_values=images)  # {shape}
unpooled, features = found.last_hidden_state, found.pooler_output{flat}  # features: {pooled}
```

It opens as a {card.proof.note}.
"""
        case "onnx":
            return f"""```python
import onnxruntime
session = onnxruntime.InferenceSession("{card.folder}/encoder.onnx")
features, unpooled = session.run(None, {{"images": images.numpy()}})  # {shape} to {pooled}
```

It takes {card.proof.note}, in {card.dtype}.
"""
        case "torch":
            return f"""```python
import torch
encoder = torch.export.load("{card.folder}/encoder.pt2").module()
features, unpooled = encoder(images)  # {shape} to {pooled}
```

It takes {card.proof.note}, in {card.dtype}.
"""
