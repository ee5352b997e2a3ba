"""A comparison as one HTML file that needs nothing beside itself.

- No script, no request: style and charts are inline, pictures are data. A policy in the page forbids the rest.
- Whatever comes from outside (names, recipes, captions, problems) is escaped.
- Readable at 360 CSS pixels and up, in the dark, and on paper.
"""

import base64
import json
from functools import cache

import jinja2
import yaml

from prelude.data.counting import size
from prelude.evaluators.comparing.comparison import Comparison, Entry, Picture
from prelude.evaluators.comparing.headline import evaluator_name, gain, headline, leads, number, number_name
from prelude.evaluators.comparing.label_table import positives
from prelude.evaluators.comparing.paired import sentences, unlike_encoders
from prelude.evaluators.comparing.report import charts, figures, words
from prelude.evaluators.comparing.retention import SIDES, gone_on, seen
from prelude.evaluators.comparing.table import CHANGES, SEEDS, columns_of_changes

GROUPS = {
    "pretrained": "Pretrained",
    "untouched": "What they started from, untouched",
    "untrained": "Same architecture, untrained",
    "floor": "Floors",
}
TEMPLATE = "page.html.j2"


def page(comparison: Comparison) -> str:
    """The whole file."""
    return _template().render(
        comparison=comparison,
        about_changes=CHANGES,
        about_seeds=SEEDS if any(entry.repeats for entry in comparison.entries) else "",
        told_apart=sentences(comparison),
        summary=words.summary(comparison),
        sides=[_side(seen(comparison, side)) for side in (SIDES if comparison.old_data else SIDES[:1])],
        changes=_changes(comparison),
        going_on=figures.going_on(comparison),
        styles=figures.styles(comparison),
        accuracy=figures.accuracy(comparison),
        floor=next((entry.name for entry in comparison.entries if entry.kind == "floor" and entry.results), None),
        few_labels=figures.few_labels(comparison),
        losses=figures.losses(comparison),
        shared_curves=figures.shared_curves(comparison),
        own_curves=figures.own_curves(comparison),
        against_time=figures.against_time(comparison),
        recipes=_recipes(comparison),
        protocols=_protocols(comparison),
        warnings=_warnings(comparison),
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("prelude.evaluators.comparing.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "data_uri": _data_uri,
        "moment": words.moment,
        "duration": words.duration,
        "size": size,
        "count": words.count,
        "compact": _compact,
        "swatch": charts.swatch,
    }
    return environment.get_template(TEMPLATE)


def _side(comparison: Comparison) -> dict:
    """The table of everybody on the new images, or on the old."""
    return {
        "columns": [_column(comparison, evaluator) for evaluator in comparison.evaluators],
        "groups": _groups(comparison),
        "all_numbers": _all_numbers(comparison),
    }


def _changes(comparison: Comparison) -> dict:
    """Columns' titles, and a row of changes for each that has gone on from weights."""
    columns = columns_of_changes(comparison)
    parts = [title.rsplit(", ", 2) for title, _ in columns]  # evaluator, number, images
    titles = [{"name": part[0], "rest": ", ".join(part[1:]), "label": f"{part[0]}, {part[-1]}"} for part in parts]
    rows = [(entry, [found[i] for _, found in columns]) for i, entry in enumerate(gone_on(comparison))]
    return {"titles": titles, "rows": rows}


def _column(comparison: Comparison, evaluator: str) -> dict:
    found = next(filter(None, (headline(entry, evaluator) for entry in comparison.entries)), None)
    return {
        "title": evaluator_name(evaluator),
        "number": number_name(evaluator, found.number) if found else "",
    }


def _groups(comparison: Comparison) -> list[tuple[str, list[dict]]]:
    """(title, rows) of the table, in the order of the entries."""

    def row(entry: Entry) -> dict:
        cells = [
            {
                "headline": headline(entry, evaluator),
                "gain": gain(entry, evaluator, comparison),
                "best": leads(entry, evaluator, comparison),
            }
            for evaluator in comparison.evaluators
        ]
        return {"entry": entry, "cells": cells}

    rows = {kind: [row(entry) for entry in comparison.entries if entry.kind == kind] for kind in GROUPS}
    return [(GROUPS[kind], found) for kind, found in rows.items() if found]


def _all_numbers(comparison: Comparison) -> list[tuple[str, list[str], list[tuple[str, list]]]]:
    """(evaluator, what its numbers are, rows of an encoder's name and each number or None)."""
    tables = []
    for evaluator in comparison.evaluators:
        found = {entry.name: entry.results.get(evaluator) or {} for entry in comparison.entries}
        found = {name: result for name, result in found.items() if result.get("numbers")}
        keys = list(dict.fromkeys(key for result in found.values() for key in result["numbers"]))
        rows = [
            (name, [number(key, result) if key in result["numbers"] else None for key in keys])
            for name, result in found.items()
        ]
        if rows:
            titles = [number_name(evaluator, key) for key in keys]
            tables.append((evaluator_name(evaluator), titles, rows))
    return tables


def _protocols(comparison: Comparison) -> list[tuple[str, str, dict]]:
    """(evaluator, what it does, what was fixed beforehand) without kinds of feature, which differ by encoder."""
    protocols = []
    for evaluator in comparison.evaluators:
        found = next((entry.results[evaluator] for entry in comparison.entries if entry.results.get(evaluator)), {})
        fixed = {key: value for key, value in found.get("recipe", {}).items() if key != "features"}
        protocols.append((evaluator_name(evaluator), words.ABOUT.get(evaluator, ""), fixed))
    return protocols


def _warnings(comparison: Comparison) -> list[str]:
    findings = [entry.results["multilabel"] for entry in comparison.entries if "multilabel" in entry.results]
    found = [*unlike_encoders(comparison), *comparison.warnings, *map(positives, findings[:1])]
    for entry in comparison.entries:
        for place, results in (("", entry.results), (", old images", entry.kept)):
            for evaluator, result in results.items():
                name = f"{entry.name}, {evaluator_name(evaluator)}{place}"
                found += [f"{name}: {warning}" for warning in result.get("warnings") or []]
    return list(dict.fromkeys(found))


def _recipes(comparison: Comparison) -> list[dict]:
    """Each recipe, with the settings in which it differs from the first one's."""
    shown = [entry for entry in comparison.entries if entry.recipe]
    settings = [_settings(entry.recipe) for entry in shown]
    found = []
    for entry, own in zip(shown, settings, strict=True):
        first = settings[0]
        keys = [key for key in dict.fromkeys([*first, *own]) if first.get(key) != own.get(key)] if own and first else []
        differs = [(key, own.get(key, "–")) for key in keys if key != "run_dir" and key in own]
        found.append({"entry": entry, "differs": differs, "first": shown[0].name})
    return found


def _settings(recipe: str) -> dict[str, str]:
    """Dotted keys to values; empty for what is no mapping."""
    try:
        tree = yaml.safe_load(recipe)
    except yaml.YAMLError:
        return {}
    flat: dict[str, str] = {}

    def visit(node, path: tuple) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                visit(value, (*path, str(key)))
        elif path:
            flat[".".join(path)] = _compact(node)

    visit(tree if isinstance(tree, dict) else {}, ())
    return flat


def _compact(value) -> str:
    """A setting on one line."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return ", ".join(f"{key} {_compact(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(_compact(each) for each in value)
    return json.dumps(value, default=str)


def _data_uri(picture: Picture) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.png).decode()
