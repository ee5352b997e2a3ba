"""Fine-tuning from a source to a result: what is trained, on which labels, and how it is tested.

- The encoder starts from a run, a checkpoint, an export, timm's weights, or from nothing (`random:`); everything
  else is the same, so that the difference is what pretraining was worth.
- The test shards are read for a curve if asked for, and at the end; nothing is chosen by them. What is reported are
  the last weights, or with `patience` those that were best on images held out of the training shards.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from timm.models.eva import Eva
from torch import Tensor, nn

from prelude.checkpoints.convert.fit import fit
from prelude.checkpoints.source_names import RANDOM
from prelude.checkpoints.sources import OpenedEncoder, open_encoder, weights_of
from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.data.findings import VectorFormat
from prelude.data.remote_shards import keep_remote_shards
from prelude.data.value_range import refuse_other_images
from prelude.data.waiting import wait_at_most
from prelude.data.workers import start_workers_by
from prelude.evaluators.finetuning import attention_labels
from prelude.evaluators.finetuning.classifier import Classifier
from prelude.evaluators.finetuning.recipe import NAME, FineTuneOptions, check_recipe, completed, options_for
from prelude.evaluators.finetuning.samples import Samples, labelled_samples
from prelude.evaluators.finetuning.testing import Found
from prelude.evaluators.frozen.multilabel import label_warnings
from prelude.evaluators.judging import described, labelled_shards
from prelude.evaluators.labelled import (
    IMAGE_OF_SECTION,
    few_warnings,
    labelled_section,
    left_out,
    named_by_section,
    selection,
)
from prelude.evaluators.results import Outcome, Result, versions
from prelude.pretrain import distributed
from prelude.pretrain.config import Config, EncoderConfig, SelectConfig
from prelude.pretrain.encoders import build_encoder, drops_paths, lay_out_encoder, refuse_checkpointing, seeded
from prelude.pretrain.kept_patches import is_transformer
from prelude.pretrain.own_encoder import is_own
from prelude.pretrain.recipes import read_recipe, validate_config
from prelude.pretrain.resume import with_found_range

_NORMS = ("fc_norm", "final_norm", "use_fc_norm", "use_post_transformer_norm")  # arguments that place the last norm
_FROM_SCRATCH = "_from_scratch"


@dataclass(frozen=True)
class Task:
    """All that decides a fine-tuning run."""

    source: str
    config: Config
    opened: OpenedEncoder
    samples: Samples

    @property
    def options(self) -> FineTuneOptions:
        return task_options(self.config)


def task_options(config: Config) -> FineTuneOptions:
    return FineTuneOptions.model_validate({key: value for key, value in config.objective.items() if key != "name"})


def prepare(
    source: str,
    recipe: str | Path,
    overrides: list[str] = (),
    *,
    train: str | list[str] | None = None,
    test: str | list[str] | None = None,
    label: str | None = None,
    from_scratch: bool = False,
    before_indexing: Callable[[Config], None] = lambda config: None,
) -> Task:
    """Reads the recipe, opens the source and finds the labels. train, test, label: override the recipe's `evaluate`
    section, which overrides that of the source's run. before_indexing: called when only the shards are left to read,
    with the config but for what they tell. Raises UserError.
    """
    check_recipe(recipe, overrides)
    values = read_recipe(recipe, overrides, options_for)
    section = values.get("evaluate") or {}
    labelled = labelled_shards(
        [source],
        train or section.get("train_shards"),
        test or section.get("test_shards"),
        label or section.get("label"),
        _findings(section),
        **_of_recipe(section, train, test),
    )
    named = named_by_section(train=not train, test=not test)
    label_group = section.get("label_group", labelled.label_group)
    labelled = replace(labelled, named=named, image_named=IMAGE_OF_SECTION, label_group=label_group)
    values = completed(values, labelled)
    options_of = validate_config(values, str(recipe), options_for).objective
    if from_scratch:
        source = source if source.startswith(RANDOM) else RANDOM + source
        values["run_dir"] += _FROM_SCRATCH
    opened = open_encoder(source, seed=values.get("seed", 0))
    options_of.pop("name")
    encoder = encoder_config(opened, FineTuneOptions.model_validate(options_of))
    values["encoder"] = encoder.model_dump(mode="json")
    values["objective"]["weights"] = opened.fingerprint
    pixels = {"channels": encoder.in_chans, "mean": list(opened.mean), "std": list(opened.std)}
    seen = {"range": labelled.value_range, "max_pixels": labelled.max_pixels}
    values["data"] = pixels | seen | values["data"]
    config = validate_config(values, str(recipe), options_for)
    wait_at_most(config.data.timeout_seconds, "data.timeout_seconds")
    keep_remote_shards(config.data.cache_dir, config.data.cache_gib)
    start_workers_by(config.data.start_method)
    seen = {"value_range": config.data.range, "max_pixels": config.data.max_pixels, "channels": config.data.channels}
    labelled = replace(labelled, **seen)
    before_indexing(config)
    samples = labelled_samples(labelled, config.evaluate, task_options(config), config.seed)
    config = with_found_range(config, samples.train.value_range)
    return Task(source, config, opened, samples)


def check(task: Task, world_size: int) -> None:
    """Refuses, before anything is built, what cannot work. Raises UserError."""
    options, train = task.options, task.config.train
    Classifier.check(options, task.config.encoder)
    if train.freeze_encoder_steps and task.source.startswith(RANDOM):
        raise UserError(
            f"train.freeze_encoder_steps={train.freeze_encoder_steps} would hold an encoder that is still random, as "
            f"{task.source} is (--from-scratch); write train.freeze_encoder_steps=0."
        )
    if train.gradient_checkpointing:
        refuse_checkpointing(task.config.encoder)
    attention_labels.check(options, task.config, task.opened.model)
    channels = task.config.encoder.in_chans
    refuse_other_images(task.samples.test.index, channels)  # those of train are looked at by their loader
    if options.augment is not None and (channels != 3 or task.samples.train.value_range is not None):
        raise UserError(
            f"objective.augment works on RGB of 8 bits, and images have data.channels={channels}"
            f"{'' if task.samples.train.value_range is None else ' and a data.range'}; write objective.augment=null."
        )
    micro_batch, _ = task.config.batching(world_size)
    if (options.mixup or options.cutmix) and micro_batch * world_size % 2:
        raise UserError(
            f"objective.mixup and objective.cutmix mix images in pairs, and "
            f"{counted(micro_batch * world_size, 'image')} at once "
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
            task.samples.classes,
            image_size=config.encoder.size,
            mean=config.data.mean,
            std=config.data.std,
            findings=task.samples.findings is not None,
            weights=task.samples.weights,
        )


# ---- the encoder


def encoder_config(opened: OpenedEncoder, options: FineTuneOptions) -> EncoderConfig:
    """The source's architecture as it is fine-tuned: with drop path, a trained table of positions, another pooling."""
    config, model = opened.config, opened.model
    kwargs = {key: value for key, value in config.kwargs.items() if key != "drop_path_rate"}
    if options.drop_path:
        kwargs["drop_path_rate"] = options.drop_path
    by_mean = is_transformer(model) and options.pooling == "mean"
    if by_mean:
        kwargs = {key: value for key, value in kwargs.items() if key not in _NORMS}
        kwargs |= {"use_fc_norm": True} if isinstance(model, Eva) else {}
        kwargs["global_pool"] = "avg"
    changes = {"kwargs": kwargs, "image_size": options.image_size or config.image_size}
    if isinstance(getattr(model, "pos_embed", None), Tensor) and not is_own(config):
        changes["pos_embed"] = "learned"
    config = config.model_copy(update=changes)
    _refuse_drop_path(config, options)
    architecture, instead = lay_out_encoder(config), {}
    if by_mean and isinstance(architecture.fc_norm, nn.Identity):
        instead |= {"fc_norm": True, "final_norm": True}
    if not options.drop_path and drops_paths(architecture):
        instead["drop_path_rate"] = 0.0
    return _with(config, instead) if instead and _takes(config, instead) else config


def _refuse_drop_path(config: EncoderConfig, options: FineTuneOptions) -> None:
    """Of an encoder that has none; what a recipe says of it nobody has written as a setting of the encoder."""
    if not options.drop_path or _takes(config, {}):
        return
    without = {key: value for key, value in config.kwargs.items() if key != "drop_path_rate"}
    if not _takes(config.model_copy(update={"kwargs": without}), {}):
        return
    own = ", or give its function a parameter drop_path_rate" if is_own(config) else ""
    raise UserError(
        f"objective.drop_path={options.drop_path:g} is handed to encoder.name={config.name} as drop_path_rate, which "
        f"it does not take; write objective.drop_path=0{own}."
    )


def _with(config: EncoderConfig, kwargs: dict) -> EncoderConfig:
    return config.model_copy(update={"kwargs": config.kwargs | kwargs})


def _takes(config: EncoderConfig, kwargs: dict) -> bool:
    """A function of the user's may have no such settings."""
    try:
        lay_out_encoder(_with(config, kwargs))
    except UserError:
        return False
    return True


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


# ---- the result


def result_of(
    task: Task, classifier: Classifier, found: Found, curves: dict[str, list], command: str, seconds: float
) -> Result:
    """What was found, in the shape of every evaluator. curves: by their names, such as `curve` on the test shards."""
    config, options, samples = task.config, task.options, task.samples
    test = samples.test
    warnings = [*samples.warnings, *left_out("test", test.index, test.num_unlabelled, found.unreadable)]
    warnings += [*few_warnings(found.total), *found.warnings]
    recipe = {
        "seed": config.seed,
        "objective": options.model_dump(mode="json", exclude={"weights", "test_every_epochs"}),
        "train": config.train.model_dump(mode="json", include={"epochs", "global_batch", "gradient_clipping"}),
        "optimizer": config.optimizer.model_dump(mode="json"),
    }
    chosen = {"features": "all weights"}
    if classifier.held_out is not None:
        chosen |= classifier.held_out.told()
    details = {"num_classes": len(samples.classes), **curves}
    if samples.findings:
        recipe["names"] = list(samples.findings.names)
        warnings += label_warnings(samples.findings.names, samples.answers, found.by_label)
        details["by_features"] = {chosen["features"]: {"by_label": _with_train(found.by_label, samples.answers)}}
    outcome = Outcome(NAME, found.numbers, chosen, recipe, details, warnings)
    labelled = labelled_section(config.evaluate)
    data = labelled.described_labels(samples.train)
    if config.data.range:
        data["range"] = samples.train.value_range
    asked = {"field": config.evaluate.label_field, "group": config.evaluate.label_group}
    data |= {name: value for name, value in asked.items() if value}
    for name, index in (("train", samples.train), ("test", test.index)):
        data[name] = {
            **labelled.described(name, index),
            "num_samples": found.total if name == "test" else index.num_samples,
        }
    if samples.held_out:
        index = samples.held_out.index
        data["held_out"] = {"fingerprint": index.fingerprint, "num_samples": index.num_samples}
    features = {
        "view": asdict(classifier.test_views.views[0]),
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "precision": "bf16" if distributed.device().type == "cuda" else "fp32",
    }
    return Result(task.source, described(task.opened), data, features, outcome, command, round(seconds, 3), versions())


# ---- what has to be known beforehand


def _findings(section: dict) -> VectorFormat | None:
    """Where the recipe's own section says that images show several findings. Groups are read apart."""
    if not section.get("label_names"):
        return None
    return VectorFormat(tuple(section["label_names"]), section.get("label_field", ""))


def _of_recipe(section: dict, train, test) -> dict:
    """What a recipe's own section says of its shards, beside where they are; its parts are those of them alone."""
    found = {key: section[key] for key in ("image", "classes") if section.get(key)}
    for name, given in (("train_select", train), ("test_select", test)):
        if section.get(name) and not given:
            found[name] = selection(SelectConfig.model_validate(section[name]))
    return found


def _with_train(by_label: dict[str, dict], answers: Tensor) -> dict[str, dict]:
    present = (answers == 1).sum(0).tolist()
    return {
        name: found | {"num_present_train": count}
        for (name, found), count in zip(by_label.items(), present, strict=True)
    }
