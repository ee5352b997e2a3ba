"""Self-supervised objectives, found by name and imported only when one is asked for.

This module and `options`, the settings of our own objectives, come without torch: a wrong setting is told at once.

A name in a config is one of ours (`mae`), a class on the import path or in the current folder (`package.module:Class`),
or one that an installed package offers in the entry-point group `prelude.objectives`.
"""

if __name__ != "prelude.objectives":  # under a second name every module would exist twice
    raise ImportError("objectives is imported as prelude.objectives")

import difflib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from prelude.data.errors import UserError
from prelude.objectives.options import OPTIONS
from prelude.pretrain import named_code
from prelude.pretrain.config import Config
from prelude.pretrain.options import Options

if TYPE_CHECKING:
    from prelude.pretrain.objective import Objective

OURS = {
    "barlow_twins": "prelude.objectives.barlow_twins:BarlowTwins",
    "dseqjepa": "prelude.objectives.dseqjepa:DSeqJEPA",
    "fcmae": "prelude.objectives.fcmae:FCMAE",
    "ijepa": "prelude.objectives.ijepa:IJEPA",
    "lejepa": "prelude.objectives.lejepa:LeJEPA",
    "mae": "prelude.objectives.mae:MAE",
    "msbreg": "prelude.objectives.msbreg:MSBReg",
    "rotation": "prelude.objectives.rotation:Rotation",
    "simmim": "prelude.objectives.simmim:SimMIM",
    "spark": "prelude.objectives.spark:SparK",
    "uni4eye": "prelude.objectives.uni4eye:Uni4Eye",
    "vicreg": "prelude.objectives.vicreg:VICReg",
}
ENTRY_POINTS = "prelude.objectives"


def objective_class(name: str) -> "type[Objective]":
    """The class behind `objective.name`. Raises UserError for a name that leads nowhere."""
    offered = {entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS)} | OURS
    if name not in offered and ":" not in name:
        near = difflib.get_close_matches(name, offered, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"write one of {', '.join(sorted(offered))}, or module:Class."
        raise UserError(f"objective.name={name} is not known; {hint}")
    return _imported(offered.get(name, name), name)


def options_for(name: str) -> type[Options]:
    """The model of an objective's settings, as `prelude.pretrain.recipes.load_config` wants it. Raises UserError."""
    return OPTIONS[name] if name in OPTIONS else objective_class(name).Options


def check_objective(config: Config, world_size: int = 1) -> None:
    """Refuses, before anything is built, an objective that cannot work with this encoder, or with what `world_size`
    ranks see at once. Raises UserError."""
    cls, options = chosen(config)
    cls.check(options, config.encoder)
    _refuse_freezing_chance(config)
    _refuse_a_kind_too_many(config, cls)
    if cls.compares_samples(options) and config.train.global_batch < 2:
        raise UserError(
            f"objective.name={config.objective['name']} compares the samples of a batch, and train.global_batch=1 has "
            "one; write train.global_batch=256."
        )
    _refuse_a_single_value(config, cls, options, world_size)
    if named_code.is_named(config.encoder.name):
        from prelude.pretrain import own_encoder  # torch

        own_encoder.refuse_settings(config)
    if config.train.gradient_checkpointing:
        from prelude.pretrain.encoders import refuse_checkpointing

        refuse_checkpointing(config.encoder)
    if config.train.zero_stage > cls.max_zero_stage:
        raise UserError(
            f"objective.name={config.objective['name']} reads whole weights between steps, which ZeRO stage "
            f"{config.train.zero_stage} keeps in parts; write train.zero_stage={cls.max_zero_stage}."
        )


def _refuse_freezing_chance(config: Config) -> None:
    steps = config.train.freeze_encoder_steps
    if steps and config.encoder.weights is None:
        raise UserError(
            f"train.freeze_encoder_steps={steps} would hold an encoder that is still random; write "
            "encoder.weights=SOURCE, or leave it out."
        )


def _refuse_a_single_value(config: Config, cls: "type[Objective]", options: Options, world_size: int) -> None:
    batch, micro = config.train.global_batch, config.train.micro_batch
    at_once = batch if micro == "auto" else micro * world_size
    if at_once > 1 or cls.fewest_samples(options, config.encoder) < 2:
        return
    divisor = next((number for number in range(2, batch + 1) if batch % number == 0), None)
    enough = f"train.micro_batch={divisor}" if divisor else "train.global_batch=2 with train.micro_batch=auto"
    raise UserError(
        f"objective.name={config.objective['name']} sees one image at once, of which a batch norm of "
        f"encoder.name={config.encoder.name} has a single value and so no variance; write {enough}, or a smaller "
        "objective.mask_ratio."
    )


def _refuse_a_kind_too_many(config: Config, cls: "type[Objective]") -> None:
    name = config.objective["name"]
    if config.data.volumes and not cls.takes_volumes:
        raise UserError(
            f"objective.name={name} learns from images alone, and data.volumes says where volumes are; leave it out, "
            "or write objective.name=uni4eye."
        )
    if cls.takes_volumes and not config.data.volumes:
        raise UserError(
            f"objective.name={name} learns from images and volumes, and data.volumes is missing; write "
            "data.volumes={shards: PATTERN}, or for images alone objective.name=mae with objective.gradient_weight=1."
        )


def chosen(config: Config) -> "tuple[type[Objective], Options]":
    """The class and the settings of `config.objective`. Raises UserError."""
    given: dict[str, Any] = dict(config.objective)
    cls = objective_class(given.pop("name"))
    return cls, cls.Options.model_validate(given)


def _imported(path: str, name: str) -> "type[Objective]":
    cls = named_code.load("objective.name", path, "module:Class")
    from prelude.pretrain.objective import Objective  # torch, which whoever names a class has just imported

    if not (isinstance(cls, type) and issubclass(cls, Objective)):
        raise UserError(f"objective.name={name} is not an Objective; subclass prelude.pretrain.objective.Objective.")
    return cls
