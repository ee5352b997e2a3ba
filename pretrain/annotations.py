"""What the type of a key says: which kinds of value it takes."""

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def section_in(field: FieldInfo) -> type[BaseModel] | None:
    return next((part for part in alternatives(field.annotation) if is_section(part)), None)


def section_by_name(field: FieldInfo) -> type[BaseModel] | None:
    """Of a mapping from any name to a section."""
    mappings = (get_args(part) for part in alternatives(field.annotation) if kind_of(part) is dict)
    return next((inside[1] for inside in mappings if len(inside) == 2 and is_section(inside[1])), None)


def is_section(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, BaseModel)


def alternatives(annotation: Any) -> tuple:
    """Of a union, each; else the annotation itself. `Annotated` is kept, for its limits."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def takes(annotation: Any, kind: type) -> bool:
    """Whether a value of this kind (str, list, dict, bool) may be written; a Literal takes no text but its own."""
    return any(kind_of(part) is kind for part in alternatives(annotation))


def takes_texts(annotation: Any) -> bool:
    """Whether a list of nothing but text may be written."""
    lists = (_plain(part) for part in alternatives(annotation) if kind_of(part) is list)
    return any(kind_of(item) is str for part in lists for item in get_args(part))


def _plain(part: Any) -> Any:
    """Without the limits that `Annotated` adds."""
    return get_args(part)[0] if get_origin(part) is Annotated else part


def kind_of(part: Any) -> type | None:
    """Of values: a tuple is written as a list, and a Literal has no kind but its own values."""
    origin = get_origin(part)
    if origin is Annotated:
        return kind_of(get_args(part)[0])
    if origin is Literal:
        return None
    kind = origin or part
    return list if kind is tuple else kind
