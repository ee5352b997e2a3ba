"""What a recipe of fine-tuning may say, checked without importing torch."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from prelude.data.errors import UserError
from prelude.pretrain.options import AreaRange, Options, Positive
from prelude.pretrain.recipes import FINE_TUNE, objective_named, read_recipe, refuse_shared_run_dir, validate_config

NAME = FINE_TUNE
_UNKNOWN = "of the source"


class AugmentOptions(Options):
    """See data.batch.AutoAugment."""

    policy: Literal["rand", "trivial"] = "rand"  # RandAugment, or TrivialAugment
    num_ops: int = Field(2, ge=1)  # operations on an image
    probability: float = Field(0.5, gt=0, le=1)  # of each operation
    magnitude: float = Field(9.0, ge=0, le=10)  # of operations, out of 10
    magnitude_std: float = Field(0.5, ge=0)  # that it is drawn with around its value

    @model_validator(mode="after")
    def _trivial_has_no_settings(self):
        if self.policy == "trivial" and self.model_fields_set - {"policy"}:
            if self != type(self)(policy="trivial"):
                raise ValueError("the policy trivial has no settings; write {policy: trivial} alone")
        return self


class FineTuneOptions(Options):
    weights: str = ""  # fingerprint of the weights that training starts from; filled in by the command
    per_class: int | None = Field(None, ge=1)  # labelled images of each class; None: all
    fraction: float | None = Field(None, gt=0, le=1)  # of each class's labelled images; of all, with several findings
    hold_out: float = Field(0.0, ge=0, le=0.5)  # share of them that is not trained on and judges the weights; 0: none
    validate_every_epochs: float = Field(1.0, gt=0)  # between two looks at what is held out
    # Validations in a row without a better one that end the run, whose best weights are then the result. None: no end.
    patience: int | None = Field(None, ge=1)
    # mean: of the patch tokens, then a new norm (MAE). own: what the encoder itself pools. ViTs only; convnets pool.
    pooling: Literal["mean", "own"] = "mean"
    image_size: int | None = Field(None, ge=1)  # pixels; None: the size of pretraining
    drop_path: float = Field(0.0, ge=0, lt=1)  # probability that the last block is skipped; rises linearly from 0
    # Factor of the rate, a layer; see pretrain/layer_decay.py; 1: the same everywhere
    layer_decay: float = Field(1.0, gt=0, le=1)
    head_lr_ratio: float = Field(1.0, gt=0)  # the head's learning rate, as a multiple of lr
    crop_scale: AreaRange = (0.08, 1.0)  # area of the random crop, as a share of the image; [1, 1]: the whole image
    flip: float = Field(0.5, ge=0, le=1)  # probability of a horizontal flip
    shift: int = Field(0, ge=0)  # pixels; pads with black and crops at random, as is usual on CIFAR
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # of crops, in training and test
    augment: AugmentOptions | None = None  # operations on whole images; None: none
    mixup: float = Field(0.0, ge=0)  # alpha of the share that is drawn; 0: off
    cutmix: float = Field(0.0, ge=0)  # alpha of CutMix; 0: off
    cutmix_share: float = Field(0.5, ge=0, le=1)  # of the images that CutMix takes, where both are on
    cutmix_cell: int | None = Field(None, ge=1)  # pixels; random cells of a grid instead of a box (MaskMix)
    attention_labels: Literal["transmix", "mixpro"] | None = None  # of pasted images; see `attention_labels`
    label_smoothing: float = Field(0.0, ge=0, lt=1)  # share of the target that is spread over all classes
    loss: Literal["softmax", "sigmoid"] = "softmax"  # sigmoid: binary cross-entropy, averaged over the classes
    # What an uncertain finding (-1) is in training: nothing, absent, present, or present by a share drawn from
    # [0.55, 0.85] (CheXpert's policies, arXiv 1911.06475). Tests never count it.
    uncertain: Literal["ignore", "zeros", "ones", "smoothed"] = "ignore"
    # balanced: N / (C x images of the class); of findings, of presence and absence. Or numbers by class or finding.
    class_weights: Literal["equal", "balanced"] | dict[int | str, Positive] = "equal"
    # Standard deviation of the head's first weights; uniform: torch's own, within 1 / sqrt(width), biases too.
    head_std: Annotated[float, Field(gt=0)] | Literal["uniform"] = 2e-5
    ema_decay: float = Field(0.0, ge=0, lt=1)  # of the average of the weights; 0: none
    # Side of the central crop in tests; None: 0.875 from 128 to 224 pixels, else all
    test_crop_share: float | None = Field(None, gt=0, le=1)
    # Between two tests, a curve to look at; only the last weights are reported
    test_every_epochs: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_way_to_take_few(self):
        if self.per_class is not None and self.fraction is not None:
            raise ValueError("objective.per_class and objective.fraction both say how many labels there are; write one")
        return self

    @model_validator(mode="after")
    def _no_setting_without_effect(self):
        for key in ("patience", "validate_every_epochs"):
            if not self.hold_out and self._is_set(key):
                raise ValueError(
                    f"objective.{key} has no effect where nothing is held out; write objective.hold_out=0.1"
                )
        if self._is_set("cutmix_share") and not (self.mixup and self.cutmix):
            raise ValueError("objective.cutmix_share has no effect without both mixup and cutmix; leave it out")
        for key in ("cutmix_cell", "attention_labels"):
            if self._is_set(key) and not self.cutmix:
                raise ValueError(f"objective.{key} has no effect without cutmix; write objective.cutmix=1.0")
        if self.attention_labels == "mixpro" and self.loss == "sigmoid":
            raise ValueError("objective.attention_labels=mixpro is of a softmax; write transmix, or loss=softmax")
        return self


def check_recipe(recipe: str | Path, overrides: list[str] = ()) -> None:
    """Raises UserError for what is wrong with a recipe whatever its source and its labels are."""
    values = read_recipe(recipe, overrides, options_for)
    refuse_pretraining(values, recipe)
    refuse_shared_run_dir(recipe, overrides)
    refuse_what_the_source_decides(values)
    whole = completed(values, Unknown())
    validate_config(whole, str(recipe), options_for)


@dataclass(frozen=True)
class Unknown:
    """The labelled shards of a recipe whose source is not known; see `evaluators.judging.Labelled`."""

    train: str = _UNKNOWN
    test: str = _UNKNOWN
    label: str = "cls"


def completed(values: dict, labelled) -> dict:
    """A recipe's values with the labelled shards, and an encoder that stands for that of the source."""
    section, data, objective = (values.get(name) or {} for name in ("evaluate", "data", "objective"))
    found = {"train_shards": labelled.train, "test_shards": labelled.test, "label": labelled.label}
    if not isinstance(labelled, Unknown):
        found |= {"image": labelled.image or None, "classes": list(labelled.classes)}
        found["label_group"] = labelled.label_group
        for name in ("train_select", "test_select"):
            select = getattr(labelled, name)
            found[name] = asdict(select) if select else None
    return values | {
        "evaluate": section | found if isinstance(section, dict) else section,
        "data": data | {"shards": labelled.train} if isinstance(data, dict) else data,
        "objective": {"name": NAME} | objective if isinstance(objective, dict) else objective,
        "encoder": {"name": _UNKNOWN, "image_size": 1},
    }


def options_for(name: str) -> type[FineTuneOptions]:
    if name != NAME:
        raise UserError(f"objective.name={name} is no way to fine-tune; write {NAME}, or leave it out.")
    return FineTuneOptions


def refuse_pretraining(values: dict, recipe: str | Path) -> None:
    """Raises UserError for a recipe that names an objective of pretraining, and an encoder to train with it."""
    name = objective_named(values)
    if name not in (None, NAME) and "encoder" in values:
        raise UserError(
            f"{recipe} is a recipe of pretraining (objective.name={name}); write `prelude pretrain --config "
            f"{recipe}`, or a recipe that `prelude recipes --objective fine-tuning` lists, such as finetune_vit_base."
        )


def refuse_what_the_source_decides(values: dict) -> None:
    """Raises UserError for what a recipe says in vain."""
    data, evaluate = (part if isinstance(part := values.get(name), dict) else {} for name in ("data", "evaluate"))
    if "encoder" in values:
        raise UserError(
            "The encoder is that of SOURCE; leave the section encoder out (objective.image_size and "
            "objective.drop_path change what fine-tuning may change)."
        )
    for key, instead in (
        ("shards", "train_shards, or --train SHARDS"), ("mix", "train_shards with all of them"),
        ("select", "train_select"), ("image", "image"),
    ):  # fmt: skip
        if key in data:
            raise UserError(f"data.{key} has no effect on fine-tuning; write evaluate.{instead}.")
    if data.get("num_samples") is not None:
        raise UserError("data.num_samples has no effect on labelled shards, which are counted; leave it out.")
    if data.get("allow_commands"):
        raise UserError("data.allow_commands has no effect on labelled shards, which must be files; leave it out.")
    if data.get("volumes"):
        raise UserError("data.volumes has no effect on fine-tuning, which learns from labelled images; leave it out.")
    if evaluate.get("every_steps"):
        raise UserError("evaluate.every_steps is for pretraining; write objective.test_every_epochs for a curve.")
    optimizer = values.get("optimizer")
    if isinstance(optimizer, dict) and "layer_decay" in optimizer:
        raise UserError("optimizer.layer_decay is for pretraining; write objective.layer_decay.")
    if "collapse" in values:
        raise UserError("The section collapse has no effect on training with labels; leave it out.")
