"""What is gathered about a run, who stands beside whom, and the table that comes of it."""

import dataclasses
import html
import json
import re
from dataclasses import replace

import pytest
import timm
import torch
import yaml
from rich.console import Console
from small_objectives import built

from prelude.data.errors import UserError
from prelude.evaluators.comparing import gathering, run_record
from prelude.evaluators.comparing.comparison import Comparison, Entry, Picture
from prelude.evaluators.comparing.gathering import Named, in_words, line_up
from prelude.evaluators.comparing.headline import gain, headline
from prelude.evaluators.comparing.repeats import as_one
from prelude.evaluators.comparing.run_record import cost_of, curves_of, pictures_of_run
from prelude.evaluators.comparing.table import cells, in_order, markdown, notes, plain, print_comparison, to_json
from prelude.evaluators.features.extraction import fair_kinds, kinds_among
from prelude.evaluators.features.pixels import open_pixels
from prelude.evaluators.frozen.fewshot import fewshot
from prelude.evaluators.frozen.knn import knn
from prelude.evaluators.frozen.linear_probe import linear_probe
from prelude.evaluators.frozen.ncm import ncm
from prelude.evaluators.results import by_frequency
from prelude.launch.made_up_data import made_up_batch, made_up_volumes
from prelude.objectives import OURS
from prelude.pretrain.config import EncoderConfig


def line(step: int, loss: float, speed: float, wait: float = 0.1, **more) -> str:
    return json.dumps(
        {"step": step, "loss": loss, "parts": {"std": loss / 2}, "images_per_second": speed, "data_wait": wait} | more
    )


@pytest.fixture
def run(tmp_path):
    """A run of batches of 8 that was interrupted after step 20, went on from step 10, and crashed while it wrote."""
    lines = [line(10, 3.0, 40.0), line(20, 9.0, 10.0), line(20, 2.0, 80.0, 0.4), line(25, 1.0, 40.0, peak_memory=700)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 30, "lo']))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"train": {"global_batch": 8}}))
    (tmp_path / "environment.json").write_text(json.dumps({"world_size": 2, "device": "a chip"}))
    reports = [
        {"step": 0, "kind": "evaluation", "numbers": {"knn": 11.0}},
        {"step": 10, "kind": "notice", "numbers": {}},
        {"step": 20, "kind": "evaluation", "numbers": {"knn": 12.0}},
    ]
    (tmp_path / "online.jsonl").write_text("".join(json.dumps(report) + "\n" for report in reports))
    return tmp_path


def test_a_run_is_charged_for_each_step_once(run):
    cost = cost_of(run)
    assert (cost.num_steps, cost.num_images) == (25, 200)
    # 80 images at 40 a second, 80 at 80, 40 at 40; the steps that were lost do not count
    assert cost.seconds == pytest.approx(2 + 1 + 1)
    assert cost.data_wait == pytest.approx((2 * 0.1 + 1 * 0.4 + 1 * 0.1) / 4)
    assert (cost.images_per_second, cost.peak_memory, cost.num_ranks, cost.device) == (40.0, 700, 2, "a chip")


def test_an_early_checkpoint_is_not_charged_for_the_whole_run(run):
    assert cost_of(run, 10).num_images == 80 and cost_of(run, 10).peak_memory is None
    assert curves_of(run, 10)[0].steps == [10]


def test_a_run_that_logged_nothing_has_no_cost(tmp_path):
    assert cost_of(tmp_path) is None and curves_of(tmp_path) == []


def test_a_log_that_cannot_be_read_costs_nobody_a_comparison(run, monkeypatch):
    def unreadable(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(run_record, "read_lines", unreadable)
    assert cost_of(run) is None and curves_of(run) == []


def test_curves_take_the_later_of_two_lines_of_a_step(run):
    found = {curve.name: (curve.steps, curve.values) for curve in curves_of(run)}
    assert found == {
        "loss": ([10, 20, 25], [3.0, 2.0, 1.0]),
        "std": ([10, 20, 25], [1.5, 1.0, 0.5]),
        "online/knn": ([0, 20], [11.0, 12.0]),
    }


def test_the_newest_picture_of_each_kind(run):
    (run / "pictures").mkdir()
    for name in ("masks-00000005", "masks-00000020", "full-view-00000010", "no step"):
        (run / "pictures" / f"{name}.png").write_bytes(name.encode())
    found = {picture.title: picture.png for picture in pictures_of_run(run)}
    assert found == {"masks": b"masks-00000020", "full-view": b"full-view-00000010"}


@pytest.mark.parametrize("name", OURS)
def test_every_picture_of_our_objectives_has_a_caption(name):
    objective = built(name, **({"gradient_weight": 1.0} if name == "mae" else {}))
    drawn = {*objective.pictures(made_up_batch(torch.arange(2), objective.views, 8))}
    if objective.views.volumes:
        drawn |= {*objective.pictures(made_up_volumes(torch.arange(2), objective.views.volumes, 8))}
    assert drawn and drawn <= run_record.CAPTIONS.keys()


def test_blocks_are_said_to_be_those_of_the_first_step(run):
    (run / "pictures").mkdir()
    (run / "pictures" / "blocks-00000020.png").write_bytes(b"png")
    (picture,) = pictures_of_run(run)
    assert picture.caption.endswith("as at the run's first step. Drawn by the run after 20 steps.")


# ---- who takes part


@pytest.fixture
def described(monkeypatch):
    """Sources named after their architecture: a-32 is architecture a for images of 32 pixels."""

    def describe(source):
        name, _, size = source.rpartition("/")[2].partition("-")
        if not size:
            raise UserError(f"There is no folder {source}.")
        config = EncoderConfig(name=name, image_size=int(size))
        return gathering.sources.Description(config, (0, 0, 0), (1, 1, 1), source, None, {"objective": f"of {source}"})

    monkeypatch.setattr(gathering.sources, "describe", describe)


def test_equal_architectures_share_a_floor_and_equal_views_share_pixels(described):
    found = {each.name: each for each in line_up([Named("x/a-32"), Named("y/a-32"), Named("b-32"), Named("a-16")])}
    assert list(found) == [
        "a-32", "a-32 (2)", "b-32", "a-16",
        "random:a-32", "random:b-32", "random:a-16", "pixels 32x32", "pixels 16x16",
    ]  # fmt: skip
    assert found["a-32"].untrained == found["a-32 (2)"].untrained == "random:a-32"
    assert found["a-16"].untrained == "random:a-16"
    assert found["pixels 16x16"].beside[0] == "a-16" and found["random:a-32"].source == "random:x/a-32"


def test_a_floor_that_was_named_is_not_added_again(described):
    found = line_up([Named("a-32"), Named("random:a-32"), Named("pixels:8")])
    assert [each.name for each in found] == ["a-32", "random:a-32", "pixels:8"]
    assert found[0].untrained == "random:a-32"


def test_floors_can_be_left_out(described):
    (alone,) = line_up([Named("a-32")], floors=False)
    assert alone.untrained is None and alone.objective == "of a-32"


def test_a_source_that_is_none_stays_with_its_reason(described):
    found = line_up([Named("nothing"), Named("a-32"), Named("late-32", "late", "Pretraining failed: so.")])
    assert found[0].problem == "There is no folder nothing." and found[2].problem == "Pretraining failed: so."
    assert [each.name for each in found] == ["nothing", "a-32", "late", "random:a-32", "pixels 32x32"]


def test_an_architecture_in_words():
    config = EncoderConfig(name="vit", image_size=32, patch_size=4, kwargs={"depth": 4, "layers": [1, 2]})
    assert in_words(config) == "vit at 32 px (patch 4, depth 4, layers 1-2)"
    assert in_words(EncoderConfig(name="resnet", image_size=(32, 64))) == "resnet at 32 x 64 px"


def test_each_model_gets_the_kinds_of_feature_that_it_has():
    with torch.device("meta"):
        vit = timm.create_model("test_vit")
        convnet = timm.create_model("test_resnet")
    assert fair_kinds(vit)[:2] == ("cls", "mean") and re.fullmatch(r"last[2-4]", fair_kinds(vit)[2])
    assert fair_kinds(convnet) == ("pool", "stages")
    assert fair_kinds(open_pixels("pixels:4").model) == ("pixels",)
    mixed = ["cls", "mean", "pool", "stages"]
    assert kinds_among(vit, mixed, "vit") == ("cls", "mean") and kinds_among(convnet, mixed, "c") == ("pool", "stages")
    with pytest.raises(UserError, match="has no features=cls"):
        kinds_among(convnet, ["cls"], "convnet")


# ---- the table


def result(evaluator: str, warnings=(), **numbers: float) -> dict:
    each = {name.replace("_", " "): {"value": value, "se": 0.5} for name, value in numbers.items()}
    return {"evaluator": evaluator, "numbers": each, "warnings": list(warnings)}


def an_entry(name: str, kind: str = "pretrained", objective=None, top1=None, **more) -> Entry:
    results = {} if top1 is None else {"knn": result("knn", top1=top1, top5=99.0)}
    return Entry(name, name, kind, objective, "vit at 32 px", None, **{"results": results} | more)


@pytest.fixture
def comparison():
    pictures = [Picture("masks", "What was hidden.", b"12345")]
    entries = [
        an_entry("mae", objective="mae", top1=50.0, untrained="random:mae", pictures=pictures),
        an_entry("pixels 32x32", "floor", top1=60.0),
        an_entry("rotation", objective="rotation", top1=55.04, untrained="random:other"),
        an_entry("random:mae", "untrained", top1=45.5),
        an_entry("mae long", objective="mae", top1=52.0, untrained="random:mae"),
        an_entry("gone", problem="There is no folder gone."),
    ]
    data = {"label": "cls", "train": {"num_samples": 2000}, "test": {"num_samples": 500}}
    return Comparison("mae and rotation", entries, ["knn"], data, "prelude compare", "2030-01-01", 1.0, None, {})


def test_the_best_pretrained_is_marked_and_a_better_floor_is_not(comparison):
    best = {entry.name: cells(comparison, entry)[0].best for entry in comparison.entries}
    assert [name for name, marked in best.items() if marked] == ["rotation"]


def test_gains_are_over_the_same_architecture_untrained(comparison):
    gains = {entry.name: cells(comparison, entry)[0].gain for entry in comparison.entries}
    assert gains["mae"] == "+4.5" and gains["mae long"] == "+6.5"
    assert not any(gains[name] for name in ("rotation", "random:mae", "pixels 32x32", "gone"))


def of_kinds(chosen: str, pool: float, stages: float) -> dict:
    each = {"pool": {"top1": {"value": pool, "se": 0.5}}, "stages": {"top1": {"value": stages, "se": 0.5}}}
    return {"knn": {"numbers": each[chosen], "chosen": {"features": chosen}, "by_kind": each}}


def test_gains_are_by_the_same_kind_of_feature_which_is_named():
    trained = an_entry("b", objective="b", untrained="random:b", results=of_kinds("pool", 62.3, 60.0))
    twin = an_entry("random:b", "untrained", results=of_kinds("stages", 60.0, 65.8))
    alone = Comparison("", [trained, twin], ["knn"], {}, "", "", 0, None, {})
    assert "| b | b |  | **62.3 ± 0.5** pool (+2.3) |" in markdown(alone)
    assert "| random:b | none |  | 65.8 ± 0.5 stages |" in markdown(alone)
    twin.results["knn"].pop("by_kind")  # another kind of feature alone is no comparison
    assert cells(alone, trained)[0].gain == ""


@pytest.mark.parametrize("evaluator", [linear_probe, knn, ncm, fewshot])
def test_evaluators_give_the_number_of_each_kind_and_so_gains_can_be_had(problem, evaluator):
    settings = {"per_class": (2,), "shares": (), "draws": 3} if evaluator is fewshot else {}
    train, test = problem
    outcome = evaluator(train, test, **settings)
    (name,) = outcome.by_kind["cls"].keys() & {"top1", "2 a class"}
    kind = outcome.chosen["features"].split(", ")[0]
    if evaluator is not fewshot:
        assert outcome.by_kind[kind][name] == outcome.numbers[name]
    alone = evaluator({"cls": train["cls"]}, {"cls": test["cls"]}, **settings)
    assert outcome.by_kind["cls"][name].value == pytest.approx(alone.numbers[name].value)
    found = json.loads(json.dumps({outcome.evaluator: dataclasses.asdict(outcome)}, default=str))
    blind = json.loads(json.dumps({outcome.evaluator: dataclasses.asdict(alone)}, default=str))
    blind[outcome.evaluator]["by_kind"] = found[outcome.evaluator]["by_kind"]
    entries = [an_entry("a", untrained="b", results=found), an_entry("b", "untrained", results=blind)]
    both = Comparison("", entries, [outcome.evaluator], {}, "", "", 0, None, {})
    assert gain(entries[0], outcome.evaluator, both) == pytest.approx(0)


def test_the_kind_of_feature_of_few_labels_is_the_one_that_most_draws_of_all_pretrainings_chose():
    def few(cls: float, mean: float, *chosen: str) -> dict:
        by_kind = {kind: {"1 %": {"value": value, "se": 1}} for kind, value in (("cls", cls), ("mean", mean))}
        about = {"1 %": {"draws": [{"features": kind} for kind in chosen]}}
        more = {"chosen": {"features": by_frequency(chosen)}, "by_kind": by_kind, "details": {"by_amount": about}}
        return {"fewshot": result("fewshot") | {"numbers": by_kind[chosen[0]]} | more}

    runs = [("cls", "cls", "mean"), ("mean", "mean", "mean"), ("mean", "mean", "mean")]
    entries = [an_entry(f"ours-{i}", untrained="fresh", results=few(50, 40, *chosen)) for i, chosen in enumerate(runs)]
    (ours,), _ = as_one(entries, [[entry.source for entry in entries]])
    fresh = an_entry("fresh", "untrained", results=few(49, 30, "cls"))
    assert headline(ours, "fewshot").kind == "mean"
    assert gain(ours, "fewshot", Comparison("", [ours, fresh], ["fewshot"], {}, "", "", 0, None, {})) == 10


def test_rows_are_grouped_by_objective_and_floors_come_last(comparison):
    assert [entry.name for entry in in_order(comparison)] == [
        "mae", "mae long", "rotation", "gone", "random:mae", "pixels 32x32",
    ]  # fmt: skip


def test_the_markdown_table(comparison):
    lines = markdown(comparison).splitlines()
    assert lines[:6] == [
        "| encoder | objective | images seen | k-NN, top-1 % |",
        "|---|---|---:|---:|",
        "| mae | mae |  | 50.0 ± 0.5 (+4.5) |",
        "| mae long | mae |  | 52.0 ± 0.5 (+6.5) |",
        "| rotation | rotation |  | **55.0 ± 0.5** |",
        "| gone | unknown |  | – |",
    ]
    assert all(line.count("|") == 5 for line in lines[:8])
    assert "- mae: vit at 32 px" in lines and "- gone: There is no folder gone." in lines and "prelude compare" in lines


def test_the_console_shows_the_same_numbers(comparison):
    console = Console(record=True, width=80, force_terminal=False)
    print_comparison(comparison, console)
    text = console.export_text()
    assert "55.0 ± 0.5" in text and "+4.5" in text and "There is no folder gone." in text
    assert "Learned from 2,000 labelled images, tested on 500." in text


def test_the_console_shows_names_as_they_are(comparison):
    console = Console(record=True, width=80, force_terminal=False)
    print_comparison(replace(comparison, title="own[b] and [/] :x:", command=""), console)
    assert "own[b] and [/] :x:" in console.export_text()


def test_a_terminal_that_is_too_narrow_gets_several_tables_with_nothing_cut():
    names = ["knn", "linear_probe", "ncm", "fewshot", "anomaly", "fine_tune"]
    long = "runs/chest_xrays_dseqjepa_vit_small_patch16-800_epochs"
    entry = an_entry(long, objective="dseqjepa", results={name: result(name, top1=70.5) for name in names})
    console = Console(record=True, width=60, force_terminal=False)
    print_comparison(Comparison("Many", [entry], names, {}, "", "", 0, None, {}), console)
    text = console.export_text()
    assert text.count("70.5 ± 0.5") == len(names) and "…" not in text
    assert max(map(len, text.splitlines())) <= 60
    words = {word for line in text.splitlines() for word in re.split(r"[^A-Za-z0-9]+", line)}
    assert set(re.split(r"[/_-]", long)) | {"dseqjepa", "linear", "anomaly"} <= words


def test_json_holds_all_but_the_pictures(comparison):
    found = json.loads(to_json(comparison))
    assert found["entries"][0]["pictures"] == [{"title": "masks", "caption": "What was hidden.", "num_bytes": 5}]
    assert found["entries"][1]["results"]["knn"]["numbers"]["top1"] == {"value": 60.0, "se": 0.5}


def test_the_headline_of_few_labels_is_a_percent_of_them():
    numbers = {f"{n} a class": {"value": n, "se": 1, "spread": 2} for n in (1, 10, 5)}
    few = an_entry("mae", results={"fewshot": result("fewshot") | {"numbers": numbers, "recipe": {"draws": 5}}})
    assert (headline(few, "fewshot").number, headline(few, "fewshot").text) == ("10 a class", "10.0 ± 2.0")
    numbers["1 %"] = {"value": 3, "se": 1}
    assert (headline(few, "fewshot").number, headline(few, "fewshot").text) == ("1 %", "3.0 ± 1.0")


def test_an_interval_stands_for_the_standard_error(comparison):
    wide = {"evaluator": "knn", "numbers": {"top1": {"value": 50.04, "se": 1, "interval": [40.0, 60.06]}}}
    entry = an_entry("mae", objective="mae", results={"knn": wide})
    alone = Comparison("", [entry], ["knn"], {}, "", "", 0, None, {})
    assert cells(alone, entry)[0].text == "50.0 [40.0, 60.1]"


def test_a_warning_is_told_once_with_those_that_it_is_about(comparison):
    told = [an_entry(name, results={"knn": result("knn", ["Odd."], top1=1.0)}) for name in ("a", "b")]
    few = Comparison("", told, ["knn"], {}, "", "", 0, None, {}, ["Two."])
    assert notes(few) == ["Two.", "a (knn), b (knn): Odd."]


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "a|b",
    "[x](http://evil)",
    "**x**",
    "`x`",
    "_x_",
    "# x",
    "- x",
    "a\n\n# b",
    "~~x~~",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_and_notes_cannot_become_markup(comparison, name):
    hostile = an_entry(name, objective=name, top1=51.0)
    failed = an_entry(f"{name} ", problem=f"No {name}.")
    lines = markdown(replace(comparison, entries=[hostile, failed], command=f"```\n{name}")).splitlines()
    cells_of = [re.split(r"(?<!\\)\|", line) for line in lines[:4]]
    assert all(len(row) == 6 for row in cells_of)
    fence = lines.index("````")
    told = [line for i, line in enumerate(lines) if i < fence or line.startswith("- ")]
    shown = html.unescape(re.sub(r"\\(.)", r"\1", "\n".join(told)))
    assert " ".join(name.split()) in shown
    assert not re.search(
        r"<|(?<!\\)[\[\]`~]|(?<!\*)(?<!\\)\*(?!\*)|(?<![\w\\])_|\| #|^- [#-]", "\n".join(told[2:]), re.MULTILINE
    )


def test_ordinary_names_stay_as_they_are():
    for name in (
        "mae_cifar10",
        "random:runs/mae-2",
        "pixels 32x32",
        "vit_tiny_patch16_224 at 32 px",
        "pixels:8 (floor)",
    ):
        assert plain(name) == name
