"""Charts as SVG that is put into a page: readable at 360 CSS pixels and at any width above.

- Colours are classes (`c0` .. `c6`, `plain`), so that a page decides on them, in the dark and on paper too.
- What colour tells, shape tells as well: several lines of one colour differ in dashes and marks.
- Hovering names every mark and its number; `aria-label` says what a chart shows.
- Elements are built, never pasted together, so that no name can break out of its text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from xml.etree import ElementTree

from markupsafe import Markup

from prelude.evaluators.comparing.report.scales import Scale, fitting, linear, logarithmic, texts

WIDTH = 360
NUM_COLOURS = 7
DASHES = ("", "7 3", "2 3", "9 3 2 3")
ROW, BAR_TOP, BAR_HEIGHT = 36, 18, 9  # of a row of bars: name and number above, the bar below
INSET = 6  # room beside bars for half a tick's text
LEFT, TOP, RIGHT, BOTTOM, HEIGHT = 44, 26, 350, 188, 226  # of a chart with two axes
TEXT = 6.6  # about the width of a letter of 12 px


@dataclass(frozen=True)
class Style:
    colour: int | None  # None: plain, for what was not trained
    variant: int = 0  # dashes and marks, among those of one colour

    @property
    def css(self) -> str:
        return "plain" if self.colour is None else f"c{self.colour % NUM_COLOURS}"


@dataclass(frozen=True)
class Bar:
    name: str
    value: float
    low: float  # ends of the error bar
    high: float
    text: str  # the number, written out
    style: Style
    mark: float | None = None  # where it comes from: the same encoder untrained, or untouched
    marked: str = "untrained"  # what that is


@dataclass(frozen=True)
class Line:
    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: Style
    raw: Sequence[float] = ()  # drawn faintly behind, where ys is a mean of it
    errors: Sequence[tuple[float, float]] = ()  # ends of an error bar at each place


@dataclass(frozen=True)
class Point:
    name: str
    x: float
    y: float
    low: float
    high: float
    style: Style
    text: str  # the numbers, written out


def bars(rows: Sequence[Bar], title: str, axis: str, floor: tuple[str, float] | None = None) -> Markup:
    """Horizontal bars from 0 on, with error bars. floor: name and value of a line across all of them."""
    values = [edge for row in rows for edge in (row.low, row.high, row.value, row.mark) if edge is not None]
    scale = linear([*values, *([floor[1]] if floor else [])], INSET, WIDTH - INSET, zero=True, tight=True)
    bottom = 8 + ROW * len(rows)
    root = _svg(WIDTH, bottom + 38, f"{title}: " + ", ".join(f"{row.name} {row.text}" for row in rows))
    for tick in scale.ticks:
        _line(root, scale(tick), 8, scale(tick), bottom, "grid")
    if floor:
        line = _line(root, scale(floor[1]), 8, scale(floor[1]), bottom, "floor")
        _title(line, f"{floor[0]}: {floor[1]:.1f}")
    for i, row in enumerate(rows):
        _bar(root, row, scale, 8 + ROW * i)
    _ticks_below(root, scale, bottom, axis)
    return _markup(root)


def lines(
    series: Sequence[Line], title: str, x_axis: str, y_axis: str, *, log_x: bool = False, marks: bool = False
) -> Markup:
    """Lines over two axes; the upright one is logarithmic where the values span a large ratio, and says so.

    log_x: for a few amounts, which then are the ticks of a logarithmic axis.
    """
    series = [_finite(line) for line in series]
    xs = [x for line in series for x in line.xs]
    ys = [y for line in series for y in (*line.ys, *line.raw, *(end for pair in line.errors for end in pair))]
    across = linear(xs, LEFT, RIGHT, zero=True, tight=True)
    if log_x and xs:
        across = replace(logarithmic(xs, LEFT, RIGHT), ticks=tuple(sorted(set(xs))))
    upright = fitting(ys, BOTTOM, TOP)
    root = _svg(WIDTH, HEIGHT, f"{title}: " + ", ".join(f"{line.name} {_ends(line)}" for line in series))
    _axes(root, across, upright, x_axis, y_axis)
    for line in series:
        group = ElementTree.SubElement(root, "g", {"class": line.style.css})
        _title(group, f"{line.name}: {_ends(line)}")
        if line.raw:
            _path(group, line.xs, line.raw, across, upright, {"class": "raw"})
        _path(group, line.xs, line.ys, across, upright, {"class": "line", **_dash(line.style)})
        for x, (low, high) in zip(line.xs, line.errors, strict=False):
            _line(group, across(x), upright(low), across(x), upright(high), "error")
        if marks:
            for x, y in zip(line.xs, line.ys, strict=True):
                _title(_mark(group, across(x), upright(y), line.style), f"{line.name}: {y:.4g} at {x:g}")
    return _markup(root)


def scatter(points: Sequence[Point], title: str, x_axis: str, y_axis: str) -> Markup:
    """Named points with upright error bars."""
    across = linear([point.x for point in points], LEFT, RIGHT, zero=True)
    upright = linear([edge for point in points for edge in (point.low, point.high)], BOTTOM, TOP)
    root = _svg(WIDTH, HEIGHT, f"{title}: " + ", ".join(f"{point.name} {point.text}" for point in points))
    _axes(root, across, upright, x_axis, y_axis)
    # Left, right and base line of what a name must not cover: all points, and the names written so far.
    taken = [(across(point.x) - 6, across(point.x) + 6, upright(point.y) + 4) for point in points]
    for point in sorted(points, key=lambda point: -point.y):
        x, y = across(point.x), upright(point.y)
        group = ElementTree.SubElement(root, "g", {"class": point.style.css})
        _title(group, f"{point.name}: {point.text}")
        _line(group, x, upright(point.low), x, upright(point.high), "error")
        _mark(group, x, y, point.style)
        place, anchor = _room_for(point.name, x, y, taken)
        _text(root, place[0], place[1], point.name, "name", anchor)
    return _markup(root)


def swatch(style: Style) -> Markup:
    """What a legend shows of a style: its line and its mark."""
    root = ElementTree.Element("svg", {"viewBox": "0 0 30 12", "class": f"swatch {style.css}", "aria-hidden": "true"})
    ElementTree.SubElement(root, "path", {"d": "M1,6 L29,6", "class": "line", **_dash(style)})
    _mark(root, 15, 6, style)
    return _markup(root)


# ---- parts of charts


def _bar(root, row: Bar, scale: Scale, top: float) -> None:
    group = ElementTree.SubElement(root, "g", {"class": row.style.css})
    mark = "" if row.mark is None else f"; {row.marked} {row.mark:.1f}"
    _title(group, f"{row.name}: {row.text}{mark}")
    bar_top, middle = top + BAR_TOP, top + BAR_TOP + BAR_HEIGHT / 2
    zero, end = scale(0), scale(row.value)
    ElementTree.SubElement(
        group,
        "rect",
        {
            "class": "bar", "x": f"{min(zero, end):g}", "y": f"{bar_top:g}", "width": f"{abs(end - zero):g}",
            "height": f"{BAR_HEIGHT}", "rx": "1",
        },
    )  # fmt: skip
    low, high = scale(row.low), scale(row.high)
    _line(group, low, middle, high, middle, "error halo")
    _line(group, low, middle, high, middle, "error")
    for edge in (low, high):
        _line(group, edge, middle - 3, edge, middle + 3, "error cap")
    if row.mark is not None:
        place = scale(row.mark)
        _line(group, place, bar_top - 3, place, bar_top + BAR_HEIGHT + 3, "untrained halo")
        _line(group, place, bar_top - 3, place, bar_top + BAR_HEIGHT + 3, "untrained")
    room = int((WIDTH - 2 * INSET - TEXT * (len(row.text) + 2)) / TEXT)
    name = row.name if len(row.name) <= room else row.name[: max(room - 1, 1)] + "…"
    _text(root, INSET, top + 13, name, "name", "start")
    _text(root, WIDTH - INSET, top + 13, row.text, "number", "end")


def _axes(root, across: Scale, upright: Scale, x_axis: str, y_axis: str) -> None:
    for tick, text in zip(upright.ticks, texts(upright.ticks), strict=True):
        _line(root, LEFT, upright(tick), RIGHT, upright(tick), "grid")
        _text(root, LEFT - 6, upright(tick) + 4, text, "tick", "end")
    _text(root, 2, 12, f"{y_axis} (log scale)".strip() if upright.log else y_axis, "axis", "start")
    _line(root, LEFT, BOTTOM, RIGHT, BOTTOM, "base")
    _ticks_below(root, across, BOTTOM, x_axis)


def _ticks_below(root, scale: Scale, bottom: float, axis: str) -> None:
    written = -1.0  # how far to the right there is text already
    for tick, text in zip(scale.ticks, texts(scale.ticks), strict=True):
        place, half = scale(tick), TEXT * len(text) / 2
        _line(root, place, bottom, place, bottom + 4, "base")
        middle = min(place, WIDTH - half)  # or it would be cut
        if middle - half > written:
            _text(root, middle, bottom + 16, text, "tick", "middle")
            written = middle + half + 4
    _text(root, (scale.start + scale.end) / 2, bottom + 33, axis, "axis", "middle")


def _room_for(name: str, x: float, y: float, taken: list) -> tuple[tuple[float, float], str]:
    """A place for a name beside its point that crosses none of those taken, if there is one."""
    width = TEXT * len(name)
    right, left = (x + 8, x + 8 + width, "start"), (x - 8 - width, x - 8, "end")
    edge = WIDTH - width, WIDTH, "end"  # above or below the point, for a name that is too long for either side
    sides = [side for side in (right, left) if side[0] >= 0 and side[1] <= WIDTH] or [edge]
    tries = [(side, y + 4 + shift) for shift in (0, -11, 11, -22, 22, -33, 33) for side in sides]
    free = [
        (side, place)
        for side, place in tries
        if TOP - 4 <= place <= BOTTOM and all(side[1] < a or b < side[0] or abs(place - c) >= 12 for a, b, c in taken)
    ]
    (start, end, anchor), place = (free or tries)[0]
    taken.append((start, end, place))
    return (start if anchor == "start" else end, place), anchor


def _finite(line: Line) -> Line:
    """Without places where the value is no number, as a diverged loss is none."""
    keep = [i for i, y in enumerate(line.ys) if isfinite(y) and (not line.raw or isfinite(line.raw[i]))]
    picked = {name: [getattr(line, name)[i] for i in keep] for name in ("xs", "ys")}
    raw = [line.raw[i] for i in keep] if line.raw else ()
    errors = [line.errors[i] for i in keep] if line.errors else ()
    return Line(line.name, picked["xs"], picked["ys"], line.style, raw, errors)


def _ends(line: Line) -> str:
    if not line.xs:
        return "nothing finite"
    return f"{line.ys[0]:.4g} at {line.xs[0]:g} to {line.ys[-1]:.4g} at {line.xs[-1]:g}"


# ---- elements


def _svg(width: float, height: float, label: str):
    return ElementTree.Element(
        "svg", {"viewBox": f"0 0 {width:g} {height:g}", "class": "chart", "role": "img", "aria-label": label}
    )


def _line(parent, x1: float, y1: float, x2: float, y2: float, css: str):
    places = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    return ElementTree.SubElement(parent, "line", {"class": css, **{key: f"{p:g}" for key, p in places.items()}})


def _path(parent, xs, ys, across: Scale, upright: Scale, attributes: dict) -> None:
    steps = [f"{across(x):g},{upright(y):g}" for x, y in zip(xs, ys, strict=True)]
    ElementTree.SubElement(parent, "path", {"d": "M" + " L".join(steps) if steps else "", **attributes})


def _mark(parent, x: float, y: float, style: Style):
    shapes = (  # corners around the middle: a circle has none
        (),
        ((-3.6, -3.6), (3.6, -3.6), (3.6, 3.6), (-3.6, 3.6)),
        ((0, -4.8), (4.6, 3.4), (-4.6, 3.4)),
        ((0, -5), (5, 0), (0, 5), (-5, 0)),
    )
    corners = shapes[style.variant % len(shapes)]
    if not corners:
        return ElementTree.SubElement(parent, "circle", {"class": "mark", "cx": f"{x:g}", "cy": f"{y:g}", "r": "4"})
    points = " ".join(f"{x + dx:g},{y + dy:g}" for dx, dy in corners)
    return ElementTree.SubElement(parent, "polygon", {"class": "mark", "points": points})


def _text(parent, x: float, y: float, text: str, css: str, anchor: str) -> None:
    attributes = {"x": f"{x:g}", "y": f"{y:g}", "class": css, "text-anchor": anchor}
    ElementTree.SubElement(parent, "text", attributes).text = text


def _title(element, text: str) -> None:
    ElementTree.SubElement(element, "title").text = text


def _dash(style: Style) -> dict[str, str]:
    dash = DASHES[style.variant % len(DASHES)]
    return {"stroke-dasharray": dash} if dash else {}


def _markup(root) -> Markup:
    return Markup(ElementTree.tostring(root, encoding="unicode"))
