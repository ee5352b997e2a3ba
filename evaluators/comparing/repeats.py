"""Several runs of one recipe that differ in their seed, as one entry of a comparison.

- Its numbers are means over the runs. The standard error stays that of the test sample, which all share; the deviation
  over the runs stands apart, as `seeds`.
- What is told of one run (cost, curves, pictures, recipe) is of the first that has results. Draws of few labels are
  those of all runs: the mean is named after the kind of feature that most of them chose.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace

from prelude.evaluators.comparing.comparison import Entry, Repeat
from prelude.evaluators.results import by_frequency


def as_one(entries: Sequence[Entry], repeated: Sequence[Sequence[str]]) -> tuple[list[Entry], list[str]]:
    """The entries with those of a recipe in the place of its first, and what to be told of runs without results.

    repeated: the sources of the runs of each recipe; those of one run stay as they are.
    """
    warnings, merged, of = [], {}, {}
    for entry in entries:
        of.setdefault(entry.source, entry)
    for sources in repeated:
        own = [of[source] for source in sources if source in of]
        if len(own) > 1:
            merged |= dict.fromkeys((entry.source for entry in own), _merged(own[0].name, own))
            failed = [entry for entry in own if entry.problem]
            warnings += [f"{entry.name}: {entry.problem}" for entry in failed] if len(failed) < len(own) else []
    found = {entry.name: entry for entry in (merged.get(entry.source, entry) for entry in entries)}
    return list(found.values()), warnings


def _merged(name: str, entries: Sequence[Entry]) -> Entry:
    judged = [entry for entry in entries if not entry.problem]
    if not judged:
        return replace(entries[0], name=name)
    sides = {}
    for side in ("results", "kept"):
        found = [getattr(entry, side) for entry in judged]
        common = [key for key in found[0] if all(key in results for results in found)]
        sides[side] = {key: _mean_result([results[key] for results in found]) for key in common}
    repeats = [
        Repeat(entry.name, entry.source, {key: found["numbers"] for key, found in entry.results.items()})
        for entry in judged
    ]
    return replace(judged[0], name=name, repeats=repeats, **sides)


def _mean_result(results: Sequence[dict]) -> dict:
    """One result of several by the same evaluator on the same images."""
    first = results[0]
    if len(results) == 1:
        return first
    kinds = [kind for kind in first.get("by_kind", {}) if all(kind in result["by_kind"] for result in results)]
    chosen = dict(first.get("chosen", {}))
    if "features" in chosen:
        chosen["features"] = by_frequency(
            kind for result in results for kind in result["chosen"]["features"].split(", ")
        )
    return {
        **first,
        "numbers": _mean_numbers([result["numbers"] for result in results]),
        "by_kind": {kind: _mean_numbers([result["by_kind"][kind] for result in results]) for kind in kinds},
        "chosen": chosen,
        "right": [each for result in results for each in result.get("right", [])],
        "details": _details(results),
        "num_runs": len(results),
        "warnings": list(dict.fromkeys(text for result in results for text in result.get("warnings", []))),
    }


def _details(results: Sequence[dict]) -> dict:
    """The first's, with the draws of few labels of all."""
    details = dict(results[0].get("details") or {})
    if "by_amount" not in details:
        return details
    joined = {}
    for name, about in details["by_amount"].items():
        of_all = [result["details"]["by_amount"].get(name, {}).get("draws", []) for result in results]
        joined[name] = {**about, "draws": [draw for draws in of_all for draw in draws]}
    return {**details, "by_amount": joined}


def _mean_numbers(found: Sequence[dict]) -> dict:
    return {name: _mean_number([numbers[name] for numbers in found]) for name in found[0]}


def _mean_number(numbers: Sequence[dict]) -> dict:
    """Of the same test images, so that the mean's standard error and interval are no narrower than one's."""
    values = [number["value"] for number in numbers]
    mean = {"value": statistics.mean(values), "seeds": statistics.stdev(values), "num_seeds": len(values)}
    for key in ("se", "spread"):
        if all(key in number for number in numbers):
            mean[key] = statistics.mean(number[key] for number in numbers)
    if all("interval" in number for number in numbers):
        mean["interval"] = [
            statistics.mean(ends) for ends in zip(*(number["interval"] for number in numbers), strict=True)
        ]
    return mean
