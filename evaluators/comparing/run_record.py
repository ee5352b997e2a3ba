"""What a run has left about itself: cost, curves, pictures, recipe, and whether it is finished.

- A step that was logged twice, as around an interruption, counts once: the later line wins.
- A line that a crash cut short is left out.
- Only what happened up to the step in question counts, so that an early checkpoint is not charged for the whole run.
"""

import json
import re
import statistics
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import yaml
from pydantic import BaseModel

from prelude.checkpoints.manifest import STATE
from prelude.checkpoints.starting import as_recorded
from prelude.checkpoints.store import Store, recorded_config
from prelude.data.signed_urls import shown_in
from prelude.data.value_range import may_be_found
from prelude.evaluators.comparing.comparison import Cost, Curve, Picture
from prelude.pretrain.config import Config
from prelude.pretrain.feature_health import OF_VOLUMES, TRIVIAL_LOSS
from prelude.pretrain.files import read_lines
from prelude.pretrain.resume import changed_settings

_OF_DATA = ("shards", "mix", "image", "select")  # keys that name what is learned from
_NOT_PLOTTED = (TRIVIAL_LOSS, OF_VOLUMES + TRIVIAL_LOSS)  # constants
_PICTURE = re.compile(r"(?P<title>.+)-(?P<step>\d{8})")


def cost_of(run: Path, step: int | None = None) -> Cost | None:
    """What the run took, up to `step` (default: all of it). None where nothing was logged."""
    records = _records(run / "metrics.jsonl", step)
    if not records:
        return None
    batch = recorded_config(run).get("train", {}).get("global_batch", 0)
    environment = _environment(run)
    seconds = waited = 0.0
    before = 0
    for record in records:
        taken = (record["step"] - before) * batch / record["images_per_second"]
        seconds, waited, before = seconds + taken, waited + taken * record["data_wait"], record["step"]
    return Cost(
        num_images=before * batch,
        num_steps=before,
        images_per_second=statistics.median(record["images_per_second"] for record in records),
        seconds=seconds,
        data_wait=waited / seconds if seconds else 0.0,
        peak_memory=max((record.get("peak_memory") or 0 for record in records), default=0) or None,
        num_ranks=environment.get("world_size"),
        device=environment.get("device"),
    )


def curves_of(run: Path, step: int | None = None) -> list[Curve]:
    """The loss, its parts, and what was found while it trained (`online/...`), in this order."""
    records = _records(run / "metrics.jsonl", step)
    found: dict[str, dict[int, float]] = {"loss": {}}
    for record in records:
        for name, value in {"loss": record["loss"], **record.get("parts", {})}.items():
            found.setdefault(name, {})[record["step"]] = value
    for report in _records(run / "online.jsonl", step, kind="evaluation"):
        for name, value in report["numbers"].items():
            found.setdefault(f"online/{name}", {})[report["step"]] = value
    return [
        Curve(name, list(values), list(values.values()))
        for name, values in found.items()
        if values and name not in _NOT_PLOTTED
    ]


# What the pictures of our objectives show; those of others speak for themselves.
CAPTIONS = {
    "reconstruction": "What the encoder sees, what is predicted, the original. ",
    "gradient": "Where an image changes: in what the encoder sees, as predicted, in the original. ",
    "volume_reconstruction": "Three slices of a volume, each as the encoder sees it, as predicted, the original. ",
    "volume_gradient": "Where these slices change: in what the encoder sees, as predicted, in the original. ",
    "blocks": "An image, the patches that the encoder sees, and, in orange, each block that is predicted from them, as "
    "at the run's first step. ",
    "regions": "An image, what the teacher finds salient, its regions in order, and each step: in orange what is "
    "predicted from the regions before it. ",
    "views": "Images, each in the views that are to be embedded alike. ",
    "rotations": "Images, each in the turns that are to be told apart; a green frame where the turn was recognised, "
    "red where not. ",
}


def pictures_of_run(run: Path) -> list[Picture]:
    """The newest picture of each kind that the run drew of its own training images."""
    newest: dict[str, tuple[int, Path]] = {}
    for path in (run / "pictures").glob("*.png"):
        if match := _PICTURE.fullmatch(path.stem):
            drawn = (int(match["step"]), path)
            newest[match["title"]] = max(newest.get(match["title"], drawn), drawn)
    return [
        Picture(title, f"{CAPTIONS.get(title, '')}Drawn by the run after {step:,} steps.", path.read_bytes())
        for title, (step, path) in sorted(newest.items())
    ]


def recipe_of(run: Path) -> str | None:
    """For a page that is handed on."""
    settings = recorded_config(run)
    return yaml.safe_dump(shown_in(settings), sort_keys=False) if settings else None


def is_finished(config: Config, options: type[BaseModel], data: Collection[str]) -> bool:
    """Whether the run of this config has come to its end, with these settings, on data with such a fingerprint.

    options: what the objective's own settings are read by.
    """
    saved = _saved(config)
    return _has_ended(saved, config, options) and saved["meta"]["loader"]["fingerprint"] in data


def is_finished_as(config: Config, options: type[BaseModel]) -> bool:
    """`is_finished` by the names of the shards, where nobody has opened them."""
    saved = _saved(config)
    if not _has_ended(saved, config, options):
        return False
    then = saved["meta"]["config"]
    found = config.data.range != "auto" or may_be_found(then["data"]["range"])
    return found and _named(then) == _named(config.model_dump(mode="json"))


def _named(config: dict) -> list[dict]:
    """The images and the volumes that a config names."""
    images = config["data"]
    return [{key: (part or {}).get(key) for key in _OF_DATA} for part in (images, images.get("volumes"))]


def _saved(config: Config) -> dict | None:
    newest = Store(Path(config.run_dir) / "checkpoints").newest()
    return json.loads((newest / STATE).read_text()) if newest else None


def _has_ended(saved: dict | None, config: Config, options: type[BaseModel]) -> bool:
    if saved is None:
        return False
    meta = saved["meta"]
    changed = changed_settings(meta["config"], as_recorded(config, meta), options)
    ended = saved["step"] == meta["num_steps"] or meta.get("ended", False)  # by the objective's own word
    return ended and not changed


def _records(path: Path, step: int | None, kind: str | None = None) -> list[dict]:
    """By growing step, each step once; only those of `kind` where it is given. None of a file that cannot be read."""
    found, lines = {}, []
    with suppress(OSError):
        lines = read_lines(path)
    for record in lines:
        if (step is None or record["step"] <= step) and (kind is None or record.get("kind") == kind):
            found[record["step"]] = record
    return [found[number] for number in sorted(found)]


def _environment(run: Path) -> dict:
    try:
        return json.loads((run / "environment.json").read_text())
    except (OSError, ValueError):
        return {}
