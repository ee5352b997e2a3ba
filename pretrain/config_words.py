"""One sentence for each mistake of a config: what is wrong, where, and what to write instead.

What to write is read off the type of the key, so that an objective from anywhere has the same sentences.
"""

import difflib
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from prelude.pretrain import foreign_keys
from prelude.pretrain.annotations import alternatives, is_section, section_in, takes
from prelude.pretrain.config_keys import Keys
from prelude.pretrain.options import Called, number

_LONGEST = 80  # characters of a value that a sentence repeats


def sentences(error: ValidationError, values: dict, keys: Keys, above: tuple[str, ...] = ()) -> list[str]:
    """One for each key, in the order of the mistakes.

    values: all that was validated. above: where in a config that is, (`objective`,) for an objective's settings.
    """
    found: dict[str, str] = {}  # by key: the branches of a union have an error each
    for mistake in error.errors():
        path = _path_of([*above, *mistake["loc"]], keys)
        found.setdefault(".".join(path), _sentence(mistake, path, values, keys))
    return list(found.values())


def _sentence(mistake: dict, path: list[str], values: dict, keys: Keys) -> str:
    key, field = ".".join(path), keys.field(path)
    if mistake["type"] == "extra_forbidden":
        return unknown_key(path, keys)
    if mistake["type"] == "missing" and not _is_given(path, values):
        return f"{key} is missing: write {wanted(field) if field else 'a value for it'}."
    message = mistake["msg"].removeprefix("Value error, ")
    if not path:
        return f"{message}." if mistake["type"] == "value_error" else "Write `key: value` lines."
    if mistake["type"] == "value_error" and keys.section(path):
        return f"{key}: {message}."
    value = _value_at(path, values, mistake["input"])
    if mistake["type"] == "value_error" or field is None:
        return f"{key}={shown(value)} is refused: {message[0].lower() + message[1:]}."
    if isinstance(value, str) and "name" in keys.names(path):
        return f"{key}={shown(value)} is refused: write {key}.name={value}, or settings below {key}."
    want = wanted(field)
    if mistake["type"] == "finite_number":
        want = want.replace("a number", "a finite number")
    elif takes(field.annotation, str) and isinstance(value, (int, float)) and not isinstance(value, bool):
        want += ", in quotes where it looks like a number"
    return f"{key}={shown(value)} is refused: write {want}."


def unknown_key(path: list[str], keys: Keys) -> str:
    """For a key that is nowhere: the nearest that there is, or what another tool's word is called here."""
    *section, leaf = path
    here, everywhere, word = keys.names(section), list(keys.all()), leaf.lower().replace("-", "_")
    if word in foreign_keys.SENTENCES:
        return f"{'.'.join(path)} does not exist: {foreign_keys.SENTENCES[word]}."
    near = [".".join([*section, name]) for name in difflib.get_close_matches(leaf, here, 1, 0.75)]
    if not near:
        near = [foreign_keys.NAMES[word]] if word in foreign_keys.NAMES else []
    near = near or [key for key in everywhere if key.rpartition(".")[2] == word][:3]
    near = near or [".".join([*section, name]) for name in difflib.get_close_matches(leaf, here, 1, 0.5)]
    if not near:
        leaves = {key.rpartition(".")[2]: key for key in everywhere}
        near = [leaves[name] for name in difflib.get_close_matches(word, leaves, 1, 0.8)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"the keys here are {', '.join(here)}."
    return f"{'.'.join(path)} does not exist; {hint}"


def wanted(field: FieldInfo) -> str:
    """What to write for a key: `a number above 0`, `auto, or a whole number of 1 or more`."""
    if section := section_in(field):
        return f"settings below it: {', '.join(section.model_fields)}"
    parts = dict.fromkeys(_wanted(part, field.metadata) for part in alternatives(field.annotation))
    about = f", {field.description}" if field.description else ""
    return ", or ".join(part for part in parts if part) + about


def _wanted(part: Any, metadata: list) -> str:
    origin, inside = get_origin(part), get_args(part)
    if origin is Annotated:
        return _wanted(inside[0], _limits_in(inside[1:]))
    if origin is Literal:
        return f"one of {', '.join(map(str, inside))}" if len(inside) > 1 else str(inside[0])
    if origin is tuple and inside[-1] is not Ellipsis:
        return f"a list of {len(inside)} {_many(inside[0])}"
    if origin is tuple:
        return f"a list of {_many(inside[0])}"
    if origin is list:
        least = next((limit.min_length for limit in metadata if isinstance(limit, MinLen)), 0)
        return f"a list of {_many(inside[0])}{f', at least {least}' if least else ''}"
    if part is str and (called := _called(metadata)):
        return called.one
    names = {bool: "true or false", str: "text", type(None): "null", Any: "a value"}
    if part in (int, float):
        return " ".join(filter(None, ("a whole number" if part is int else "a number", _limits(metadata))))
    return names.get(part, "a mapping in {}" if (origin or part) is dict else "" if is_section(part) else "a value")


def _many(part: Any) -> str:
    limits = []
    if get_origin(part) is Annotated:
        part, *rest = get_args(part)
        limits = _limits_in(rest)
    name = {int: "whole numbers", float: "numbers", str: "texts"}.get(part, "values")
    if part is str and (called := _called(limits)):
        return called.many
    return " ".join(filter(None, (name, _limits(limits))))


def _called(metadata: Iterable) -> Called | None:
    return next((one for one in metadata if isinstance(one, Called)), None)


def _limits_in(annotations: Iterable) -> list:
    return [limit for one in annotations for limit in (one.metadata if isinstance(one, FieldInfo) else [one])]


def _limits(metadata: list) -> str:
    words = []
    for limit in metadata:
        match limit:
            case Gt(bound):
                words.append(f"above {number(bound)}")
            case Ge(bound):
                words.append(f"of {number(bound)} or more")
            case Lt(bound):
                words.append(f"below {number(bound)}")
            case Le(bound):
                words.append(f"of {number(bound)} or less")
    if len(words) == 2 and words[0].startswith("of") and words[1].startswith("of"):
        return f"from {words[0].split()[1]} to {words[1].split()[1]}"
    return " and ".join(words)


def shown(value: Any) -> str:
    plain = value is None or isinstance(value, bool)
    text = json.dumps(value) if plain else " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _path_of(loc: list, keys: Keys) -> list[str]:
    """The key of an error's place, without what pydantic adds for the branches of a union and the items of a list."""
    path: list[str] = []
    for part in loc:
        if path and keys.section(path) is None and not keys.holds_names(path) and path != ["objective"]:
            break
        path.append(str(part))
    return path


def _is_given(path: list[str], values: dict) -> bool:
    """Whether anything is written there: a list that is too short lacks items, and not the key."""
    missing = object()
    return _value_at(path, values, missing) is not missing


def _value_at(path: list[str], values: dict, otherwise: Any) -> Any:
    for part in path:
        if not (isinstance(values, dict) and part in values):
            return otherwise
        values = values[part]
    return values
