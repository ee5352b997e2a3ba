"""What is written in Python, as the words of a command line: settings of a config, and options of a door.

A value of a kind that cannot be meant is refused here, where its type is still known: on a command line it is text.
"""

import argparse
import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from prelude.data.errors import UserError
from prelude.launch import arguments
from prelude.launch.python_words import keys_ending_in
from prelude.objectives import options_for
from prelude.pretrain.annotations import takes, takes_texts
from prelude.pretrain.config_keys import Keys
from prelude.pretrain.config_words import shown, wanted
from prelude.pretrain.named_code import as_it_is_now, is_named
from prelude.pretrain.options import Options
from prelude.pretrain.overrides import is_another_kind, value_of
from prelude.pretrain.recipe_yaml import written
from prelude.pretrain.recipes import objective_named, read_recipe

_NAME = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")
_NOT_ASKED = ("help", "local_rank")  # options that a launcher or a shell gives


def overrides_of(recipe: str | Path, settings: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """`key.sub=value` of each setting, and of what of the recipe follows from them. Raises UserError for a short name
    that several keys end in, for a value that the key cannot hold, and for a recipe that is not there."""
    values, keys = read_recipe(recipe), keys_of(recipe, settings)
    full = {_in_full(name, keys): value for name, value in settings.items()}
    flat = {key: value for name, given in full.items() for key, value in _flat(name, given, keys, values)}
    return _words(flat, keys), _words(following(flat, values), keys)


def _words(flat: Mapping[str, Any], keys: Keys) -> list[str]:
    return [f"{key}={_written(key, value, keys.field(key.split('.')))}" for key, value in flat.items()]


def following(flat: Mapping[str, Any], values: dict) -> dict[str, Any]:
    """What a shorter run than the recipe's takes along of it: a warm-up that would not end, milestones that would not
    be reached, and the steps in which an encoder is held still, keep their share of the run, unless they are set.

    flat: settings by their full keys. values: the recipe's.
    """
    epochs, usual = flat.get("train.epochs"), _at(("train", "epochs"), values)
    if not (_is_length(epochs) and _is_length(usual)):
        return {}
    found = {} if "optimizer" in flat else _of_schedule(epochs, usual, values)
    still, batch = (_at(("train", key), values) for key in ("freeze_encoder_steps", "global_batch"))
    batch_here = flat.get("train.global_batch", batch)
    if epochs < usual and all(map(_is_length, (still, batch, batch_here))):
        found["train.freeze_encoder_steps"] = int(still * epochs * batch / (usual * batch_here))
    return {key: value for key, value in found.items() if key not in flat}


def _of_schedule(epochs: float, usual: float, values: dict) -> dict[str, Any]:
    warmup, milestones = (_at(("optimizer", key), values) for key in ("warmup_epochs", "milestones"))
    found: dict[str, Any] = {}
    if _is_length(warmup) and warmup > epochs:
        found["optimizer.warmup_epochs"] = float(f"{warmup * epochs / usual:.3g}")
    if isinstance(milestones, list) and all(map(_is_length, milestones)) and max(milestones, default=0) >= epochs:
        found["optimizer.milestones"] = [float(f"{at * epochs / usual:.3g}") for at in milestones]
    return found


def _is_length(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def keys_of(recipe: str | Path, settings: Mapping[str, Any]) -> Keys:
    """Of the objective that is named in the settings, else in the recipe. Raises UserError."""
    section = settings.get("objective")
    told = settings.get("objective.name") or (section.get("name") if isinstance(section, Mapping) else None)
    name = told or objective_named(read_recipe(recipe))
    return Keys(options_now(name) if isinstance(name, str) else None)


def options_now(name: str) -> type[Options]:
    """The model of an objective's settings, of one's own class from its files as they are. Raises UserError."""
    return as_it_is_now(name, _options_complete) if is_named(name) else options_for(name)


def _options_complete(name: str) -> type[Options]:
    found = options_for(name)
    found.model_rebuild(raise_errors=False)  # later its module's names may no longer be found, or be others
    return found


def _in_full(name: str, keys: Keys) -> str:
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} is no key of a config; write one, such as epochs=10.")
    if "." in name or name in keys.names([]):
        return name
    found = keys_ending_in(name, keys.all())
    if len(found) > 1:
        raise UserError(f'{name} may be {" or ".join(found)}; write the one that is meant, as **{{"{found[0]}": ...}}.')
    return found[0] if found else name  # a name that does not exist is refused with the nearest that does


def _flat(name: str, value: Any, keys: Keys, values: dict) -> Iterator[tuple[str, Any]]:
    """A mapping that stands for a section, as one setting for each of its keys; whole, where it begins it anew."""
    path = name.split(".")
    if isinstance(value, Mapping) and keys.section(path) and not is_another_kind(path, dict(value), _at(path, values)):
        for key, below in value.items():
            yield from _flat(f"{name}.{key}", below, keys, values)
    else:
        yield name, value


def _at(path: Sequence[str], values: Any) -> Any:
    for part in path:
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _written(key: str, value: Any, field: FieldInfo | None) -> str:
    plain = _plain(value, key)
    if field is not None and (takes(field.annotation, str) or takes_texts(field.annotation)):
        _refuse_no_text(key, plain, field)
    text = plain if isinstance(plain, str) else written(plain)
    as_text = isinstance(plain, str) and field is not None and takes(field.annotation, str)
    return written(plain) if as_text and value_of(text, field) != plain else text


def _refuse_no_text(key: str, value: Any, field: FieldInfo) -> None:
    """For a key that takes text, as which any word of a command line would pass."""
    annotation = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    try:
        TypeAdapter(annotation).validate_python(value)
    except ValidationError:
        raise UserError(f"{key}={shown(value)} is refused: write {wanted(field)}.") from None


def _plain(value: Any, name: str) -> Any:
    """Values as JSON has them: a path is text, a tuple a list, and a number of numpy's or torch's one of Python's."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(one, name) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one, name) for one in value]
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        return value.item()
    instead = "list(...) of it" if hasattr(value, "__iter__") and not isinstance(value, (bytes, Mapping)) else (
        "a number, text, a list or a dictionary of these"
    )  # fmt: skip
    raise UserError(f"{name} cannot be a {type(value).__name__}; write {instead}.")


def as_path(value: Any, name: str, wanted: str = "a path") -> Path:
    """Raises UserError for what is none."""
    if not isinstance(value, (str, Path)) or not str(value).strip():
        raise UserError(f"{name}={value!r} cannot be; write {wanted}.")
    return Path(value)


def as_count(value: Any, name: str) -> int:
    """Raises UserError for what is no whole number of 1 or more."""
    number = _plain(value, name)
    if type(number) is not int or number < 1:
        raise UserError(f"{name}={number!r} cannot be; write a whole number of 1 or more.")
    return number


def option_words(options: Mapping[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    """`--name value` of each: of a list every value, of True none, and nothing at all of None and False.

    Raises UserError for what is no option of the door, and for a value that it cannot take.
    """
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    actions = {name: action for name, action in actions.items() if name not in _NOT_ASKED}
    words = []
    for name, value in options.items():
        if name not in actions:
            near = difflib.get_close_matches(name, actions, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"write one of {', '.join(actions)}."
            raise UserError(f"{name} is no option of `{parser.prog}`; {hint}")
        if value is not None and value is not False:
            words += _of_option(name, value, actions[name])
    return words


def _of_option(name: str, value: Any, action: argparse.Action) -> list[str]:
    option, given = action.option_strings[0], _plain(value, name)
    if action.nargs == 0 or given is True:
        if action.nargs != 0 or given is not True:
            wanted = "True or False" if action.nargs == 0 else "a value"
            raise UserError(f"{name}={given!r} cannot be; write {wanted}.")
        return [option]
    if isinstance(given, dict):
        return _of_pairs(name, given, action)
    values = given if isinstance(given, list) else [given]
    if not values:
        raise UserError(f"{name}=[] names nothing; write one or more, or leave it out.")
    for one in values:
        _refuse_no_word(name, one, action)
    if len(values) > 1 and action.type is arguments.value_range:
        return [option, ",".join(map(str, values))]
    if isinstance(action, (arguments.Shards, argparse._AppendAction)):
        return [word for one in values for word in (option, str(one))]
    if len(values) > 1 and action.nargs is None:
        raise UserError(f"{name}={given!r} cannot be; write one value.")
    return [option, *map(str, values)]


def _of_pairs(name: str, given: dict, action: argparse.Action) -> list[str]:
    """Of an option that takes KEY=VALUE several times, as `train_select={"share": 0.1}`."""
    if not isinstance(action, argparse._AppendAction):
        raise UserError(f"{name} cannot be a dict; write text, a number, or a list of these.")
    pairs = [f"{key}={one if isinstance(one, str) else written(one)}" for key, one in given.items()]
    return [word for pair in pairs for word in (action.option_strings[0], pair)]


def _refuse_no_word(name: str, value: Any, action: argparse.Action) -> None:
    of_text = action.type in (None, arguments.path, arguments.source)
    if isinstance(value, (bool, dict, list)) or value is None or (of_text and not isinstance(value, str)):
        is_path = isinstance(action, arguments.Shards) or action.type is not None
        raise UserError(f"{name}={value!r} cannot be; write {'a path or pattern' if is_path else 'text'}.")


def source_words(folder: Path, others: Sequence[Any]) -> list[str]:
    """The run's folder and the sources beside it. Raises UserError."""
    paths = [folder, *(as_path(getattr(one, "folder", one), "a source", "text, or a run") for one in others)]
    return [arguments.source(str(one)) for one in paths]
