"""A recipe becomes the configuration of a run: read, overridden, and refused whole with every mistake at once.

- One YAML a recipe; `key.sub=value` on the command line overrides it; the values are YAML too.
- A key that does not exist is refused with the nearest one that does.
- What the sections of `config` cannot know (an objective's own options) is validated by the caller's
  `options_for`, so that this module imports no objective.
"""

import difflib
from collections.abc import Callable
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError

from prelude.data.errors import UserError
from prelude.pretrain.config import Config
from prelude.pretrain.config_words import sentence


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
        mistakes += [sentence(e, Config, "") for e in error.errors()]
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
        return {}, [sentence(e, model, "objective.") for e in error.errors()]


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
