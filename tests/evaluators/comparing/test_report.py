"""A comparison as a page: what it says, what it shows, and that nothing in it can do harm."""

import itertools
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from prelude.evaluators.comparing.comparison import Comparison, Cost, Curve, Entry, Picture
from prelude.evaluators.comparing.report import charts, figures, words
from prelude.evaluators.comparing.report.charts import Bar, Line, Point, Style
from prelude.evaluators.comparing.report.page import page
from prelude.evaluators.comparing.report.scales import linear, logarithmic, round_step, texts
from prelude.evaluators.comparing.table import markdown

HOSTILE = """<script>alert("x")</script><img src=x onerror=alert(1)>'&"</style></svg>"""
VOID = {"meta", "img", "br", "link", "input", "hr"}
PNG = bytes.fromhex("89504e470d0a1a0a0000000d4948445200000001000000010806000000")
LOADING = {"src", "href", "srcset", "action", "data", "poster", "background", "xlink:href", "formaction"}


def result(evaluator, value, se=0.7, warnings=(), **more):
    numbers = {"top1": {"value": value, "se": se}, "top5": {"value": value + 20, "se": 0.3}}
    return {
        "evaluator": evaluator, "numbers": numbers, "chosen": {"features": "mean"}, "details": {},
        "recipe": {"seed": 0, "features": ["mean"], "k": 20}, "warnings": list(warnings), **more,
    }  # fmt: skip


def fewshot(*values):
    counts = {"1 a class": 10, "10 a class": 100, "10 %": 2000}
    numbers = {name: {"value": v, "se": 0.6, "spread": 2.4} for name, v in zip(counts, values, strict=True)}
    amounts = {name: {"num_labels": count} for name, count in counts.items()}
    return result("fewshot", 0, recipe={"draws": 5}) | {"numbers": numbers, "details": {"by_amount": amounts}}


def interval(value, low, high):
    return result("anomaly", 0) | {"numbers": {"auroc": {"value": value, "se": 1.0, "interval": [low, high]}}}


def comparison(mae=63.12, barlow=55.04, **changes) -> Comparison:
    cost = Cost(1_234_000, 1875, 312.4, 754.0, 0.0131, 3 * 2**30, 2, "cpu")
    loss = Curve("loss", [10, 20, 30], [3.0, 2.0, 1.5])
    online = [Curve("online/knn", [10, 30], [20.0, 31.0]), Curve("online/knn_se", [10, 30], [0.9, 1.1])]
    parts = [loss, Curve("feature_std", [10, 20], [0.5, 0.6]), *online]
    entries = [
        Entry(
            "mae", "runs/mae", "pretrained", "mae", "vit, 32 px", 5_400_000,
            {"linear_probe": result("linear_probe", mae, warnings=[HOSTILE]), "knn": result("knn", 47.11, 0.71),
             "fewshot": fewshot(21.3, 34.6, 52.9), "anomaly": interval(70.2, 68.9, 71.3)},
            "fresh", cost, [*parts, Curve("pixel_mse", [10, 20], [0.3, 0.2])],
            [Picture(HOSTILE, HOSTILE, PNG)], "seed: 0\nobjective:\n  name: mae\n  ratio: 0.75\n",
        ),
        Entry(
            HOSTILE, HOSTILE, "pretrained", "barlow_twins", HOSTILE, 700_000,
            {"linear_probe": result("linear_probe", barlow), "knn": result("knn", 40.56)},
            "fresh", Cost(64_000, 500, 81.5, 412.0, 0.2, None, None, None), [loss], [],
            f"seed: 0\nobjective:\n  name: barlow_twins\nnote: {json.dumps(HOSTILE)}\n",
        ),
        Entry("lost", "runs/lost", "pretrained", "ijepa", "vit", None, {}, problem=f"It is gone {HOSTILE}."),
        Entry("fresh", "random:runs/mae", "untrained", None, "vit, 32 px", 5_400_000,
              {"linear_probe": result("linear_probe", 41.9), "knn": result("knn", 33.3)}),
        Entry("pixels", "pixels", "floor", None, "raw pixels", 0,
              {"linear_probe": result("linear_probe", 39.2), "knn": result("knn", 48.4)}),
    ]  # fmt: skip
    data = {"label": "cls", "train": {"shards": HOSTILE, "fingerprint": "f1ng3r", "num_samples": 20000}}
    given = dict(
        title=f"All of them {HOSTILE}", entries=entries, evaluators=["linear_probe", "knn", "fewshot", "anomaly"],
        data=data, command=f"prelude compare {HOSTILE}", date="2026-11-21T19:40:00+00:00", seconds=3312.0,
        budget="6 minutes", versions={"torch": "2.9.0"}, warnings=[HOSTILE],
    )  # fmt: skip
    return Comparison(**given | changes)


class Document(HTMLParser):
    """Tags with their attributes, text without markup, and what does not close."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.open, self.text, self.misplaced = [], [], [], []
        self.marked: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append((tag, dict(attributes).get("class", "")))

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop()[0] != tag:
            self.misplaced.append(tag)

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] == ("strong", "best"):
            self.marked.append(data)


@pytest.fixture(scope="module")
def document():
    return Document(page(comparison()))


def test_the_page_is_one_document_in_which_every_element_closes(document):
    assert document.misplaced == [] and document.open == []
    assert [name for name, _ in document.tags if name in ("html", "head", "body", "main")] == [
        "html", "head", "body", "main",
    ]  # fmt: skip
    assert dict(document.tags)["html"] == {"lang": "en"}
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [a for _, a in document.tags]


def test_nothing_is_fetched_and_nothing_runs(document):
    names = {name for name, _ in document.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for _, attributes in document.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in LOADING & attributes.keys():
            assert attributes[name].startswith(("#", "data:image/png;base64,"))
    style = "".join(document.text)
    assert "@import" not in style and "url(" not in style


def test_what_comes_from_outside_stays_text(document):
    text = "".join(document.text)
    # title twice (head, heading), entry's name, encoder, source, problem, warnings, command, shards, picture
    assert text.count(HOSTILE) >= 12
    assert len([1 for name, _ in document.tags if name == "img"]) == 1


def test_every_number_is_there_with_its_uncertainty(document):
    text = "".join(document.text)
    for written in (
        "63.1 ± 0.7", "55.0 ± 0.7", "41.9 ± 0.7", "39.2 ± 0.7", "47.1 ± 0.7", "40.6 ± 0.7", "33.3 ± 0.7", "48.4 ± 0.7",
        "83.1 ± 0.3", "21.3 ± 2.4", "34.6 ± 2.4", "52.9 ± 2.4", "70.2 [68.9, 71.3]",
        "+21.2", "+13.1", "+13.8", "+7.3",
        "1.23 M", "1,875", "312", "12.6 min", "1.3 %", "3.0 GiB", "5.4 M", "55.2 min", "2 × cpu",
        "2026-11-21 19:40 UTC", "f1ng3r", "20,000", "torch 2.9.0", "10 a class, top-1 %", "AUROC %",
    ):  # fmt: skip
        assert written in text, written


def test_the_best_pretrained_encoder_of_each_column_is_marked(document):
    # Raw pixels have the best k-NN of all, and are no pretrained encoder.
    assert document.marked == ["Marked", "63.1 ± 0.7", "47.1 ± 0.7", "34.6 ± 2.4", "70.2 [68.9, 71.3]"]


def test_pretrained_encoders_that_are_equal_are_both_marked_as_in_the_table():
    equal = comparison(mae=55.04, barlow=55.04)
    assert Document(page(equal)).marked.count("55.0 ± 0.7") == markdown(equal).count("**55.0 ± 0.7**") == 2


def test_an_entry_with_a_problem_says_so(document):
    assert f"No results: It is gone {HOSTILE}." in "".join(document.text)


def test_the_recipes_differences_are_listed(document):
    text = " ".join("".join(document.text).split())
    assert "What differs from mae objective.namebarlow_twins note<script>" in text


def test_the_summary_says_who_is_best_and_whether_that_is_settled():
    clear = words.summary(comparison(mae=63.12, barlow=55.04))
    assert "mae is best by linear probe (63.1 %, +21.2 over its untrained self)" in clear
    assert "Every leader is told apart from all others on these test images." in clear
    assert "The floor pixels is no worse by k-NN (48.4 %)." in clear
    # 1.96 x 0.7 on each side: 2.74 points apart just overlap, 2.76 do not
    close = words.summary(comparison(mae=63.12, barlow=63.12 - 2.74))
    assert "is not told apart from " in close and "(linear probe, 60.4 %), so their order is not settled" in close
    assert "Every leader" in words.summary(comparison(mae=63.12, barlow=63.12 - 2.76))
    assert "order is not settled" in "".join(Document(page(comparison(barlow=62.0))).text)


def test_a_comparison_of_almost_nothing_is_a_page_too():
    one = Entry("mae", "runs/mae", "pretrained", "mae", "vit", None, {"knn": result("knn", 40.0)})
    small = comparison(entries=[one], evaluators=["knn"], data={"label": "cls"}, warnings=[])
    assert words.summary(small) == "mae was judged by k-NN (40.0 %)."
    assert Document(page(small)).misplaced == []
    nothing = page(comparison(entries=[], evaluators=["knn"], data={}, budget=None, versions={}))
    assert "No pretrained encoder has a result." in nothing


def test_charts_and_sections_appear_only_with_something_to_show():
    full = page(comparison())
    for section in ("curves", "few-labels", "pictures", "recipes"):
        assert f'id="{section}"' in full and f'href="#{section}"' in full
    one = Entry("mae", "runs/mae", "pretrained", "mae", "vit", None, {"knn": result("knn", 40.0)})
    bare = page(comparison(entries=[one], evaluators=["knn"]))
    for section in ("curves", "few-labels", "pictures", "recipes"):
        assert f"#{section}" not in bare


# ---- charts: places of marks against the axis' own ticks


def drawn(svg):
    return ElementTree.fromstring(str(svg))


def numbers(element, *names):
    return [float(element.get(name)) for name in names]


def axis(root, upright=False):
    """A function from value to place, from the first and the last number written along the axis."""
    ticks = [t for t in root.iter("text") if t.get("class") == "tick" and (t.get("text-anchor") == "end") == upright]
    lines = [line for line in root.iter("line") if line.get("class") == ("grid" if upright else "base")]
    key = "y1" if upright else "x1"
    places = [float(line.get(key)) for line in lines if upright or float(line.get("x1")) == float(line.get("x2"))]
    values = [float(tick.text) for tick in ticks]
    assert len(places) == len(values) >= 3
    slope = (places[-1] - places[0]) / (values[-1] - values[0])
    return lambda value: places[0] + (value - values[0]) * slope


def test_bars_error_bars_and_marks_stand_where_their_numbers_are():
    rows = [
        Bar("a", 63.0, 61.5, 64.5, "63.0 ± 0.8", Style(0), 41.0),
        Bar("b <c>", 20.0, 19.0, 22.0, "20.0", Style(None)),
    ]
    root = drawn(charts.bars(rows, "probe", "top-1 %", ("pixels", 35.0)))
    place = axis(root)
    for rect, row in zip(root.iter("rect"), rows, strict=True):
        x, width = numbers(rect, "x", "width")
        assert [x, x + width] == pytest.approx([place(0), place(row.value)], abs=0.02)
    errors = [numbers(line, "x1", "x2") for line in root.iter("line") if line.get("class") == "error"]
    assert errors == [pytest.approx([place(row.low), place(row.high)], abs=0.02) for row in rows]
    (floor,) = [line for line in root.iter("line") if line.get("class") == "floor"]
    (mark,) = [line for line in root.iter("line") if line.get("class") == "untrained"]
    assert numbers(floor, "x1") == pytest.approx([place(35.0)], abs=0.02)
    assert numbers(mark, "x1") == pytest.approx([place(41.0)], abs=0.02)
    assert root.get("role") == "img" and root.get("aria-label") == "probe: a 63.0 ± 0.8, b <c> 20.0"
    assert "a: 63.0 ± 0.8; untrained 41.0" in [title.text for title in root.iter("title")]


def test_lines_go_through_their_points_and_leave_out_what_is_no_number():
    xs, ys = [0, 100, 200, 300], [3.0, float("nan"), 2.0, 1.0]
    root = drawn(charts.lines([Line("run", xs, ys, Style(1), raw=ys)], "Loss", "step", "loss"))
    across, upright = axis(root), axis(root, upright=True)
    raw, line = root.iter("path")
    points = [tuple(map(float, pair.split(","))) for pair in line.get("d")[1:].split(" L")]
    assert points == [pytest.approx((across(x), upright(y)), abs=0.02) for x, y in ((0, 3), (200, 2), (300, 1))]
    assert raw.get("class") == "raw" and raw.get("d") == line.get("d")
    assert [t.text for t in root.iter("text") if t.get("class") == "axis"] == ["loss", "step"]


def test_scatter_puts_points_and_their_error_bars_in_place_and_no_name_over_another():
    points = [Point(f"run {i}", 10 + i / 10, 50 + i / 10, 49.0, 52.0, Style(i), "t") for i in range(4)]
    root = drawn(charts.scatter(points, "t", "min", "%"))
    across, upright = axis(root), axis(root, upright=True)
    found = {tuple(numbers(circle, "cx", "cy")) for circle in root.iter("circle")}
    expected = {(round(across(p.x), 2), round(upright(p.y), 2)) for p in points}
    assert sorted(found) == [pytest.approx(pair, abs=0.02) for pair in sorted(expected)]
    for line in (line for line in root.iter("line") if line.get("class") == "error"):
        assert numbers(line, "y1", "y2") == pytest.approx([upright(49.0), upright(52.0)], abs=0.02)
    spans = []
    for text in (text for text in root.iter("text") if text.get("class") == "name"):
        (x, y), width = numbers(text, "x", "y"), 6.5 * len(text.text)
        spans.append((x, x + width, y) if text.get("text-anchor") == "start" else (x - width, x, y))
    for a, b in itertools.combinations(spans, 2):
        assert a[1] < b[0] or b[1] < a[0] or abs(a[2] - b[2]) >= 11


def test_a_name_that_is_too_long_for_either_side_of_its_point_is_not_cut():
    name = "Barlow Twins with a longer name"
    points = [Point(name, 7, 55, 54.0, 56.0, Style(0), "t"), Point("mae", 12, 63, 62.0, 64.0, Style(1), "t")]
    root = drawn(charts.scatter(points, "t", "min", "%"))
    (text,) = [text for text in root.iter("text") if text.text == name]
    (x, y), width = numbers(text, "x", "y"), 6.5 * len(name)
    first, last = (x, x + width) if text.get("text-anchor") == "start" else (x - width, x)
    assert 0 <= first and last <= charts.WIDTH
    (at,) = [numbers(mark, "cx", "cy") for mark in root.iter("circle")][:1]
    assert abs(y - at[1]) >= 8  # beside its mark, not over it


def test_a_large_ratio_gets_a_logarithmic_axis_that_says_so():
    root = drawn(charts.lines([Line("run", [1, 2, 3], [1000.0, 30.0, 1.0], Style(0))], "Loss", "step", "loss"))
    assert "loss (log scale)" in [text.text for text in root.iter("text")]
    (path,) = root.iter("path")
    top, middle, bottom = (float(pair.split(",")[1]) for pair in path.get("d")[1:].split(" L"))
    assert (middle - top) / (bottom - top) == pytest.approx((3 - 1.4771) / 3, abs=1e-3)


def test_entries_of_one_objective_share_a_colour_and_differ_in_shape():
    one, other = charts.swatch(Style(2, 0)), charts.swatch(Style(2, 1))
    assert "c2" in one and "c2" in other
    assert ("circle" in one, "polygon" in one, "circle" in other, "polygon" in other) == (True, False, False, True)
    assert "stroke-dasharray" not in one and "stroke-dasharray" in other


def test_ticks_are_round_and_hold_all_values():
    assert [round_step(step) for step in (0.3, 1, 1.1, 17, 60)] == [0.5, 1, 2, 20, 100]
    scale = linear([0.83, 2.1], 0, 100)
    assert scale.ticks == (0.5, 1.0, 1.5, 2.0, 2.5) and (scale(0.5), scale(2.5)) == (0, 100)
    assert linear([3, 63], 0, 100, zero=True, tight=True).ticks == (0, 20, 40, 60)
    assert texts((0.0, 0.5, 1.0)) == ["0.0", "0.5", "1.0"] and texts((0, 20000)) == ["0", "20k"]
    decades = logarithmic([3, 4000], 0, 100)
    assert decades.ticks == (10, 100, 1000) and decades(3) == 0 and decades(4000) == 100
    for flat in ([0.0, 0.0], [5.0], []):
        assert len(linear(flat, 0, 100).ticks) >= 2


@pytest.mark.parametrize("value", [0.1, 0.3, 0.07, 0.996, 2.3, 1e-13, -0.7])
@pytest.mark.parametrize("length", [30, 36, 100, 240])
def test_a_constant_is_a_line_however_its_means_are_rounded(value, length):
    line = figures._line("a", Curve("temperature", list(range(length)), [value] * length), Style(0))
    assert len(drawn(charts.lines([line], "temperature", "step", "")))


@pytest.mark.parametrize("low, high", [(1e-13, 3e-13), (1.0, 1.0 + 1e-12), (2e-14, 9e-13)])
def test_a_small_span_has_ticks_that_differ(low, high):
    for scale in (linear([low, high], 0, 100), logarithmic([low, high], 0, 100)):
        assert len(set(scale.ticks)) == len(scale.ticks) > 0 and scale(low) < 100


def test_there_is_no_colour_outside_of_the_style():
    assert not re.search(r'(fill|stroke)="#', page(comparison()))


def test_online_evaluations_have_a_chart_of_their_accuracy_and_none_of_its_error():
    shown = {figure.title: figure for figure in figures.shared_curves(comparison())}
    assert "Online k-NN" in shown and not any("se" in title.split() for title in shown)
    axes = [t.text for t in drawn(shown["Online k-NN"].svg).iter("text") if t.get("class") == "axis"]
    assert axes == ["top-1 %", "step"] and "top-1 %" in str(shown["Online k-NN"].svg)
    assert not [one for _, own in figures.own_curves(comparison()) for one in own if "online" in one.title]


@pytest.mark.parametrize(("count", "fewest"), [(60, 60), (1000, 100)])
def test_marks_of_online_evaluations_are_what_was_measured_however_many_there_are(count, fewest):
    measured = {10 * i: round(0.1123 + i % 7 / 10, 4) for i in range(1, count + 1)}
    curve = Curve("online/feature_rank_share", list(measured), list(measured.values()))
    run = Entry("mae", "runs/mae", "pretrained", "mae", "vit", None, {}, curves=[curve])
    (figure,) = figures.shared_curves(comparison(entries=[run]))
    titles = [re.fullmatch(r"mae: (\S+) at (\d+)", title.text) for title in drawn(figure.svg).iter("title")]
    marks = {int(found[2]): float(found[1]) for found in titles if found}
    assert figure.title == "Online effective rank" and fewest <= len(marks) <= 240
    assert marks.items() <= measured.items() and 10 * count in marks
