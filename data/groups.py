"""Which group a sample is of (a patient, a place, a track): what its field or member says, as it is written but
for spaces around it."""

import json
from collections.abc import Callable
from typing import Any

from prelude.data.errors import UserError
from prelude.data.labels import JSON, TEXTS, field_of, label_name
from prelude.data.members import label_members
from prelude.data.shards import ShardIndex


def group_reader(group: str, said: str) -> Callable[[bytes], Any]:
    """From a member's bytes to what they say of the group, numbers as the text that they are written as; None where
    that cannot be read. said: how the group was asked for, in a message. Raises UserError for what names no group."""
    extension, _, field = group.partition(":")
    kind = extension.rpartition(".")[2]
    if not (kind in JSON and (field or ":" not in group) or kind in TEXTS and ":" not in group):
        raise UserError(f"{said} names no group; write json:FIELD, or the extension of a text.")
    as_written = {"parse_int": str, "parse_float": str, "parse_constant": lambda name: None}  # NaN and its like

    def written(content: bytes) -> Any:
        try:
            raw = json.loads(content, **as_written) if kind in JSON else content.decode()
        except (ValueError, RecursionError):
            return None
        return field_of(raw, field) if field else raw

    return written


def group_names(index: ShardIndex, group: str) -> list[str | None]:
    """Of each sample, what tells its group from others; None where there is nothing, null, or an empty text. Raises
    UserError for what names no group."""
    index, written = index.with_label(group), group_reader(label_name(group), repr(group))
    if not len(index.labels):
        return [None] * index.num_samples
    return [None if content is None else _name(written(content)) for content in label_members(index)]


def _name(said: Any) -> str | None:
    if isinstance(said, str):
        return said.strip() or None
    return json.dumps(said) if said is False or (said and not isinstance(said, dict)) else None
