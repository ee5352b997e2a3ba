"""What a door says, as a person in Python would write it: `--test SHARDS` is `test=SHARDS`, and
`optimizer.warmup_epochs=0.5` is `warmup_epochs=0.5`, or `**{"optimizer.momentum": 0.9}` where the last part alone does
not say which is meant. What Python cannot be given is left as it is."""

import argparse
import re
from collections.abc import Iterable

from prelude.pretrain.config_keys import Keys

_VALUE = r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|\{[^}]*\}|[^\s,;()]+?(?=[.,;:)?]*(?:\s|$))"
_SETTING = re.compile(rf"(?<![\w.`])([a-z][\w]*(?:\.\w+)+)=({_VALUE})")
_ALONE = re.compile(r"(?:(?<=did you mean )|^)([a-z]\w*(?:\.\w+)+)")
_OPTION = re.compile(
    r"(?<![\w-])--([a-z][a-z-]*)((?: -?\d[\w.]*(?![\w.]*[a-z/]))+| '[^']*'| [A-Z][A-Z,_]*\b| [a-z]\w*)?"
)
_CONSTANTS = {"true": "True", "false": "False", "null": "None"}


def of_settings(sentence: str, keys: Keys) -> str:
    """The keys of a config as keyword arguments of `prelude.pretrain`."""
    every = set(keys.all())

    def setting(found: re.Match) -> str:
        key, value = found.groups()
        if key not in every:
            return found[0]
        name = short_name(key, every)
        return f"{name}={_in_python(value)}" if name else f'**{{"{key}": {_in_python(value)}}}'

    sentence = _SETTING.sub(setting, sentence)
    return _ALONE.sub(lambda found: short_name(found[1], every) or found[1], sentence)


def keys_ending_in(name: str, every: Iterable[str]) -> list[str]:
    """Those that a short name may stand for. `shards` is data.shards, not data.volumes.shards."""
    found = [key for key in every if key.rpartition(".")[2] == name]
    return [key for key in found if key.count(".") == 1] or found


def short_name(key: str, every: Iterable[str]) -> str:
    """By which a key can be told from all others; "" where it cannot."""
    name = key.rpartition(".")[2]
    return name if keys_ending_in(name, every) == [key] else ""


def of_options(sentence: str, parser: argparse.ArgumentParser) -> str:
    """The options of a door as keyword arguments."""
    by_name = {option[2:]: action for action in parser._actions for option in action.option_strings}

    def option(found: re.Match) -> str:
        action, value = by_name.get(found[1]), found[2] or ""
        if action is None:
            return found[0]
        name, words = action.dest, value.split()
        if action.nargs == 0:
            return f"{name}=True{value}"
        if not value or (value[1].islower() and words[0] not in (action.choices or getattr(action, "offered", ()))):
            return f"{name}{value}"
        if len(words) > 1 and value[1] != "'":
            return f"{name}=[{', '.join(words)}]"
        return f"{name}={_in_python(value[1:])}"

    return _OPTION.sub(option, sentence.removeprefix("argument "))


def _in_python(value: str) -> str:
    """A value as a command line has it. What stands for one, in capitals, is no text."""
    if value in _CONSTANTS:
        return _CONSTANTS[value]
    plain = value[0] in "'\"[{" or re.fullmatch(r"-?[\d.]+(e-?\d+)?|-?inf|nan|[A-Z_]+|\.\.\.", value)
    return value if plain else f'"{value}"'
