"""Fine-tuning from a source to a result: what is trained, on which labels, and how it is tested.

- The encoder starts from a run, a checkpoint, an export, timm's weights, or from nothing (`random:`); everything
  else is the same, so that the difference is what pretraining was worth.
- The test shards are read for a curve if asked for, and at the end; nothing is chosen by them. What is reported are
  the last weights.
- Every test image is scored once, whatever the number of ranks.
"""

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from timm.models.eva import Eva
from torch import Tensor, nn

from prelude.checkpoints.convert.fit import fit
from prelude.checkpoints.sources import OpenedEncoder, open_encoder, weights_of
from prelude.data.batch import Batch
from prelude.data.errors import Stopped, UserError
from prelude.data.loader import one_pass
from prelude.data.remote_shards import keep_remote_shards
from prelude.data.shards import ShardIndex
from prelude.data.waiting import wait_at_most
from prelude.data.workers import start_workers_by
from prelude.evaluators.features.labels import class_numbers
from prelude.evaluators.features.low_label import low_label
from prelude.evaluators.finetuning.classifier import Classifier
from prelude.evaluators.finetuning.recipe import NAME, FineTuneOptions, check_recipe, completed, options_for
from prelude.evaluators.judging import labelled_shards
from prelude.evaluators.labelled import Labelled, labelled_section, selection
from prelude.evaluators.results import Outcome, Result, hits, percent, versions
from prelude.pretrain import distributed
from prelude.pretrain.config import Config, EncoderConfig, SelectConfig
from prelude.pretrain.encoders import build_encoder, seeded
from prelude.pretrain.files import Lines
from prelude.pretrain.kept_patches import is_transformer
from prelude.pretrain.monitors import Monitor, StepRecord
from prelude.pretrain.own_encoder import is_own
from prelude.pretrain.recipes import read_recipe, validate_config
from prelude.pretrain.schedules import Progress

log = logging.getLogger(__name__)

_NORMS = ("fc_norm", "final_norm", "use_fc_norm", "use_post_transformer_norm")  # arguments that place the last norm
_FROM_SCRATCH = "_from_scratch"
_RANDOM = "random:"


@dataclass(frozen=True)
class Task:
    """All that decides a fine-tuning run."""

    source: str
    config: Config
    opened: OpenedEncoder
    train: ShardIndex  # the labelled samples that are trained on
    test: ShardIndex
    classes: Tensor  # (C,) int64, growing
    warnings: tuple[str, ...]

    @property
    def options(self) -> FineTuneOptions:
        given = dict(self.config.objective)
        given.pop("name")
        return FineTuneOptions.model_validate(given)


def prepare(
    source: str,
    recipe: str | Path,
    overrides: list[str] = (),
    *,
    train: str | list[str] | None = None,
    test: str | list[str] | None = None,
    label: str | None = None,
    from_scratch: bool = False,
) -> Task:
    """Reads the recipe, opens the source and finds the labels. train, test, label: override the recipe's `evaluate`
    section, which overrides that of the source's run. Raises UserError.
    """
    check_recipe(recipe, overrides)
    values = read_recipe(recipe, overrides, options_for)
    section = values.get("evaluate") or {}
    labelled = labelled_shards(
        [source],
        train or section.get("train_shards"),
        test or section.get("test_shards"),
        label or section.get("label"),
        **_of_recipe(section, train, test),
    )
    values = completed(values, labelled)
    options_of = validate_config(values, str(recipe), options_for).objective
    if from_scratch:
        source = source if source.startswith(_RANDOM) else _RANDOM + source
        values["run_dir"] += _FROM_SCRATCH
    opened = open_encoder(source, seed=values.get("seed", 0))
    options_of.pop("name")
    encoder = encoder_config(opened, FineTuneOptions.model_validate(options_of))
    values["encoder"] = encoder.model_dump(mode="json")
    values["objective"]["weights"] = opened.fingerprint
    pixels = {"channels": encoder.in_chans, "mean": list(opened.mean), "std": list(opened.std)}
    values["data"] = pixels | {"max_pixels": labelled.max_pixels} | values["data"]
    config = validate_config(values, str(recipe), options_for)
    wait_at_most(config.data.timeout_seconds, "data.timeout_seconds")
    keep_remote_shards(config.data.cache_dir, config.data.cache_gib)
    start_workers_by(config.data.start_method)
    return _with_labels(source, config, opened, labelled)


def check(task: Task, world_size: int) -> None:
    """Refuses, before anything is built, what cannot work. Raises UserError."""
    options, train = task.options, task.config.train
    Classifier.check(options, task.config.encoder)
    channels = task.config.encoder.in_chans
    if options.augment is not None and (channels != 3 or task.train.value_range is not None):
        raise UserError(
            f"objective.augment works on RGB of 8 bits, and images have data.channels={channels}"
            f"{'' if task.train.value_range is None else ' and a data.range'}; write objective.augment=null."
        )
    micro_batch, _ = task.config.batching(world_size)
    if (options.mixup or options.cutmix) and micro_batch * world_size % 2:
        raise UserError(
            f"objective.mixup and objective.cutmix mix images in pairs, and {micro_batch * world_size} images at once "
            f"cannot be paired; write an even train.global_batch."
        )
    if train.zero_stage > Classifier.max_zero_stage:
        raise UserError(
            f"Fine-tuning reads whole weights between steps, which ZeRO stage {train.zero_stage} keeps in parts; write "
            f"train.zero_stage={Classifier.max_zero_stage}."
        )


def build(task: Task, say: Callable[[str], None] = lambda sentence: None) -> Classifier:
    """The classifier with the source's weights; its new parts depend on the config's seed alone.

    say: is told what was loaded, and what is new.
    """
    config = task.config
    encoder = pretrained(task.opened, config.encoder, seed=config.seed, say=say)
    with seeded(config.seed + 2**31):
        return Classifier(
            encoder,
            task.options,
            task.classes,
            image_size=config.encoder.size,
            mean=config.data.mean,
            std=config.data.std,
        )


# ---- the encoder


def encoder_config(opened: OpenedEncoder, options: FineTuneOptions) -> EncoderConfig:
    """The source's architecture as it is fine-tuned: with drop path, a trained table of positions, another pooling."""
    config, model = opened.config, opened.model
    kwargs = {key: value for key, value in config.kwargs.items() if key != "drop_path_rate"}
    if options.drop_path:
        kwargs["drop_path_rate"] = options.drop_path
    if is_transformer(model) and options.pooling == "mean":
        kwargs = {key: value for key, value in kwargs.items() if key not in _NORMS}
        kwargs |= {"use_fc_norm": True} if isinstance(model, Eva) else {}
        kwargs["global_pool"] = "avg"
    changes = {"kwargs": kwargs, "image_size": options.image_size or config.image_size}
    if isinstance(getattr(model, "pos_embed", None), Tensor) and not is_own(config):
        changes["pos_embed"] = "learned"
    return config.model_copy(update=changes)


def pretrained(
    opened: OpenedEncoder, config: EncoderConfig, *, seed: int, say: Callable[[str], None] = lambda sentence: None
) -> nn.Module:
    """`config`'s encoder with the source's weights. A table of positions for another size is resampled; a final norm
    that the other pooling does not use is left behind, and the one that it brings is new. Raises UserError.
    """
    encoder = build_encoder(config, seed=seed)
    weights = weights_of(opened)
    fitted = fit(encoder, weights, "the encoder that is fine-tuned", may_differ=("norm.", "fc_norm."))
    say(fitted.sentence(weights))
    return encoder


# ---- testing


def tested(classifier: Classifier, index: ShardIndex, label: str, *, batch_size: int, num_workers: int) -> dict:
    """Hits (`top1`, and `top5` from ten classes on), `total` samples and `unreadable` ones. Collective; raises Stopped
    on all ranks when one of them is asked to stop while its images do not come."""
    ranks = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    batches = one_pass(
        index, classifier.test_views, batch_size=batch_size, num_workers=num_workers, label=label, **ranks
    )
    counts = {"top1": 0, "total": 0}
    training = classifier.training
    classifier.eval()
    device, stopped = distributed.device(), ""
    try:
        for batch in batches:
            with torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext():
                scores = classifier.scores(batch.to(device))
            found = hits(scores, _places(classifier.classes, batch).to(device)) | {"total": len(batch)}
            counts = {name: counts.get(name, 0) + count for name, count in found.items()}
    except Stopped as stop:
        stopped = str(stop)
    finally:
        classifier.train(training)
    if why := next(filter(None, distributed.of_all(stopped)), ""):
        raise Stopped(why)
    if len(classifier.classes) >= 10:
        counts.setdefault("top5", 0)  # a rank may have had nothing to score
    names = sorted(counts)
    counts = {name: int(value) for name, value in zip(names, distributed.total(*map(counts.get, names)), strict=True)}
    return counts | {"unreadable": index.num_samples - counts["total"]}


class TestCurve(Monitor):
    """test.jsonl: accuracy on the test shards every so many epochs, at the next logged step. On every rank."""

    __test__ = False  # no test of pytest's

    def __init__(self, test, every_epochs: float, path: Path):
        self.test, self.every_epochs, self.lines = test, every_epochs, Lines(path)

    def start(self, progress: Progress) -> None:
        self.done = math.floor(progress.epoch / self.every_epochs)
        if distributed.is_main():
            self.lines.start(progress.step)

    def record(self, record: StepRecord) -> None:
        due = math.floor(record.epoch / self.every_epochs)
        if due <= self.done:
            return
        self.done = due
        try:
            counts = self.test()
        except Stopped as stop:
            log.warning("the test of step %d is left out: the run is stopped %s", record.step, stop)
            return  # the engine ends the run at its next step, and saves
        if distributed.is_main():
            accuracy = {
                name: percent(counts[name], counts["total"]).value for name in ("top1", "top5") if name in counts
            }
            self.lines.add({"step": record.step, "epoch": record.epoch, **accuracy})

    def saving(self, step: int) -> None:
        if distributed.is_main():
            self.lines.sync()


def result_of(task: Task, classifier: Classifier, counts: dict, curve: list[dict], command: str, seconds: float):
    """What was found, in the shape of every evaluator."""
    config, options = task.config, task.options
    warnings = list(task.warnings)
    if counts["unreadable"]:
        warnings.append(f"{counts['unreadable']} test images could not be read and are left out.")
    recipe = {
        "seed": config.seed,
        "objective": options.model_dump(mode="json", exclude={"weights", "test_every_epochs"}),
        "train": config.train.model_dump(mode="json", include={"epochs", "global_batch", "gradient_clipping"}),
        "optimizer": config.optimizer.model_dump(mode="json"),
    }
    numbers = {name: percent(counts[name], counts["total"]) for name in ("top1", "top5") if name in counts}
    outcome = Outcome(
        NAME, numbers, {"features": "all weights"}, recipe, {"num_classes": len(task.classes), "curve": curve}, warnings
    )
    labelled = labelled_section(config.evaluate)
    data = labelled.described_labels(task.train)
    for name, index in (("train", task.train), ("test", task.test)):
        data[name] = {
            **labelled.described(name, index),
            "num_samples": counts["total"] if name == "test" else index.num_samples,
        }
    features = {
        "view": asdict(classifier.test_views.views[0]),
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "precision": "bf16" if distributed.device().type == "cuda" else "fp32",
    }
    opened = task.opened
    encoder = {"name": opened.name, "fingerprint": opened.fingerprint, "origin": opened.origin}
    return Result(task.source, encoder, data, features, outcome, command, round(seconds, 3), versions())


# ---- what has to be known beforehand


def _with_labels(source: str, config: Config, opened: OpenedEncoder, labelled: Labelled) -> Task:
    value_range = config.data.range or labelled.value_range
    labelled = replace(labelled, value_range=value_range, max_pixels=config.data.max_pixels)
    whole, test = labelled.indexes()
    labels = class_numbers(whole)
    numbers, labelled_ids = labels.values.numpy(), np.flatnonzero(labels.known.numpy())
    if numbers.min() < 0:
        raise UserError(f"Members .{labelled.label} hold the class number {numbers.min()}; write 0 or more.")
    warnings = []
    if len(labelled_ids) < len(numbers):
        warnings.append(f"{len(numbers) - len(labelled_ids)} training images have no sound label and are left out.")
    if whole.fingerprint == test.fingerprint:
        warnings.append("Train and test are the same shards, so this says nothing about new images.")
    objective = config.objective
    known = numbers[labelled_ids]
    chosen = low_label(known, per_class=objective["per_class"], fraction=objective["fraction"], seed=config.seed)
    classes = np.unique(known)
    if len(classes) < 2:
        raise UserError(f"The train shards hold one class only ({classes.tolist()}); write shards with two or more.")
    taken = labelled_ids[chosen]
    train = whole if len(taken) == whole.num_samples else whole.subset(taken)
    return Task(source, config, opened, train, test, torch.from_numpy(classes), tuple(warnings))


def _of_recipe(section: dict, train, test) -> dict:
    """What a recipe's own section says of its shards, beside where they are; its parts are those of them alone."""
    found = {key: section[key] for key in ("image", "classes") if section.get(key)}
    for name, given in (("train_select", train), ("test_select", test)):
        if section.get(name) and not given:
            found[name] = selection(SelectConfig.model_validate(section[name]))
    return found


def _places(classes: Tensor, batch: Batch) -> Tensor:
    """(B,) the place of each label among the classes, -1 for a class that was not trained on."""
    classes, labels = classes.cpu(), batch.labels.cpu()
    place = torch.searchsorted(classes, labels).clamp(max=len(classes) - 1)
    return torch.where(classes[place] == labels, place, -1)
