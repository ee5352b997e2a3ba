"""The configuration of a run: typed, strict, and refused whole with every mistake at once.

- One YAML a recipe; `key.sub=value` on the command line overrides it; the values are YAML too.
- A key that does not exist is refused with the nearest one that does.
- What the sections of this file cannot know (an objective's own options) is validated by the caller's
  `options_for`, so that this module imports no objective.
"""

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from prelude.data.errors import UserError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ShuffleConfig(Section):
    """How the endless order mixes shards; see data/order.py. Part of what a resume must find unchanged."""

    streams: int = Field(8, ge=1)
    span: int = Field(256, ge=1)
    window: int = Field(16384, ge=1)


class DataConfig(Section):
    shards: str | list[str]
    num_samples: int | None = Field(None, ge=1)  # length of an epoch, only for shards that cannot be indexed
    num_workers: int | Literal["auto"] = "auto"  # auto: from the cores of this machine and its ranks
    max_bad_share: float = Field(0.01, ge=0, le=1)
    shuffle: ShuffleConfig = ShuffleConfig()
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @field_validator("num_workers")
    @classmethod
    def _not_negative(cls, value):
        if value != "auto" and value < 0:
            raise ValueError("must be 0 or more, or auto")
        return value


class EncoderConfig(Section):
    name: str  # a timm architecture
    image_size: int | tuple[int, int]  # pixels; (height, width) where they differ
    patch_size: int | None = None  # vision transformers; the architecture's own unless given
    pos_embed: Literal["sincos", "learned"] = "sincos"  # fixed 2-D table or a trained parameter; ViTs only
    norm_eps: float | None = Field(None, gt=0)  # of every LayerNorm; None: timm's own, 1e-6 in most
    kwargs: dict[str, Any] = {}  # passed to timm.create_model: depth, embed_dim, drop_path_rate, ...
    weights: str | None = None  # where the encoder's weights come from; None: drawn from the seed
    weights_fingerprint: str | None = None  # of those weights; filled in by the command, and checked where it is given
    own_parts: bool = False  # take an objective's decoder, predictor or projector from there too

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def architecture(self) -> "EncoderConfig":
        """Without where its weights came from."""
        return self.model_copy(update={"weights": None, "weights_fingerprint": None, "own_parts": False})

    @model_validator(mode="after")
    def _own_parts_come_from_somewhere(self):
        for key in ("own_parts", "weights_fingerprint"):
            if getattr(self, key) and not self.weights:
                raise ValueError(f"{key} has no effect without weights; write encoder.weights=SOURCE, or leave it out")
        return self


class OptimizerConfig(Section):
    name: Literal["adamw", "sgd", "lars", "lamb"] = "adamw"
    lr: float = Field(gt=0)
    lr_rule: Literal["per_256", "absolute"] = "per_256"  # per_256: peak = lr x global_batch / 256
    betas: tuple[float, float] = (0.9, 0.95)  # adamw, lamb
    momentum: float = Field(0.9, ge=0, lt=1)  # sgd, lars
    nesterov: bool = False  # sgd
    weight_decay: float = Field(0.05, ge=0)
    weight_decay_end: float | None = Field(None, ge=0)  # reached at the end of the run; None: constant
    weight_decay_schedule: Literal["cosine", "linear"] = "cosine"  # how it gets there
    decay_tokens: bool = True  # whether class, mask and register tokens are decayed, as in the official code
    decay_vectors: bool = False  # whether biases and norms are decayed too
    layer_decay: float = Field(1.0, gt=0, le=1)  # of the encoder's rate, a layer; see pretrain/layer_decay.py; 1: none
    spared_lr_ratio: float = Field(1.0, gt=0)  # learning rate of what is not decayed, as a share of lr
    warmup_epochs: float = Field(0.0, ge=0)
    warmup_lr: float = Field(0.0, ge=0)  # where the warm-up starts, under the same rule as lr
    min_lr: float = Field(0.0, ge=0)  # where the cosine ends, under the same rule as lr
    milestones: list[float] = []  # epochs at which the rate is multiplied by milestone_factor; replaces the cosine
    milestone_factor: float = Field(0.1, gt=0, lt=1)
    first_step: Literal[0, 1] = 0  # the first update's number in the schedules: 0 in MAE's code, 1 in I-JEPA's

    @model_validator(mode="after")
    def _no_setting_without_effect(self):
        unread = {"sgd": "betas", "lars": "betas"}.get(self.name, "momentum")
        if self._is_set(unread):
            read = "momentum" if unread == "betas" else "betas"
            raise ValueError(f"{self.name} has no {unread}; write {read}")
        if self.nesterov and self.name != "sgd":
            raise ValueError(f"{self.name} has no nesterov; leave it out, or write name=sgd")
        if self.decay_vectors and self._is_set("spared_lr_ratio"):
            raise ValueError("decay_vectors leaves nothing undecayed for spared_lr_ratio; write one of the two")
        if self.milestones and self.min_lr:
            raise ValueError("min_lr ends the cosine, which milestones replace; write one of the two")
        if self.weight_decay_end is None and self._is_set("weight_decay_schedule"):
            raise ValueError("weight_decay_schedule has no effect without weight_decay_end; write both")
        if not self.milestones and self._is_set("milestone_factor"):
            raise ValueError("milestone_factor has no effect without milestones; write both")
        return self

    @model_validator(mode="after")
    def _lars_adapts_what_is_decayed(self):
        if self.name == "lars" and not (self.weight_decay and self.weight_decay_end != 0):
            raise ValueError("lars adapts only what is decayed; write a small weight_decay, such as 1e-6")
        if self.name == "lars" and self.decay_vectors:
            raise ValueError("lars would adapt biases and norms, whose size says nothing; leave decay_vectors out")
        return self

    @field_validator("milestones")
    @classmethod
    def _in_order(cls, value):
        if any(epoch <= 0 for epoch in value) or sorted(set(value)) != value:
            raise ValueError("write epochs above 0 in growing order, such as [60, 120, 160]")
        return value

    def _is_set(self, key: str) -> bool:
        return getattr(self, key) != type(self).model_fields[key].default


class TrainConfig(Section):
    epochs: float = Field(gt=0)
    global_batch: int = Field(ge=1)  # samples an optimizer step, over all ranks
    micro_batch: int | Literal["auto"] = "auto"  # samples a rank holds at once; auto: no accumulation
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    freeze_encoder_steps: int = Field(0, ge=0)  # first steps in which an encoder that comes with weights stays as it is
    gradient_clipping: float = Field(0.0, ge=0)  # 0: off
    zero_stage: Literal[0, 1, 2, 3] = 0
    gradient_checkpointing: bool = False
    compile: bool = False
    max_nonfinite_steps: int = Field(10, ge=1)  # in a row, before the run stops


class CheckpointConfig(Section):
    every_steps: int = Field(1000, ge=1)
    keep: int = Field(3, ge=1)


class LogConfig(Section):
    every_steps: int = Field(10, ge=1)
    pictures_every_steps: int = Field(500, ge=0)  # 0: none


class ResumeConfig(Section):
    checkpoint: str = "auto"  # auto: the run's newest valid one, if any; or the path of one
    allow_changed_data: bool = False
    allow_changed_config: bool = False


class EvaluateConfig(Section):
    """Labelled shards that evaluations use for this run unless told otherwise, and how a small part of them judges the
    encoder while it trains."""

    train_shards: str | list[str]
    test_shards: str | list[str]
    label: str = "cls"  # extension of the label's member in the tar
    label_names: list[str] = []  # findings that `prelude multilabel` reads from a JSON member
    label_field: str = ""  # of that member, where the findings are; "": the whole member
    label_group: str = ""  # field whose values group images, such as patient
    every_steps: int = Field(0, ge=0)  # k-NN and a linear head, in a process of its own; 0: not while it trains
    num_train: int = Field(2000, ge=2)  # images to learn from, as many of each class as far as it goes
    num_test: int = Field(1000, ge=1)  # images to report on, drawn likewise
    device: Literal["auto", "cpu"] = "auto"  # auto: the accelerator of rank 0, where there is one


class CollapseConfig(Section):
    """When a run is taken for collapsed; `pretrain/collapse.py` says what each sign means."""

    stop: bool = False  # end the run, with exit code 3, rather than only tell
    grace_steps: int = Field(1000, ge=0)  # nothing is judged before
    sustained_steps: int = Field(200, ge=0)  # how long a sign must stand
    max_cosine: float = Field(0.999, gt=0, le=1)  # of the features of two images, on average
    min_std: float = Field(1e-4, ge=0)  # of a feature, over images
    min_rank: float = Field(0.005, ge=0, lt=1)  # of the features; 0: one line, 1: all that is attainable
    min_embedding_rank: float = Field(0.02, ge=0, lt=1)  # of what Barlow Twins compares, on the same scale
    min_teacher_cosine: float = Field(0.2, ge=-1, lt=1)  # of encoder and teacher, on the same patches
    trivial_tolerance: float = Field(0.02, ge=0, lt=1)  # of the loss to its trivial value, as a share of it


class Config(Section):
    run_dir: str
    seed: int = Field(0, ge=0, lt=2**31)
    data: DataConfig
    encoder: EncoderConfig
    objective: dict[str, Any]  # `name`, and the options of that objective
    train: TrainConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    resume: ResumeConfig = ResumeConfig()
    evaluate: EvaluateConfig | None = None
    collapse: CollapseConfig = CollapseConfig()
    deepspeed: dict[str, Any] | str = {}  # merged into what the engine builds; a dictionary or a JSON file

    @model_validator(mode="after")
    def _lars_and_friends_need_whole_tensors(self):
        if self.optimizer.name in ("lars", "lamb") and self.train.zero_stage > 0:
            raise ValueError(
                f"optimizer.name={self.optimizer.name} needs the norm of each whole parameter, which ZeRO stage "
                f"{self.train.zero_stage} splits over ranks; write train.zero_stage=0, or optimizer.name=adamw"
            )
        return self

    @model_validator(mode="after")
    def _online_evaluation_needs_whole_weights(self):
        if self.evaluate and self.evaluate.every_steps and self.train.zero_stage == 3:
            raise ValueError(
                f"evaluate.every_steps={self.evaluate.every_steps} needs whole weights between steps, which ZeRO stage "
                "3 keeps in parts; write train.zero_stage=2, or evaluate.every_steps=0"
            )
        return self

    @model_validator(mode="after")
    def _milestones_are_reached(self):
        late = [epoch for epoch in self.optimizer.milestones if epoch >= self.train.epochs]
        if late:
            raise ValueError(
                f"optimizer.milestones has {late[0]:g}, which a run of train.epochs={self.train.epochs:g} never "
                "reaches; leave it out"
            )
        return self

    def batching(self, world_size: int) -> tuple[int, int]:
        """(samples a rank holds at once, micro-batches an optimizer step) at this number of ranks."""
        batch, micro = self.train.global_batch, self.train.micro_batch
        if micro == "auto":
            if batch % world_size:
                near = max(round(batch / world_size), 1) * world_size
                raise UserError(
                    f"train.global_batch={batch} cannot be shared equally by {world_size} ranks; "
                    f"write train.global_batch={near}."
                )
            return batch // world_size, 1
        if batch % (micro * world_size):
            near = max(round(batch / (micro * world_size)), 1) * micro * world_size
            raise UserError(
                f"train.global_batch={batch} is no multiple of {world_size} ranks x train.micro_batch={micro}; "
                f"write train.global_batch={near}, or another train.micro_batch."
            )
        return micro, batch // (micro * world_size)

    @property
    def peak_lr(self) -> float:
        return self.optimizer.lr * self.lr_factor

    @property
    def lr_factor(self) -> float:
        return self.train.global_batch / 256 if self.optimizer.lr_rule == "per_256" else 1.0

    def to_yaml(self) -> str:
        return yaml.safe_dump(json.loads(self.model_dump_json()), sort_keys=False)


def load_config(
    recipe: str | Path, overrides: list[str] = (), options_for: Callable[[str], type[BaseModel]] | None = None
) -> Config:
    """Reads a recipe, applies `key.sub=value` overrides, and validates all of it.

    `options_for(name)` returns the options model of an objective and raises UserError for an unknown one.
    Raises UserError with every mistake found.
    """
    return validate_config(read_recipe(recipe, overrides), str(recipe), options_for)


def read_recipe(recipe: str | Path, overrides: list[str] = ()) -> dict:
    """The values of a recipe after `key.sub=value` overrides, not validated. Raises UserError."""
    path = find_recipe(recipe)
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no settings; write `key: value` lines, as in the files of configs/.")
    for override in overrides:
        _apply(values, override)
    return values


def find_recipe(recipe: str | Path) -> Path:
    """A file, or the name of one of the recipes that ship in configs/ (`quickstart`)."""
    shipped = Path(__file__).resolve().parents[1] / "configs"
    for candidate in (Path(recipe), shipped / Path(recipe).name, shipped / f"{recipe}.yaml"):
        if candidate.is_file():
            return candidate
    names = sorted(path.stem for path in shipped.glob("*.yaml"))
    near = difflib.get_close_matches(Path(recipe).stem, names, 1, 0.5)
    hint = f"did you mean {near[0]}?" if near else f"write a file, or one of: {', '.join(names)}."
    raise UserError(f"No config at {recipe}; {hint}")


def validate_config(values: dict, source: str, options_for=None) -> Config:
    mistakes, config = [], None
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        mistakes += [_sentence(e, Config, "") for e in error.errors()]
    objective = values.get("objective")
    if options_for and isinstance(objective, dict):
        resolved, more = _objective_options(objective, options_for)
        mistakes += more
    if mistakes:
        count = f"Found {len(mistakes)} error{'s' * (len(mistakes) > 1)} in {source}:"
        raise UserError("\n".join([count, *(f"  {mistake}" for mistake in mistakes)]))
    if options_for:
        config = config.model_copy(update={"objective": resolved})
    return config


def _objective_options(objective: dict, options_for) -> tuple[dict, list[str]]:
    given = dict(objective)
    name = given.pop("name", None)
    if not isinstance(name, str):
        return {}, ["objective.name is missing: write the name of an objective, such as mae."]
    try:
        model = options_for(name)
        return {"name": name, **model.model_validate(given).model_dump()}, []
    except UserError as error:
        return {}, [str(error)]
    except ValidationError as error:
        return {}, [_sentence(e, model, "objective.") for e in error.errors()]


def _apply(values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{override!r} is not an override; write key.sub=value, such as train.epochs=10.")
    *parents, leaf = key.strip().split(".")
    for parent in parents:
        if not isinstance(values.setdefault(parent, {}), dict):
            raise UserError(f"{override!r} sets a key below {parent!r}, which is a plain value.")
        values = values[parent]
    try:
        values[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        values[leaf] = text  # a shard pattern that starts with a brace is text, not a mapping
    if isinstance(values[leaf], str) and _is_number(values[leaf]):
        values[leaf] = float(values[leaf])  # YAML 1.1 reads 1e-3 as text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _sentence(error: dict, model: type[BaseModel], prefix: str) -> str:
    """One mistake in one sentence, ending with what to write instead."""
    loc = [str(part) for part in error["loc"] if not _names_a_branch(part)]
    where = prefix + ".".join(loc)
    if error["type"] == "extra_forbidden":
        known = _keys_at(model, loc[:-1])
        near = difflib.get_close_matches(loc[-1], known, 1, 0.5)
        hint = f"did you mean {'.'.join([prefix + loc[0], *loc[1:-1], near[0]]) if len(loc) > 1 else prefix + near[0]}?"
        return f"{where} does not exist; {hint if near else 'the keys here are ' + ', '.join(known) + '.'}"
    if error["type"] == "missing":
        return f"{where} is missing: write a value for it."
    message = error["msg"].removeprefix("Value error, ")
    if not loc:
        return message + "."
    return f"{where}={error['input']!r} is refused: {message[0].lower() + message[1:]}."


def _names_a_branch(part) -> bool:
    """pydantic adds the branch of a union (`int`, `tuple[int, int]`, `literal['auto']`) to an error's place."""
    return isinstance(part, str) and (part in ("int", "str", "dict", "EvaluateConfig") or "[" in part)


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation
        options = [a for a in getattr(annotation, "__args__", (annotation,)) if isinstance(a, type)]
        model = next(a for a in options if issubclass(a, BaseModel))
    return list(model.model_fields)
