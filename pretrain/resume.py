"""What may differ between a checkpoint and the run that goes on from it.

Anything that changes what is computed is refused, so that "the same run" stays true; where it runs, how it is
watched and how its batch is split over ranks may change freely.
"""

from pathlib import Path

from pydantic import ValidationError

from prelude.data.errors import UserError
from prelude.pretrain.config import Config

_FREE = (
    "run_dir",
    "resume",
    "checkpoint",
    "log",
    "evaluate",
    "collapse",
    "deepspeed",
    "data.shards",  # the data set is recognised by its content, not by its path
    "data.num_workers",
    "data.max_bad_share",
    "train.micro_batch",
    "train.zero_stage",
    "train.precision",
    "train.gradient_checkpointing",
    "train.compile",
    "train.max_nonfinite_steps",
)


def changed_settings(saved: dict, config: Config) -> list[str]:
    """`key: then -> now` for every setting that differs and must not."""
    then, now = _flat(_with_defaults(saved)), _flat(config.model_dump(mode="json"))
    keys = sorted(set(then) | set(now))
    return [
        f"{key}: {then.get(key)} -> {now.get(key)}"
        for key in keys
        if then.get(key) != now.get(key) and not any(key == free or key.startswith(free + ".") for free in _FREE)
    ]


def refuse_changed_config(changes: list[str], checkpoint: Path) -> None:
    if changes:
        raise UserError(
            f"{checkpoint} belongs to a run with other settings ({'; '.join(changes)}); choose another run_dir, "
            f"restore the settings, or write resume.allow_changed_config=true."
        )


def _with_defaults(saved: dict) -> dict:
    """With the keys that did not exist when the checkpoint was saved, at what they do when they are left out."""
    try:
        return Config.model_validate(saved).model_dump(mode="json")
    except ValidationError:
        return saved


def _flat(values: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out
