"""YAML as people mean it in a recipe: numbers, true, false, null, lists and mappings; all else is text.

- `1e-3` is a number, and `yes`, `0755`, `12:30` and `2026-01-31` are text, which YAML 1.1 takes for other things.
- A key that is written twice is refused: the first value would be lost without a word.
- What is wrong is told with its line and column; whose text it is, says who reads it.
"""

import json
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
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")  # names that are no UTF-8 among them
_MERGE = "tag:yaml.org,2002:merge", re.compile(r"<<"), ["<"]


class Mistake(Exception):
    """Text that is no YAML: `place` is `line 3, column 5`, and `problem` what stands there, without a full stop."""

    def __init__(self, place: str, problem: str):
        super().__init__(f"{place}: {problem}")
        self.place, self.problem = place, problem


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, AttributeError, KeyError):
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise yaml.constructor.ConstructorError(
                None, None, f"{tag} is not what stands there", node.start_mark
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
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
    """Raises Mistake."""
    return _loaded(text, _Loader)


def load_texts(text: str) -> Any:
    """Lists and mappings of nothing but text. Raises Mistake."""
    return _loaded(text, _TextLoader)


def _loaded(text: str, loader: type[yaml.SafeLoader]) -> Any:
    try:
        return yaml.load(text, loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise Mistake(_place(mark.line, mark.column) if mark else "some line", _problem(error)) from None
    except yaml.reader.ReaderError as error:  # which counts characters alone
        before = text[: error.position]
        place = _place(before.count("\n"), len(before) - before.rfind("\n") - 1)
        raise Mistake(place, f"the character U+{ord(text[error.position]):04X} may not stand there") from None
    except RecursionError:
        raise Mistake("some line", "brackets lie in one another too deep") from None


def _place(line: int, column: int) -> str:
    return f"line {line + 1}, column {column + 1}"


def _problem(error: yaml.MarkedYAMLError) -> str:
    """What was found, and while what was read, without the names that the reader gives to texts."""
    if "could not determine a constructor" in (error.problem or ""):
        return f"{error.problem.rpartition(' ')[2]} is no tag that a recipe may have"
    text, begun = error.problem or error.context, error.context_mark
    if error.context and begun:
        text += f", {error.context} that begins in {_place(begun.line, begun.column)}"
    return " ".join(text.split())


def written(value: Any) -> str:
    """A value of lists, texts and numbers as the text after `key=`, which `load` reads as the same: JSON, with a `\\u`
    for what YAML does not take as it stands alone. Of the two for one letter beyond U+FFFF, YAML would make two."""
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def dump(values: dict) -> str:
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)
