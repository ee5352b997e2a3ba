"""YAML as people mean it in a recipe: numbers, true, false, null, lists and mappings; all else is text.

- `1e-3` is a number, and `yes`, `0755`, `12:30` and `2026-01-31` are text, which YAML 1.1 takes for other things.
- A key that is written twice is refused: the first value would be lost without a word.
"""

import re
from typing import Any

import yaml

_NULL = "tag:yaml.org,2002:null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]
_BOOL = "tag:yaml.org,2002:bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")
_INT = "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)"), list("-+0123456789")
_FLOAT = (
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.?(inf|Inf|INF)|\.?(nan|NaN|NAN)"),
    list("-+.0123456789inIN"),
)
_MERGE = "tag:yaml.org,2002:merge", re.compile(r"<<"), ["<"]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.tag != _MERGE[0] and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_float(self, node: yaml.ScalarNode) -> float:
        return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


class _TextLoader(_Loader):
    """Every scalar is text."""

    yaml_implicit_resolvers: dict = {}


class _Dumper(yaml.SafeDumper):
    """Quotes what either reading would take for something else than text."""

    yaml_implicit_resolvers = {first: list(found) for first, found in yaml.SafeDumper.yaml_implicit_resolvers.items()}


for tag, pattern, first in (_NULL, _BOOL, _INT, _FLOAT, _MERGE):
    whole = re.compile(rf"^(?:{pattern.pattern})$")
    _Loader.add_implicit_resolver(tag, whole, first)
    _Dumper.add_implicit_resolver(tag, whole, first)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_float)


def load(text: str) -> Any:
    """Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)


def load_texts(text: str) -> Any:
    """Lists and mappings of nothing but text. Raises yaml.YAMLError."""
    return yaml.load(text, _TextLoader)


def dump(values: dict) -> str:
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)
