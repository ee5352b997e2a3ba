"""Which charts a comparison's page shows, and what is drawn in each."""

from collections.abc import Iterator
from dataclasses import dataclass

from markupsafe import Markup

from prelude.evaluators.comparing.comparison import Comparison, Curve, Entry
from prelude.evaluators.comparing.headline import (
    evaluator_name,
    headline,
    number,
    number_name,
    pretrained,
    untrained_value,
)
from prelude.evaluators.comparing.report import charts
from prelude.evaluators.comparing.report.charts import Bar, Line, Point, Style
from prelude.evaluators.comparing.retention import gone_on
from prelude.evaluators.comparing.table import columns_of_changes
from prelude.pretrain.feature_health import OF_VOLUMES

_HEALTH = {  # signs of collapse, which every objective logs under the same name: (title, axis, caption)
    "feature_std": (
        "Spread of features", "standard deviation", "Over a batch: towards 0 all images look alike to the encoder."
    ),
    "feature_rank_share": (
        "Effective rank of features", "share of what is attainable", "Low where features use few of their directions."
    ),
    "feature_cosine": (
        "Likeness of features", "cosine", "Mean over pairs of different images: 1 where all look alike."
    ),
    "teacher_cosine": ("Teacher and student", "cosine", "Of what student and teacher make of the same patches."),
    "trivial_loss": ("Trivial loss", "loss", "Reached by ignoring the image: a loss that stays there learns nothing."),
}  # fmt: skip
HEALTH = _HEALTH | {OF_VOLUMES + name: (f"{t}, of volumes", axis, said) for name, (t, axis, said) in _HEALTH.items()}
_ONLINE = "Judged while pretraining, on a small labelled subset."
ONLINE = {
    "online/knn": ("Online k-NN", "top-1 %", _ONLINE),
    "online/linear": ("Online linear probe", "top-1 %", _ONLINE),
    "online/feature_rank_share": ("Online effective rank", "share of what is attainable", _ONLINE),
}
MAX_POINTS = 240  # of a line: more cannot be told apart, and would make the page heavy
SMOOTH_FROM, SMOOTH_SHARE = 30, 0.04  # points from which on a mean over this share of them is drawn


@dataclass(frozen=True)
class Figure:
    title: str
    svg: Markup
    caption: str = ""
    shown: tuple[str, ...] = ()  # names of the entries in it, where a legend is wanted


def styles(comparison: Comparison) -> dict[str, Style]:
    """By entry's name: a colour for each objective, and what tells entries of one objective apart."""
    colours: dict[str, int] = {}
    used: dict[str, int] = {}
    found = {}
    for entry in comparison.entries:
        if entry.kind != "pretrained" or entry.objective is None:
            found[entry.name] = Style(None, used.get("", 0))
            used[""] = used.get("", 0) + 1
            continue
        colour = colours.setdefault(entry.objective, len(colours))
        found[entry.name] = Style(colour, used.get(entry.objective, 0))
        used[entry.objective] = used.get(entry.objective, 0) + 1
    return found


def accuracy(comparison: Comparison) -> list[Figure]:
    """Bars for each evaluator: pretrained encoders, best first, then the floors."""
    style = styles(comparison)
    figures = []
    for evaluator in comparison.evaluators:
        judged = [(entry, h) for entry in comparison.entries if (h := headline(entry, evaluator))]
        marked = {entry.untrained for entry, _ in judged if entry.kind in ("pretrained", "untouched")}
        shown = [(entry, h) for entry, h in judged if entry.kind != "untrained" or entry.name not in marked]
        if not shown:
            continue
        order = {"pretrained": 0, "untouched": 1, "untrained": 2, "floor": 3}
        shown.sort(key=lambda pair: (order[pair[0].kind], -pair[1].value))
        rows = []
        for entry, found in shown:
            mark = untrained_value(entry, evaluator, comparison)
            own = style[entry.name] if entry.kind == "pretrained" else Style(None)
            rows.append(Bar(entry.name, found.value, *found.bar, found.text, own, mark))
        floors = [(entry.name, h.value) for entry, h in judged if entry.kind == "floor"]
        title = evaluator_name(evaluator)
        axis = number_name(evaluator, shown[0][1].number)
        figures.append(Figure(title, charts.bars(rows, title, axis, floors[0] if floors else None)))
    return figures


def going_on(comparison: Comparison) -> list[Figure]:
    """Bars of those that have gone on from weights, for each evaluator on the new and on the old images."""
    style, entries, found = styles(comparison), gone_on(comparison), []
    for title, changes in columns_of_changes(comparison):
        rows = [
            Bar(
                entry.name, change.after.value, *change.after.bar, f"{change.text}, {change.verdict}",
                style[entry.name], change.before.value, "untouched",
            )
            for entry, change in zip(entries, changes, strict=True)
            if change
        ]  # fmt: skip
        if rows:
            name, axis, images = title.rsplit(", ", 2)
            found.append(Figure(f"{name}, {images}", charts.bars(rows, title, axis)))
    return found


def losses(comparison: Comparison) -> list[Figure]:
    """One chart a run."""
    style, found = styles(comparison), []
    for entry, curve in _curves(comparison):
        if curve.name == "loss":
            svg = charts.lines([_line(entry.name, curve, style[entry.name])], f"Loss of {entry.name}", "step", "loss")
            found.append(Figure(entry.name, svg))
    return found


def shared_curves(comparison: Comparison) -> list[Figure]:
    """Signs of collapse and online evaluations: one chart for each, with all runs in it."""
    names = list(dict.fromkeys(curve.name for _, curve in _curves(comparison) if _is_shared(curve.name)))
    names.sort(key=lambda name: (list(HEALTH).index(name) if name in HEALTH else len(HEALTH), name))
    style, found = styles(comparison), []
    for name in names:
        drawn = [_line(e.name, curve, style[e.name]) for e, curve in _curves(comparison) if curve.name == name]
        title, axis, caption = HEALTH.get(name) or ONLINE[name]
        svg = charts.lines([_without_raw(line) for line in drawn], title, "step", axis, marks=name not in HEALTH)
        found.append(Figure(title, svg, caption, tuple(line.name for line in drawn)))
    return found


def own_curves(comparison: Comparison) -> list[tuple[str, list[Figure]]]:
    """What only the objective itself logs, run by run."""
    style, found = styles(comparison), {}
    for entry, curve in _curves(comparison):
        if curve.name != "loss" and not _is_shared(curve.name) and not curve.name.startswith("online/"):
            line = _line(entry.name, curve, style[entry.name])
            title = curve.name.replace("_", " ")
            svg = charts.lines([line], f"{title} of {entry.name}", "step", "")
            found.setdefault(entry.name, []).append(Figure(title, svg))
    return list(found.items())


def few_labels(comparison: Comparison) -> Figure | None:
    """Accuracy of a linear head against the number of labels, where there are results of few-shot."""
    style, drawn = styles(comparison), []
    for entry in comparison.entries:
        if entry.kind == "untrained":
            continue
        result = entry.results.get("fewshot") or {}
        amounts = (result.get("details") or {}).get("by_amount") or {}
        places = [
            (amount["num_labels"], number(name, result))
            for name, amount in amounts.items()
            if name in result.get("numbers", {}) and "num_labels" in amount
        ]
        places.sort(key=lambda place: place[0])
        if len(places) > 1:
            xs, found = zip(*places, strict=True)
            errors = [n.bar for n in found]
            drawn.append(Line(entry.name, xs, [n.value for n in found], style[entry.name], errors=errors))
    if not drawn:
        return None
    title = "Accuracy with few labels"
    svg = charts.lines(drawn, title, "labelled images (log scale)", "top-1 %", log_x=True, marks=True)
    return Figure(title, svg, shown=tuple(line.name for line in drawn))


def against_time(comparison: Comparison) -> list[Figure]:
    """Each evaluator's number against the time that pretraining took, where two runs or more recorded it."""
    style, found = styles(comparison), []
    for evaluator in comparison.evaluators:
        runs = [(e, h) for e in pretrained(comparison) if e.cost and (h := headline(e, evaluator))]
        if len(runs) < 2:
            continue
        longest = max(entry.cost.seconds for entry, _ in runs)
        unit, factor = ("s", 1) if longest < 180 else ("min", 60) if longest < 3 * 3600 else ("h", 3600)
        points = [
            Point(
                entry.name, entry.cost.seconds / factor, h.value, *h.bar, style[entry.name],
                f"{h.text} after {entry.cost.seconds / factor:.3g} {unit}",
            )
            for entry, h in runs
        ]  # fmt: skip
        axis = number_name(evaluator, runs[0][1].number)
        title = evaluator_name(evaluator)
        found.append(Figure(title, charts.scatter(points, f"{title} against time", f"pretraining, {unit}", axis)))
    return found


def _curves(comparison: Comparison) -> Iterator[tuple[Entry, Curve]]:
    return ((entry, curve) for entry in comparison.entries for curve in entry.curves if curve.steps)


def _is_shared(name: str) -> bool:
    return name in HEALTH or name in ONLINE


def _line(name: str, curve: Curve, style: Style) -> Line:
    """The curve itself, or, of a long one, running means over the curve. Of online evaluations each place is one that
    was measured, the last among them."""
    bucket = -(-len(curve.steps) // MAX_POINTS)
    if curve.name in ONLINE:
        return Line(name, curve.steps[::-bucket][::-1], curve.values[::-bucket][::-1], style)
    xs = curve.steps[bucket - 1 :: bucket]
    values = [_mean(curve.values[i * bucket : (i + 1) * bucket]) for i in range(len(xs))]
    if len(values) < SMOOTH_FROM:
        return Line(name, xs, values, style)
    reach = max(round(SMOOTH_SHARE * len(values) / 2), 1)
    smooth = [_mean(values[max(i - reach, 0) : i + reach + 1]) for i in range(len(values))]
    return Line(name, xs, smooth, style, raw=values)


def _without_raw(line: Line) -> Line:
    return Line(line.name, line.xs, line.ys, line.style)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
