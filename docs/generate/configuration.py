"""The page of the configuration: every key with what it takes, its default, its meaning, and recipes that set it."""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prelude.data.counting import counted
from prelude.launch.config_reference import FINE_TUNE, OF_OBJECTIVES, Key, keys_of
from prelude.pretrain.annotations import section_in
from prelude.pretrain.config import Config
from prelude.pretrain.recipes import SHIPPED, read_recipe

INTRODUCTION = """# Configuration

A recipe is one YAML file of these keys; `key.sub=value` on the command line sets one of them, as in
`train.epochs=100 'data.shards=/data/train-*.tar'`. A key that does not exist, a value that cannot be and a setting that
would have no effect are refused before anything is built, in a sentence that says what to write instead. `null` stands
for nothing.

The settings below `objective` are those of the objective that `objective.name` names. This page is made from the typed
models that check a config, so it says what the code takes; `prelude keys` tells the same in a terminal.
"""


def page() -> str:
    used = settings_of_recipes()
    parts = [INTRODUCTION]
    plain = [key for key in keys_of(Config, "") if "." not in key.name and not key.section]
    parts.append(_section("The run", "", plain, used, None))
    for name, field in Config.model_fields.items():
        if model := section_in(field):
            parts.append(_section(f"`{name}`", model.__doc__, list(keys_of(model, f"{name}.")), used, None))
    for objective, model in OF_OBJECTIVES.items():
        title = f"`objective`: {objective}"
        about = "Of fine-tuning, see [evaluators](../evaluators.md#fine-tuning)." if objective == FINE_TUNE else ""
        parts.append(_section(title, about, list(keys_of(model, "objective.")), used, objective))
    return "\n\n".join(parts)


def _section(title: str, about: str | None, keys: list[Key], used: dict, objective: str | None) -> str:
    entries = "\n".join(_entry(key, used.get((objective, key.name), {}), objective) for key in keys)
    return f'## {title}\n\n{" ".join((about or "").split())}\n\n<dl class="keys">\n{entries}\n</dl>'


def _entry(key: Key, used: dict[str, list[str]], objective: str | None) -> str:
    anchor = f"{objective}.{key.name}" if objective else key.name
    default = "; <strong>must be written</strong>" if key.is_required else ""
    if key.default is not None:
        default = f"; default <code>{html.escape(key.default)}</code>"
    return (
        f'<dt id="{anchor}"><code>{key.name}</code> <span class="takes">{html.escape(key.takes)}{default}</span></dt>\n'
        f"<dd>{_text(key.meaning)}{_recipes(used)}</dd>"
    )


def _text(text: str) -> str:
    """A comment as HTML."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def _recipes(used: dict[str, list[str]]) -> str:
    if not used:
        return ""
    count = sum(map(len, used.values()))
    lines = "".join(
        f"<li><code>{html.escape(value)}</code> {html.escape(', '.join(names))}</li>" for value, names in used.items()
    )
    return f"<details><summary>set by {counted(count, 'recipe')}</summary><ul>{lines}</ul></details>"


def settings_of_recipes(folder: Path = SHIPPED) -> dict[tuple[str | None, str], dict[str, list[str]]]:
    """By objective (None: settings that all have) and key: recipes by the value that they set."""
    found: dict[tuple[str | None, str], dict[str, list[str]]] = {}
    for path in sorted(folder.glob("*.yaml")):
        values = read_recipe(path)
        objective = (values.get("objective") or {}).get("name", FINE_TUNE)
        for key, value in _leaves(values, ""):
            of = objective if key.startswith("objective.") and key != "objective.name" else None
            found.setdefault((of, key), {}).setdefault(json.dumps(value), []).append(path.stem)
    return {key: dict(sorted(used.items(), key=lambda one: -len(one[1]))) for key, used in found.items()}


def _leaves(values: dict, above: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = f"{above}{name}"
        if isinstance(value, dict) and key not in _WHOLE:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


_WHOLE = {key.name for key in keys_of(Config, "") if not key.section and key.name != "objective"}
