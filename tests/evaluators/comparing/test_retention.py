"""What going on from weights has won and lost: who is held against whom, by which numbers, and how it is told."""

import json
import math
import re
from dataclasses import replace

import pytest
from rich.console import Console

from prelude.data.errors import UserError
from prelude.evaluators.comparing import gathering
from prelude.evaluators.comparing.comparison import Comparison, Entry
from prelude.evaluators.comparing.gathering import Named, line_up
from prelude.evaluators.comparing.headline import headline
from prelude.evaluators.comparing.report import words
from prelude.evaluators.comparing.report.page import page
from prelude.evaluators.comparing.retention import changes, gone_on
from prelude.evaluators.comparing.table import markdown, notes, print_comparison, to_json
from prelude.pretrain.config import EncoderConfig


def judged(evaluator: str, chosen: str, by_kind: dict[str, dict], recipe: dict | None = None) -> dict[str, dict]:
    by_kind = {kind: {"top1": found} for kind, found in by_kind.items()}
    numbers = {"evaluator": evaluator, "numbers": by_kind[chosen], "chosen": {"features": chosen}}
    return {evaluator: numbers | {"by_kind": by_kind, "recipe": recipe or {}, "warnings": []}}


def number(value: float, se: float = 1.0, **more) -> dict:
    return {"value": value, "se": se} | more


def entry(name: str, new: dict, old: dict, **more) -> Entry:
    more = {"kind": "pretrained", "objective": "mae"} | more
    return Entry(name, f"runs/{name}", encoder="vit", num_parameters=1, results=new, kept=old, **more)


def comparison(
    after: dict[str, dict],
    before: dict[str, dict],
    *,
    chosen: str = "cls",
    knn: float = 50.0,
    recipe: dict | None = None,
) -> Comparison:
    """`further` has gone on from `start`. after, before: a probe's numbers of each side by kind of feature."""
    sides = ("new", "old")
    further = [
        judged("linear_probe", chosen, after[side], recipe) | judged("knn", "cls", {"cls": number(knn)})
        for side in sides
    ]
    start = [
        judged("linear_probe", "cls", before[side], recipe) | judged("knn", "cls", {"cls": number(50)})
        for side in sides
    ]
    entries = [
        entry("further", *further, started="start"),
        entry("start", *start, kind="untouched", objective=None),
        entry("scratch", *further),
    ]
    data = {"label": "cls", "train": {"num_samples": 5000}, "test": {"num_samples": 1000}}
    old = {"label": "cls", "train": {"num_samples": 7000, "fingerprint": "01d"}, "test": {"num_samples": 3000}}
    given = ("mae", entries, ["linear_probe", "knn"], data, "prelude compare", "2030-01-01", 1.0, None, {})
    return Comparison(*given, old_data=old)


def one_kind(value: float, se: float = 1.0, **more) -> dict[str, dict]:
    return {side: {"cls": number(value, se, **more)} for side in ("new", "old")}


SEEDS = {"seeds": [0, 1, 2, 3, 4]}
JUST = 1.96 * math.hypot(1.0, 0.5)  # half of the interval of a difference with these two standard errors


@pytest.mark.parametrize(
    ("after", "new", "old"),
    [
        (60 + JUST + 0.01, "won", "won"),
        (60 + JUST - 0.01, "level", "kept"),
        (60 - JUST + 0.01, "level", "kept"),
        (60 - JUST - 0.01, "lost", "lost"),
    ],
)
def test_a_change_is_told_only_where_both_uncertainties_together_leave_it_standing(after, new, old):
    both = comparison(one_kind(after, 1.0), one_kind(60, 0.5))
    found = {side: changes(both, ["further"], side, "linear_probe")[0] for side in ("new", "old")}
    assert (found["new"].verdict, found["old"].verdict) == (new, old)
    assert found["new"].points == pytest.approx(after - 60)
    assert found["new"].high - found["new"].points == pytest.approx(JUST)
    assert found["new"].text == f"{after - 60:+.1f} ± {JUST:.1f}"


def test_uneven_intervals_are_combined_end_by_end():
    both = comparison(one_kind(70, interval=[66, 71]), one_kind(60, interval=[58, 64]))
    (found,) = changes(both, ["further"], "old", "linear_probe")
    assert (found.low, found.high) == pytest.approx((10 - math.hypot(4, 4), 10 + math.hypot(1, 2)))
    assert found.text == "+10.0 [+4.3, +12.2]"


def test_a_number_without_an_interval_gives_no_verdict_and_no_leader():
    """Findings that hardly a draw of the test images holds have neither a standard error nor an interval, by design."""
    both = comparison(one_kind(90, None), one_kind(60))
    found = [changes(both, ["further"], side, "linear_probe")[0] for side in ("new", "old")]
    assert [(change.verdict, change.text) for change in found] == [("no verdict", "+30.0 ± unknown")] * 2
    assert "+30.0 by linear probe (no verdict)" in words.summary(both)
    shown = page(both)
    assert "<strong>no verdict</strong> +30.0 ± unknown" in shown and not re.search(r"\b(inf|nan)\b", shown, re.I)
    ahead = replace(both.entries[2], results=judged("linear_probe", "cls", {"cls": number(95, None)}))
    two = replace(both, entries=[both.entries[0], ahead])
    assert "The leader is not told apart from further (linear probe" in words.summary(two)


def test_numbers_are_of_the_kind_of_feature_that_the_run_chose_on_each_side():
    kinds = {side: {"cls": number(1), "mean": number(value)} for side, value in (("new", 62), ("old", 48))}
    start = {side: {"cls": number(99), "mean": number(value)} for side, value in (("new", 50), ("old", 55))}
    both = comparison(kinds, start, chosen="mean")
    found = [changes(both, ["further"], side, "linear_probe")[0] for side in ("new", "old")]
    assert [(c.before.value, c.after.value, c.after.kind) for c in found] == [(50, 62, "mean"), (55, 48, "mean")]
    lacks = comparison(kinds, {side: {"cls": number(99)} for side in ("new", "old")}, chosen="mean")
    assert changes(lacks, ["further"], "new", "linear_probe") == [None]


@pytest.fixture
def lost() -> Comparison:
    """It has won 12 points on the new images, lost 7 on the old, and by k-NN nothing has changed."""
    return comparison(
        {"new": {"cls": number(62)}, "old": {"cls": number(48)}},
        {"new": {"cls": number(50)}, "old": {"cls": number(55)}},
    )


def test_only_those_that_started_from_weights_are_asked(lost):
    assert [each.name for each in gone_on(lost)] == ["further"]


def test_table_page_and_json_tell_both_sides(lost):
    console = Console(record=True, width=80, force_terminal=False)
    print_comparison(lost, console)
    text = console.export_text()
    for told in ("On the old images", "What going on has won and lost", "50.0 → 62.0", "won, cls", "-7.0 ± 2.8"):
        assert told in text, told
    assert "learned from 7,000, tested on 3,000" in " ".join(text.split()) and max(map(len, text.splitlines())) <= 80
    rows = markdown(lost).splitlines()
    titles = [f"{name}, top-1 %, {side} images" for name in ("linear probe", "k-NN") for side in ("new", "old")]
    assert f"| encoder | started from | {' | '.join(titles)} |" in rows
    cells = ["50.0 → 62.0 (+12.0 ± 2.8): won, cls", "55.0 → 48.0 (-7.0 ± 2.8): lost, cls"]
    cells += ["50.0 → 50.0 (+0.0 ± 2.8): level, cls", "50.0 → 50.0 (+0.0 ± 2.8): kept, cls"]
    assert f"| further | start | {' | '.join(cells)} |" in rows
    assert rows.count("| scratch | mae |  | **48.0 ± 1.0** cls | **50.0 ± 1.0** cls |") == 1  # among the old images
    shown = page(lost)
    assert 'href="#going-on"' in shown and 'id="old-images"' in shown and "What they started from, untouched" in shown
    assert "further: −7.0" not in shown and "further: -7.0 ± 2.8, lost; untouched 55.0" in shown  # of a bar
    assert "<strong>won</strong> +12.0 ± 2.8" in shown and "<code>01d</code>" in shown
    found = json.loads(to_json(lost))
    assert found["entries"][0]["kept"]["linear_probe"]["numbers"]["top1"]["value"] == 48
    assert found["entries"][0]["started"] == "start" and found["old_data"]["test"] == {"num_samples": 3000}


def test_the_summary_says_what_was_won_and_what_was_lost(lost):
    assert words.summary(lost).endswith(
        " From start to further: +12.0 by linear probe (won) and +0.0 by k-NN (level) on the new images, and −7.0 by "
        "linear probe (lost) and +0.0 by k-NN (kept) on the old images."
    )


def test_a_start_that_cannot_be_had_leaves_gaps_with_its_reason(lost):
    further, start, scratch = lost.entries
    gone = replace(lost, entries=[further, replace(start, results={}, kept={}, problem="It is gone."), scratch])
    assert "| further | start | – | – | – | – |" in markdown(gone)
    assert "start: It is gone." in notes(gone) and "No results: It is gone." in page(gone)


def test_without_old_images_nothing_is_said_of_them(lost):
    alone = [replace(each, kept={}, started=None) for each in lost.entries]
    plain = replace(lost, entries=alone, old_data={})
    for text in (markdown(plain), page(plain)):
        assert "old images" not in text and "won and lost" not in text


def test_warnings_about_the_old_images_say_so(lost):
    lost.entries[1].kept["knn"]["warnings"].append("Odd.")
    assert "start (knn on the old images): Odd." in notes(lost)
    assert "start, k-NN, old images: Odd." in page(lost)


# ---- who is held against whom

RUNS = {  # source -> (image size, fingerprint of its own weights, those that it started from)
    "runs/a": (32, "A", None),
    "runs/b": (32, "B", ("runs/a", "A")),
    "runs/c": (32, "C", ("runs/a", "A")),
    "runs/large": (64, "D", ("runs/a", "A")),
    "runs/next": (32, "E", ("runs/b", "B")),
    "runs/other": (32, "F", ("runs/a", "of last week")),
    "moved/a": (32, "A", None),
    "moved/broken": (32, None, None),
}


@pytest.fixture
def recorded(monkeypatch):
    def describe(source):
        size, own, start = RUNS[source.removeprefix("start:")]
        if source.startswith("start:"):
            own = start[1]

        def read():
            if own is None:
                raise UserError("It is broken.")
            return type("Weights", (), {"fingerprint": own})

        origin = dict(zip(("weights", "weights_fingerprint"), start or (), strict=False))
        config = EncoderConfig(name="vit", image_size=size)
        return gathering.sources.Description(config, (0, 0, 0), (1, 1, 1), source, read, origin)

    monkeypatch.setattr(gathering.sources, "describe", describe)


@pytest.mark.parametrize(
    ("sources", "started", "added"),
    [
        (["runs/a"], {}, []),
        (["runs/b"], {"b": "untouched a"}, ["start:runs/b"]),
        (["runs/b", "runs/c"], {"b": "untouched a", "c": "untouched a"}, ["start:runs/b"]),
        (["runs/b", "runs/a"], {"b": "a"}, []),
        (["moved/broken", "moved/a", "runs/b"], {"b": "a"}, []),
        (
            ["runs/b", "runs/large"],
            {"b": "untouched a", "large": "untouched a (2)"},
            ["start:runs/b", "start:runs/large"],
        ),
        (["runs/next", "runs/b"], {"next": "b", "b": "untouched a"}, ["start:runs/b"]),
        (["runs/other", "runs/a"], {"other": "untouched a"}, ["start:runs/other"]),
        (["start:runs/b", "runs/c"], {"c": "start:b"}, []),
    ],
)
def test_what_runs_started_from_takes_part_once(sources, started, added, recorded):
    found = line_up([Named(source) for source in sources], floors=False, starts=True)
    assert {each.name: each.started for each in found if each.started} == started
    assert [each.source for each in found[len(sources) :]] == added
    assert all(each.kind == "untouched" for each in found[len(sources) :])


def test_the_untouched_stands_beside_the_same_floors(recorded):
    found = {each.name: each for each in line_up([Named("runs/b")], starts=True)}
    assert list(found) == ["b", "untouched a", "random:b", "pixels 32x32"]
    assert found["b"].untrained == found["untouched a"].untrained == "random:b"
    assert not any(each.started for each in line_up([Named("runs/b")]))


def test_seeds_that_agree_say_nothing_of_another_test_sample():
    """k-NN finds the same with every seed; what one test sample leaves open is left open all the same."""
    both = comparison(one_kind(60.1, 1.4, spread=0.0), one_kind(60, 1.4, spread=0.0), recipe=SEEDS)
    (found,) = changes(both, ["further"], "new", "linear_probe")
    assert found.verdict == "level" and found.high - found.points == pytest.approx(1.96 * math.hypot(1.4, 1.4))
    spread = comparison(one_kind(63.0, 1.0, spread=2.0), one_kind(60, 1.0, spread=0.0), recipe=SEEDS)
    (found,) = changes(spread, ["further"], "new", "linear_probe")
    assert found.verdict == "level" and found.after.text == "63.0 ± 2.0"  # beside a number is the deviation over seeds


@pytest.mark.parametrize(
    ("recipe", "t_over_root"),
    [
        ({"draws": 5}, 2.776445 / math.sqrt(5)),
        ({"seeds": [0, 1, 2]}, 4.302653 / math.sqrt(3)),
        ({"draws": 5, "seeds": [0, 1, 2]}, 4.302653 / math.sqrt(3)),
    ],
)
def test_a_verdict_is_of_the_mean_over_draws_or_seeds_and_not_of_a_single_one(recipe, t_over_root):
    both = comparison(one_kind(65.0, 1.0, spread=1.5), one_kind(60, 1.0, spread=0.5), recipe=recipe)
    (found,) = changes(both, ["further"], "new", "linear_probe")
    sample, draws = 1.96 * math.sqrt(2), t_over_root * math.hypot(1.5, 0.5)
    assert found.high - found.points == pytest.approx(math.hypot(sample, draws), abs=1e-4)
    few = headline(both.entries[0], "linear_probe")
    assert few.high - few.value == pytest.approx(math.hypot(1.96, t_over_root * 1.5), abs=1e-4)
