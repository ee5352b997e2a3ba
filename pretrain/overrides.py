"""`key.sub=value` on the command line: where a value goes, and what its text means there.

- A key that takes text has it as it stands, with ` #`, `: ` and leading digits; in quotes, without them.
- Any other value is a number, true, false, null, a [list] or a {mapping}, and text where it is none of these.
- A number as a part of the key is a place in a list: `optimizer.betas.0=0.8`.
"""

import json
from collections.abc import Sequence
from typing import Any

from pydantic.fields import FieldInfo

from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.pretrain import recipe_yaml
from prelude.pretrain.annotations import takes, takes_texts
from prelude.pretrain.config_keys import Keys

_OF_A_KIND = {("encoder",), ("objective",), ("optimizer",)}  # sections whose `name` says what their settings are of


def apply(values: dict, override: str, keys: Keys) -> None:
    """Sets one value. Raises UserError."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UserError(f"{override!r} is not an override; write key.sub=value, such as train.epochs=10.")
    field = keys.field(path)
    place: dict | list = values
    for depth, part in enumerate(path[:-1]):
        place = _below(place, part, path[: depth + 1], override, keys)
    if isinstance(place, list):
        place[_index(place, path, override)] = value_of(text, None)
    else:
        value = value_of(text, field)
        there = place.get(path[-1])
        if isinstance(value, dict) and keys.section(path) and there and not is_another_kind(path, value, there):
            raise UserError(_of_a_section(key.strip(), value, there))
        place[path[-1]] = value


def is_another_kind(path: Sequence[str], value: dict, there: Any) -> bool:
    """Whether a section names another objective, optimizer or encoder, of which the settings there say nothing. That of
    a tracker has a name too, which is its run's."""
    if tuple(path) not in _OF_A_KIND:
        return False
    return isinstance(there, dict) and "name" in value and value["name"] != there.get("name")


def _of_a_section(key: str, value: dict, there: Any) -> str:
    lost = ", ".join(str(name) for name in there if name not in value) if isinstance(there, dict) else ""
    written = {name: one if isinstance(one, str) else json.dumps(one) for name, one in value.items()}
    settings = " ".join(f"{key}.{name}={one}" for name, one in written.items()) or f"{key}.KEY=VALUE"
    return f"{key}=... would replace the whole section{f', and lose {lost}' if lost else ''}; write {settings}."


def value_of(text: str, field: FieldInfo | None) -> Any:
    """What the text means for a key; `field` is None where that is not known."""
    text = text.strip()
    if text[:1] in ("'", '"'):
        return _parsed(text, str, text)
    annotation = field.annotation if field else Any
    texts = takes_texts(annotation)
    if text.startswith("[") and (texts or not takes(annotation, str)):
        return _parsed(text, list, text, texts)
    if text.startswith("{") and not (takes(annotation, str) and not takes(annotation, dict)):
        return _parsed(text, dict, text)
    if takes(annotation, str):
        return None if text in ("null", "~") and takes(annotation, type(None)) else text
    return _parsed(text, (bool, int, float, type(None)), text)


def _parsed(text: str, kinds, otherwise: str, texts: bool = False) -> Any:
    """The YAML value of the text where it is of these kinds; a pattern that starts with a brace is text."""
    try:
        value = (recipe_yaml.load_texts if texts else recipe_yaml.load)(text)
    except recipe_yaml.Mistake:
        return otherwise
    return value if isinstance(value, kinds) else otherwise


def _below(place: dict | list, part: str, path: list[str], override: str, keys: Keys) -> dict | list:
    """What is at the next part of a key: a section, made where there is none yet, or a list."""
    if isinstance(place, list):
        found = place[_index(place, path, override)]
    else:
        if place.get(part) is None:
            place[part] = _default(keys.field(path))
        elif isinstance(place[part], tuple):
            place[part] = list(place[part])
        found = place[part]
    if not isinstance(found, (dict, list)):
        raise UserError(f"{override!r} sets a key below {part!r}, which is a plain value; write {'.'.join(path)}=...")
    return found


def _default(field: FieldInfo | None) -> dict | list:
    """A list's own default, so that one value of it can be changed; else a new section."""
    default = field.default if field else None
    return list(default) if isinstance(default, (tuple, list)) else {}


def _index(place: list, path: list[str], override: str) -> int:
    if not path[-1].isdecimal() or int(path[-1]) >= len(place):
        key = ".".join(path[:-1])
        raise UserError(
            f"{override!r} names none of the {counted(len(place), 'value')} of {key}, numbered from 0; write "
            f"{key}.0=..., or "
            f"the whole list, {key}={place}."
        )
    return int(path[-1])
