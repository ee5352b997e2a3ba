"""Which runs a sweep is made of: every combination of the values that its settings go through.

- `key=[a, b]` is two values; where a key takes a list, `key=[[a, b], [c, d]]` is, and `key=[a, b]` is one. Where it
  takes a number as well, `key=[a, [b, c]]` is two, and `key=[a, b]` may be either, and is refused with both.
- A run's folder is named by its own values, so that a sweep can be widened and keeps what it has.
- Every run's config is read before any is started. Nothing here imports torch.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from prelude.data.errors import UserError
from prelude.objectives import options_for
from prelude.pretrain import recipe_yaml
from prelude.pretrain.annotations import alternatives, kind_of, takes
from prelude.pretrain.config import Config
from prelude.pretrain.config_keys import Keys
from prelude.pretrain.recipes import find_recipe, load_config, objective_named, read_recipe

LONGEST_NAME = 120  # characters of a folder


@dataclass(frozen=True)
class Combination:
    name: str  # lr=0.001,mask_ratio=0.6
    values: dict[str, Any]  # of the settings that the sweep goes through, by their keys
    recipe: Path
    overrides: list[str]  # all that pretraining is told
    config: Config


def combinations_of(recipe: str, overrides: Sequence[str], out: str | None) -> list[Combination]:
    """In the order of the lists, the last one's values fastest. Raises UserError for what cannot be trained."""
    path = find_recipe(recipe)
    folder = Path(out or f"runs/sweep_{path.stem}")
    fixed, swept = [], {}
    for override in overrides:
        key, equals, text = override.partition("=")
        values = _values(key, text, path) if equals else None
        if key == "run_dir":
            raise UserError("run_dir is each run's own in a sweep; write --out DIR for the folder of all.")
        if values is None:
            fixed.append(override)
        else:
            swept[key] = values
    if not swept:
        raise UserError(
            "There is nothing to go through; write a list for a setting, such as 'optimizer.lr=[1e-3, 3e-3]', or use "
            "`prelude pretrain`."
        )
    found = []
    for chosen in product(*swept.values()):
        values = dict(zip(swept, chosen, strict=True))
        name = _name(values)
        texts = {key: value if isinstance(value, str) else recipe_yaml.written(value) for key, value in values.items()}
        own = [f"{key}={text}" for key, text in texts.items()]
        told = [f"run_dir={folder / name}", *fixed, *own]
        found.append(Combination(name, values, path, told, load_config(path, told, options_for)))
    return found


def _values(key: str, text: str, recipe: Path) -> list | None:
    """What a setting goes through; None where it has one value. Raises UserError for a list without values, or with one
    twice, and for one that may be a value as well."""
    text = text.strip()
    if not text.startswith("["):
        return None
    try:
        values = recipe_yaml.load(text)
    except recipe_yaml.Mistake:
        return None  # a pattern such as [ab]*.tar
    if not isinstance(values, list):
        return None
    field = _field(key, recipe)
    if field is not None and takes(field.annotation, list) and not any(map(_is_list, values)):
        _refuse_sizes(key, text, values, field)
        return None
    if not values:
        raise UserError(f"{key}=[] has no value to go through; write one or more, or leave it out.")
    written = [json.dumps(value) for value in values]
    if twice := next((value for value in written if written.count(value) > 1), None):
        raise UserError(
            f"{key} is to go through {twice} twice; write each value once, and a value that is a list itself in two "
            f"pairs of brackets, {key}=[{text}]."
        )
    return values


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _field(key: str, recipe: Path) -> FieldInfo | None:
    name = objective_named(read_recipe(recipe))
    return Keys(options_for(name) if name else None).field(key.split("."))


def _refuse_sizes(key: str, text: str, values: list, field: FieldInfo) -> None:
    """Raises UserError where numbers may be several values, or one: `encoder.image_size=[32, 48]`."""
    if not (values and takes(field.annotation, int) and all(type(value) is int for value in values)):
        return
    sides = next(len(get_args(part)) for part in alternatives(field.annotation) if kind_of(part) is list)
    each = ", ".join(json.dumps([value] * sides) for value in values)
    if len(values) != sides:
        raise UserError(f"{key}={text} is no value of it; write {key}=[{each}] to go through these.")
    raise UserError(
        f"{key}={text} may be meant in two ways; write {key}=[{each}] to go through these, and {key}=[{text}] for one "
        "of unlike sides."
    )


def _name(values: dict[str, Any]) -> str:
    leaves = [key.rpartition(".")[2] for key in values]
    parts = []
    for key, leaf, value in zip(values, leaves, values.values(), strict=True):
        word = value if isinstance(value, str) else json.dumps(value)
        parts.append(f"{leaf if leaves.count(leaf) == 1 else key}={word}")
    name = ",".join(parts)
    plain = re.sub(r"[^\w.=,+-]+", "_", name).strip("_.")
    if plain == name and len(name) <= LONGEST_NAME:
        return name
    return f"{plain[:LONGEST_NAME]}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"
