"""A recipe becomes the configuration of a run: read, overridden, and refused whole with every mistake at once.

- One YAML a recipe; `key.sub=value` on the command line overrides it.
- `base: RECIPE` in a file: it begins with that recipe's settings and writes down what differs. Its run_dir is its own:
  two recipes that wrote into one folder would be taken for one run.
- A key that does not exist is refused with the nearest one that does.
- What the sections of `config` cannot know (an objective's own options) is validated by the caller's
  `options_for`, so that this module imports no objective.
"""

import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from prelude.data.counting import counted
from prelude.data.errors import UserError, cause_of
from prelude.pretrain import overrides as setting
from prelude.pretrain import recipe_yaml
from prelude.pretrain.config import Config
from prelude.pretrain.config_keys import Keys
from prelude.pretrain.config_words import sentences, shown

SHIPPED = Path(__file__).resolve().parents[1] / "configs"
FINE_TUNE = "fine_tune"  # what objective.name is there, where it is said
TRUTH = {"yes", "no", "on", "off", "y", "n"}  # what YAML 1.1 takes for true and false
OptionsFor = Callable[[str], type[BaseModel]]


def load_config(recipe: str | Path, overrides: list[str] = (), options_for: OptionsFor | None = None) -> Config:
    """Reads a recipe, applies `key.sub=value` overrides, and validates all of it.

    `options_for(name)` returns the options model of an objective and raises UserError for an unknown one.
    Raises UserError with every mistake found.
    """
    values = read_recipe(recipe, overrides, options_for)
    refuse_fine_tuning(values, recipe)
    refuse_shared_run_dir(recipe, overrides)
    return validate_config(values, str(recipe), options_for)


def is_of_fine_tuning(values: dict) -> bool:
    """Whether a recipe, as far as it can be read, is one of `prelude finetune`, which need not say so."""
    named, has_settings = objective_named(values), isinstance(values.get("objective"), dict)
    return named == FINE_TUNE or (has_settings and named is None and "encoder" not in values)


def refuse_fine_tuning(values: dict, recipe: str | Path) -> None:
    """Raises UserError, where a recipe of pretraining is wanted."""
    if is_of_fine_tuning(values):
        raise UserError(
            f"{recipe} is a recipe of fine-tuning: it names no objective to pretrain with, and its encoder is that of "
            f"a source; write `prelude finetune SOURCE --config {recipe}`, or a recipe of pretraining."
        )


def objective_named(values: dict) -> str | None:
    """objective.name of a recipe that is not validated; None where there is none that could be one."""
    objective = values.get("objective")
    name = objective.get("name") if isinstance(objective, dict) else None
    return name if isinstance(name, str) else None


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


def refuse_shared_run_dir(recipe: str | Path, overrides: list[str] = ()) -> None:
    """Raises UserError where a recipe would write into the folder of the one that it is built on, unasked."""
    files = bases_of(recipe)
    told = any(override.partition("=")[0].strip() == "run_dir" for override in overrides)
    if len(files) == 1 or told or "run_dir" in _read(files[0]):
        return
    own, theirs = (_with_bases(file).get("run_dir") for file in files[:2])
    if own is not None and own == theirs:
        raise UserError(
            f"{files[0]} would write into run_dir={own} as {files[1]} does, on which it is built; write a run_dir of "
            "its own there, or give the file another name."
        )


def _with_bases(path: Path) -> dict:
    values: dict = {}
    files = bases_of(path)
    for file in reversed(files):
        values = _built_on(values, _read(file))
    values.pop("base", None)
    if len(files) > 1 and "run_dir" not in _read(path) and isinstance(values.get("run_dir"), str):
        values["run_dir"] = str(Path(values["run_dir"]).parent / path.stem)  # beside that of its base
    return values


def _built_on(base: dict, own: dict, at: tuple[str, ...] = ()) -> dict:
    """Sections are merged key by key; one that names another encoder, objective or optimizer begins anew, as does an
    empty one. Anything else, lists included, is replaced."""
    merged = dict(base)
    for key, value in own.items():
        there = merged.get(key)
        together = isinstance(value, dict) and isinstance(there, dict) and value
        anew = not together or setting.is_another_kind((*at, key), value, there)
        merged[key] = value if anew else _built_on(there, value, (*at, key))
    return merged


def _read(path: Path) -> dict:
    try:
        values = recipe_yaml.load(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({cause_of(error)}); write a file that can.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text; write a YAML file, such as those of configs/.") from None
    except recipe_yaml.Mistake as error:
        raise UserError(f"{path} is not valid YAML in {error.place}: {error.problem}; correct it there.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no settings; write `key: value` lines, as in the files of configs/.")
    _refuse_commands_of_a_file(values, path)
    try:
        return _unshared(values)
    except RecursionError:
        raise UserError(f"{path} has an anchor that holds itself; write out what is meant.") from None


def _unshared(value: Any) -> Any:
    """What an anchor (`&`) stands for, once for each place: an override changes one of them."""
    if isinstance(value, dict):
        return {key: _unshared(one) for key, one in value.items()}
    return [_unshared(one) for one in value] if isinstance(value, list) else value


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
    by_name = given.parent in (Path(), Path(SHIPPED.name))  # elsewhere it is the user's own
    shipped = [SHIPPED / given.name] if by_name else []
    shipped += [SHIPPED / f"{given.name}.yaml"] if given.parent == Path() else []
    for candidate in (given, *shipped):
        if os.path.isfile(candidate):
            return candidate
    near = nearest_recipe(given.stem)
    hint = f"did you mean {near}?" if near else "write a file, or a name that `prelude recipes` lists."
    raise UserError(f"No config at {recipe}; {hint}")


def nearest_recipe(name: str) -> str:
    """Of those that ship; nothing where none is alike."""
    return next(iter(difflib.get_close_matches(name.lower(), shipped_recipes(), 1, 0.5)), "")


def validate_config(
    values: dict, source: str, options_for: OptionsFor | None = None, *, recorded: bool = False
) -> Config:
    """recorded: by a checkpoint, whose network is built as it was trained."""
    mistakes, config, resolved = [], None, {}
    objective = values.get("objective")
    model, wrong = None, []
    if options_for and isinstance(objective, dict):
        model, wrong = _options_model(objective, options_for)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        mistakes += sentences(error, values, Keys(model))
    mistakes += [*([] if recorded else _texts_for_truth(values)), *wrong]
    if model:
        try:
            given = {key: value for key, value in objective.items() if key != "name"}
            resolved = {"name": objective["name"], **model.model_validate(given).model_dump()}
        except ValidationError as error:
            mistakes += sentences(error, values, Keys(model), above=("objective",))
    if mistakes:
        count = f"Found {counted(len(mistakes), 'error')} in {source}:"
        raise UserError("\n".join([count, *(f"  {mistake}" for mistake in mistakes)]))
    return config.model_copy(update={"objective": resolved}) if options_for else config


def _texts_for_truth(values: dict) -> list[str]:
    """`no` and its like are text, which timm and DeepSpeed count as true; keys of sections are known to take no text.

    It is asked of what is written, not of what a checkpoint recorded, which fine-tuning takes: that is opened as it was
    trained.
    """
    encoder = values.get("encoder") if objective_named(values) != FINE_TUNE else None
    kwargs = encoder.get("kwargs") if isinstance(encoder, dict) else None
    free = {"encoder.kwargs": kwargs, "deepspeed": values.get("deepspeed")}
    return [
        f"{section}.{key}={shown(value)} is refused: it is text, which counts as true; write true or false."
        for section, found in free.items()
        for key, value in (found.items() if isinstance(found, dict) else ())
        if isinstance(value, str) and value.lower() in TRUTH
    ]


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
