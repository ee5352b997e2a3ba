"""A recipe becomes the configuration of a run: read, overridden, and refused whole with every mistake at once.

- One YAML a recipe; `key.sub=value` on the command line overrides it.
- `base: RECIPE` in a file: it begins with that recipe's settings and writes down what differs.
- A key that does not exist is refused with the nearest one that does.
- What the sections of `config` cannot know (an objective's own options) is validated by the caller's
  `options_for`, so that this module imports no objective.
"""

import difflib
import os
from collections.abc import Callable
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError

from prelude.data.errors import UserError
from prelude.pretrain import overrides as setting
from prelude.pretrain import recipe_yaml
from prelude.pretrain.config import Config
from prelude.pretrain.config_keys import Keys
from prelude.pretrain.config_words import sentences, shown

SHIPPED = Path(__file__).resolve().parents[1] / "configs"
OptionsFor = Callable[[str], type[BaseModel]]


def load_config(recipe: str | Path, overrides: list[str] = (), options_for: OptionsFor | None = None) -> Config:
    """Reads a recipe, applies `key.sub=value` overrides, and validates all of it.

    `options_for(name)` returns the options model of an objective and raises UserError for an unknown one.
    Raises UserError with every mistake found.
    """
    return validate_config(read_recipe(recipe, overrides, options_for), str(recipe), options_for)


def read_recipe(recipe: str | Path, overrides: list[str] = (), options_for: OptionsFor | None = None) -> dict:
    """The values of a recipe after `key.sub=value` overrides, not validated. Raises UserError."""
    values = _with_bases(find_recipe(recipe))
    keys = Keys(_options_named(values, overrides, options_for))
    for override in overrides:
        setting.apply(values, override, keys)
    return values


def bases_of(recipe: str | Path) -> list[Path]:
    """The files that a recipe is built from, itself first. Raises UserError."""
    chain = [find_recipe(recipe)]
    while named := _read(chain[-1]).get("base"):
        if not isinstance(named, str):
            raise UserError(f"base={named} in {chain[-1]} is no recipe; write the name or the file of one.")
        beside = chain[-1].parent / os.path.expanduser(named)
        try:
            found = beside if beside.is_file() else find_recipe(named)
        except UserError as error:
            raise UserError(f"base={named} in {chain[-1]} cannot be built on: {error}") from None
        if any(found.resolve() == path.resolve() for path in chain):
            raise UserError(f"{chain[-1]} is built on {found}, which is built on it; leave one base out.")
        chain.append(found)
    return chain


def _with_bases(path: Path) -> dict:
    values: dict = {}
    for file in reversed(bases_of(path)):
        values = _built_on(values, _read(file))
    values.pop("base", None)
    return values


def _built_on(base: dict, own: dict) -> dict:
    """Sections are merged key by key; one that names another encoder, objective or optimizer begins anew, as does an
    empty one. Anything else, lists included, is replaced."""
    merged = dict(base)
    for key, value in own.items():
        there = merged.get(key)
        together = isinstance(value, dict) and isinstance(there, dict) and value
        merged[key] = _built_on(there, value) if together and not setting.is_another_kind(value, there) else value
    return merged


def _read(path: Path) -> dict:
    try:
        values = recipe_yaml.load(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); write a file that can.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text; write a YAML file, such as those of configs/.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}; correct it there.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no settings; write `key: value` lines, as in the files of configs/.")
    _refuse_commands_of_a_file(values, path)
    return values


def _refuse_commands_of_a_file(values: dict, path: Path) -> None:
    data = values.get("data")
    if isinstance(data, dict) and data.get("allow_commands"):
        raise UserError(
            f"{path} cannot allow itself to run commands; leave data.allow_commands out, and write it on the command "
            f"line if you trust the shards that the file names."
        )


def shipped_recipes() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def find_recipe(recipe: str | Path) -> Path:
    """A file, or the name of one of the recipes that ship in configs/ (`quickstart`)."""
    given = Path(os.path.expanduser(recipe))
    for candidate in (given, SHIPPED / given.name, SHIPPED / f"{recipe}.yaml"):
        if os.path.isfile(candidate):
            return candidate
    near = nearest_recipe(given.stem)
    hint = f"did you mean {near}?" if near else "write a file, or a name that `prelude recipes` lists."
    raise UserError(f"No config at {recipe}; {hint}")


def nearest_recipe(name: str) -> str:
    """Of those that ship; nothing where none is alike."""
    return next(iter(difflib.get_close_matches(name, shipped_recipes(), 1, 0.5)), "")


def validate_config(values: dict, source: str, options_for: OptionsFor | None = None) -> Config:
    mistakes, config, resolved = [], None, {}
    objective = values.get("objective")
    model, wrong = None, []
    if options_for and isinstance(objective, dict):
        model, wrong = _options_model(objective, options_for)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        mistakes += sentences(error, values, Keys(model))
    mistakes += wrong
    if model:
        try:
            given = {key: value for key, value in objective.items() if key != "name"}
            resolved = {"name": objective["name"], **model.model_validate(given).model_dump()}
        except ValidationError as error:
            mistakes += sentences(error, values, Keys(model), above=("objective",))
    if mistakes:
        count = f"Found {len(mistakes)} error{'s' * (len(mistakes) > 1)} in {source}:"
        raise UserError("\n".join([count, *(f"  {mistake}" for mistake in mistakes)]))
    return config.model_copy(update={"objective": resolved}) if options_for else config


def _options_model(objective: dict, options_for: OptionsFor) -> tuple[type[BaseModel] | None, list[str]]:
    """The model of the settings of the objective that is named, or why there is none."""
    name = objective.get("name")
    if name is None:
        return None, ["objective.name is missing: write the name of an objective, such as mae."]
    if not isinstance(name, str):
        return None, [f"objective.name={shown(name)} is refused: write the name of an objective, such as mae."]
    try:
        return options_for(name), []
    except UserError as error:
        return None, [str(error)]


def _options_named(values: dict, overrides: list[str], options_for: OptionsFor | None) -> type[BaseModel] | None:
    """The settings of the objective that the recipe names once it is overridden, as far as that is known."""
    objective = values.get("objective")
    named = [override.partition("=")[2] for override in overrides if override.startswith("objective.name=")]
    default = objective.get("name") if isinstance(objective, dict) else None
    return _options_model({"name": named[-1] if named else default}, options_for)[0] if options_for else None
