"""What is written in Python, as the words of a command line: settings of a config, and options of a door."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prelude.data.errors import UserError
from prelude.objectives import options_for
from prelude.pretrain.config_keys import Keys
from prelude.pretrain.recipes import read_recipe


def overrides_of(recipe: str | Path, settings: Mapping[str, Any]) -> list[str]:
    """`key.sub=value` of each setting. Raises UserError for a short name that several keys end in, for a value that
    no config can hold, and for a recipe that is not there."""
    objective = settings.get("objective.name") or (read_recipe(recipe).get("objective") or {}).get("name")
    keys = Keys(options_for(objective) if isinstance(objective, str) else None)
    full = {_in_full(name, keys): value for name, value in settings.items()}
    flat = {key: value for name, given in full.items() for key, value in _flat(name, given, keys)}
    return [f"{key}={_written(key, value)}" for key, value in flat.items()]


def _in_full(name: str, keys: Keys) -> str:
    if "." in name or name in keys.names([]):
        return name
    found = [key for key in keys.all() if key.rpartition(".")[2] == name]
    found = [key for key in found if key.count(".") == 1] or found  # `shards` is data.shards, not data.volumes.shards
    if len(found) > 1:
        raise UserError(f'{name} may be {" or ".join(found)}; write the one that is meant, as **{{"{found[0]}": ...}}.')
    return found[0] if found else name  # a name that does not exist is refused with the nearest that does


def _flat(name: str, value: Any, keys: Keys) -> Iterator[tuple[str, Any]]:
    """A mapping that stands for a section, as one setting for each of its keys."""
    if isinstance(value, Mapping) and keys.section(name.split(".")):
        for key, below in value.items():
            yield from _flat(f"{name}.{key}", below, keys)
    else:
        yield name, value


def _written(key: str, value: Any) -> str:
    if isinstance(value, (str, Path)):
        return str(value)
    try:
        return json.dumps(value, default=_plain)
    except TypeError:
        kind = type(value).__name__
        raise UserError(f"{key} cannot be a {kind}; write a number, text, a list or a dictionary.") from None


def _plain(value: Any) -> Any:
    """A path as text, and a number of numpy's or torch's as Python's."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError


def option_words(options: Mapping[str, Any]) -> list[str]:
    """`--name value` of each: of a list every value, of True none, and nothing at all of None and False."""
    words = []
    for name, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else map(str, values))]
    return words
