"""Where a run goes on, and what may differ between a checkpoint and the run that goes on from it.

- A run goes on from the newest of its own checkpoints. Only one without any begins at `resume.checkpoint`, so that the
  same command can be given again and again.
- Anything that changes what is computed is refused, so that "the same run" stays true; where it runs, how it is
  watched and how its batch is split over ranks may change freely.
- Where a change is allowed, what it does to the steps and to the learning rate is told.
"""

import copy
import functools
import math
import operator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import BaseModel, ValidationError

from prelude.data.counting import counted
from prelude.data.errors import UserError, another_folder
from prelude.pretrain import attendance, distributed
from prelude.pretrain.config import Config
from prelude.pretrain.optimizers import scheduled
from prelude.pretrain.recipes import TRUTH
from prelude.pretrain.schedules import Progress

_FREE = (
    "run_dir",
    "resume",
    "checkpoint",
    "log",
    "evaluate",
    "collapse",
    "deepspeed",
    "data.shards",  # the data set is recognised by its content, not by its path and not by how it was chosen
    "data.mix.*.shards",
    "data.image",
    "data.mix.*.image",
    "data.select",
    "data.mix.*.select",
    "data.volumes.shards",
    "data.volumes.image",
    "data.volumes.select",
    "data.num_workers",
    "data.start_method",
    "data.max_bad_share",
    "data.shown_channels",
    "data.timeout_seconds",
    "data.cache_dir",
    "data.cache_gib",
    "train.micro_batch",
    "train.zero_stage",
    "train.precision",
    "train.gradient_checkpointing",
    "train.compile",
    "train.profile_steps",
    "train.max_nonfinite_steps",
    "train.rank_timeout_seconds",
)


class OtherSettings(UserError):
    """changes: as `changed_settings` tells them, of the run that has saved `checkpoint`."""

    def __init__(self, changes: list[str], checkpoint: Path):
        super().__init__(
            f"{checkpoint} belongs to a run with other settings ({'; '.join(changes)}); write {another_folder()}, "
            f"restore the settings, or write resume.allow_changed_config=true."
        )
        self.changes, self.checkpoint = changes, checkpoint


def found_checkpoint(store, config: Config) -> tuple[Path | None, dict]:
    """(`starting_point`, the meta that was saved there). Collective; what was saved is read on rank 0 alone."""
    attendance.reach("looking for a checkpoint")
    path = starting_point(store, config)
    attendance.saved("none: none had been written" if path is None else str(path))
    return path, store.meta(path) if path and distributed.is_main() else {}


def starting_point(store, config: Config) -> Path | None:
    """The checkpoint that a start goes on from, None for the beginning. Collective.

    Raises UserError on every rank: where there are checkpoints of the run's own and none can be used, and where
    `resume.checkpoint` would have it go back among them.
    """
    answer, newest = None, store.newest_for_all()
    if distributed.is_main():
        try:
            answer = _starting_point(newest, config)
        except UserError as error:
            answer = error
    answer = distributed.from_main(answer)
    if isinstance(answer, UserError):
        raise answer
    return answer


def _starting_point(newest: Path | None, config: Config) -> Path | None:
    named = config.resume.checkpoint
    if named == "auto":
        return newest
    if newest and is_own(named, config) and Path(named).resolve() != newest.resolve():
        raise UserError(
            f"resume.checkpoint={named} is an earlier checkpoint of this run, which goes on from {newest.name}; leave "
            f"it out, or go back to it in {another_folder()}."
        )
    return newest or Path(named)


def is_own(checkpoint: str | Path, config: Config) -> bool:
    """Whether it lies among the checkpoints of the run itself."""
    return Path(checkpoint).resolve().is_relative_to(Path(config.run_dir, "checkpoints").resolve())


def progress_after(meta: dict, config: Config, start: Progress, checkpoint: Path) -> tuple[Progress, list[str]]:
    """Where a run stands that goes on from `checkpoint`, and what a person should know about it.

    meta: the checkpoint's. start: the run's progress before its first step. Progress is counted in samples where the
    global batch has changed. Raises UserError where nothing would be left to train, but for a run that is finished.
    """
    start = replace(start, num_steps=_num_steps(meta, config, start))
    batch, batch_then = config.train.global_batch, meta["config"]["train"]["global_batch"]
    step, notices = meta["step"] * batch_then // batch, []
    if batch != batch_then:
        notices.append(
            f"train.global_batch {batch_then} -> {batch}: {counted(meta['step'], 'step')}, or "
            f"{counted(meta['step'] * batch_then, 'image')}, "
            f"count as {counted(step, 'step')}"
        )
    finished_before = is_own(checkpoint, config) and meta["step"] == meta["num_steps"] and step == start.num_steps
    if step >= start.num_steps and not finished_before:
        raise UserError(
            f"Nothing is left to train: {checkpoint} has done {counted(step, 'step')}, and this run ends at step "
            f"{start.num_steps}; write a larger train.epochs, or name an earlier checkpoint in {another_folder()}."
        )
    progress = Progress(step, start.num_steps, start.steps_per_epoch)
    if step < start.num_steps and (jump := _jump_of_learning_rate(meta, config, progress)):
        notices.append(jump)
    return progress, notices


def _num_steps(meta: dict, config: Config, start: Progress) -> int:
    """`start.num_steps`; of a run that was begun with one step more, when products were not rounded, what it had."""
    as_begun = math.ceil(config.train.epochs * start.steps_per_epoch)
    return as_begun if meta["num_steps"] == as_begun else start.num_steps


def _jump_of_learning_rate(meta: dict, config: Config, progress: Progress) -> str | None:
    """In a sentence, if the next step's rate is not what it would have been without what has changed."""
    try:
        config_then = Config.model_validate(meta["config"])
    except ValidationError:
        return None  # of a version with other settings, whose schedule is not known here
    batch_then = config_then.train.global_batch
    num_samples = meta["loader"].get("num_samples", progress.steps_per_epoch * config.train.global_batch)
    progress_then = Progress(meta["step"], meta["num_steps"], num_samples / batch_then)
    then, now = scheduled(config_then, progress_then)[0], scheduled(config, progress)[0]
    if math.isclose(then, now, rel_tol=1e-3):
        return None
    return f"the learning rate jumps here: {then:.3g} -> {now:.3g}"


def changed_settings(saved: dict, config: Config, options: type[BaseModel]) -> list[str]:
    """`key: then -> now` for every setting that differs and must not. options: what the objective's own are read by."""
    sides = (saved, config.model_dump(mode="json"))
    then, now = (flat(each) | flat(_with_defaults(each, options)) for each in sides)  # with keys that no longer exist
    return [
        f"{key}: {then.get(key)} -> {now.get(key)}"
        for key in sorted(set(then) | set(now))
        if then.get(key) != now.get(key)
        and not (_may_change(key) or _is_found(key, then, now) or _was_true(key, then, now))
    ]


def with_found_range(config: Config, found: tuple[float, float] | None) -> Config:
    """With `data.range: auto` as what was found, so that evaluations of a run read their images as it did, whatever is
    in theirs."""
    if config.data.range != "auto":
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"range": found})})


def _is_found(key: str, then: dict, now: dict) -> bool:
    """Whether a range is said as `auto` by one side, and as what was found by the other: the data's fingerprint tells
    whether the same was found."""
    return key == "data.range" and "auto" in (then.get(key), now.get(key))


def _was_true(key: str, then: dict, now: dict) -> bool:
    """Whether it was text such as `no`, which is refused now and counted as true."""
    text = then.get(key)
    return key.startswith("encoder.kwargs.") and str(text).lower() in TRUTH and now.get(key) is True


def _may_change(key: str) -> bool:
    return any(fnmatchcase(key, free) or fnmatchcase(key, f"{free}.*") for free in _FREE)


def accept(meta: dict, checkpoint: Path, config: Config, options: type[BaseModel], loader) -> None:
    """Moves `loader` to where `checkpoint` was saved. Raises UserError where its run had other settings or data, but
    for those that may have changed."""
    if not config.resume.allow_changed_config and (changes := changed_settings(meta["config"], config, options)):
        raise OtherSettings(changes, checkpoint)
    loader.load_state_dict(meta["loader"], allow_changed_data=config.resume.allow_changed_data)


def _with_defaults(settings: dict, options: type[BaseModel]) -> dict:
    """With the keys that are left out, or did not exist when a checkpoint was saved, at what they do then."""
    try:
        known = _as_read(Config, settings)
        own = _as_read(options, {key: value for key, value in known["objective"].items() if key != "name"})
    except ValidationError:  # of another objective
        return settings
    return known | {"objective": known["objective"] | own}


def _as_read(model: type[BaseModel], values: dict) -> dict:
    """As a model reads them, without the keys that no longer exist."""
    try:
        return model.model_validate(values).model_dump(mode="json")
    except ValidationError as error:
        gone = [mistake["loc"] for mistake in error.errors() if mistake["type"] == "extra_forbidden"]
        if len(gone) < error.error_count():
            raise
    left = copy.deepcopy(values)
    for *above, key in gone:
        del functools.reduce(operator.getitem, above, left)[key]
    return model.model_validate(left).model_dump(mode="json")


def flat(values: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out
