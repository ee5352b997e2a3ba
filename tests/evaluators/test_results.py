import io
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from prelude.data.errors import UserError
from prelude.evaluators.results import (
    Outcome,
    Percent,
    Result,
    hits,
    mean_and_spread,
    percent,
    print_table,
    with_doubt,
    write,
)


def test_a_score_of_few_images_is_not_certain_though_all_are_right():
    assert percent(30, 100) == Percent(30.0, pytest.approx(100 * math.sqrt(0.3 * 0.7 / 100)))
    for right in (0, 20):
        assert percent(right, 20) == Percent(5.0 * right, pytest.approx(100 * math.sqrt(2 * 22 / 24**3)))


@pytest.fixture
def result():
    outcome = Outcome("knn", {"top1": percent(30, 100)}, {"features": "cls"}, {"k": 20}, {"other": {}}, ["A warning."])
    return Result(
        source="runs/a",
        encoder={"name": "[a]/step-00000010", "fingerprint": "f00"},
        data={"label": "cls", "train": {"shards": "t.tar"}, "test": {"shards": "u.tar"}},
        features={"precision": "fp32"},
        outcome=outcome,
        command="prelude knn runs/a",
        seconds=1.0,
        versions={"torch": "2"},
    )


def test_what_signs_a_url_is_in_no_record_and_makes_no_other_evaluation(result):
    url = "https://h/t.tar"
    plain, signed = (
        replace(result, data={"test": {"shards": [f"{url}{query}"]}}, command=f"prelude knn --test '{url}{query}'")
        for query in ("", "?X-Amz-Signature=secret")
    )
    assert signed == plain and signed.file_name == plain.file_name and "secret" not in json.dumps(signed.to_json())


def test_uncertainty_is_binomial():
    number = percent(30, 100)
    assert number.value == pytest.approx(30) and number.se == pytest.approx(4.5826, abs=1e-3)


def test_a_mean_over_seeds_keeps_what_the_test_sample_leaves_open():
    found = mean_and_spread([Percent(60.0, 1.0, interval=(58.0, 63.0)), Percent(64.0, 2.0, interval=(60.0, 67.0))])
    assert (found.value, found.se, found.interval) == (62.0, 1.5, (59.0, 65.0))
    assert found.spread == pytest.approx(2.828, abs=1e-3) and with_doubt(found) == "62.0 ± 2.8"
    assert with_doubt(Percent(60.0, 1.0, interval=(58.0, 63.0))) == "60.0 [58.0, 63.0]"


def test_hits_rank_equal_scores_by_class_and_miss_unknown_ones():
    scores = torch.zeros(4, 10)
    assert hits(scores, torch.tensor([0, 4, 5, -1])) == {"top1": 1, "top5": 2}
    scores[:, 9] = 1
    scores[:, :9] = -torch.inf
    assert hits(scores, torch.tensor([0, 9, 9, -1])) == {"top1": 2, "top5": 2}
    assert hits(torch.eye(3), torch.arange(3)) == {"top1": 3}


def test_a_file_holds_what_is_needed_to_do_it_again(result, tmp_path):
    path = write(result, tmp_path / "evaluations")
    found = json.loads(path.read_text())
    assert found["evaluator"] == "knn"
    assert found["numbers"]["top1"] == {"value": pytest.approx(30), "se": pytest.approx(4.58, abs=0.01)}
    for key in ("chosen", "recipe", "details", "warnings", "encoder", "data", "features", "command", "versions"):
        assert found[key], key
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # nothing unfinished is left


def test_a_crash_while_writing_leaves_the_file_of_before(result, tmp_path, monkeypatch):
    path = write(result, tmp_path)
    before = path.read_text()

    def full(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="disk full"):
        write(result, tmp_path)
    assert path.read_text() == before


def test_the_table_fits_a_terminal_and_shows_uncertainty_and_warnings(result):
    text = io.StringIO()
    print_table([result], Console(file=text, width=80))
    assert "[a]/step-00000010" in text.getvalue() and "30.0 ± 4.6" in text.getvalue()
    assert "[a]/step-00000010: A warning." in text.getvalue()


def test_no_warning_becomes_an_emoji(result):
    text = io.StringIO()
    outcome = replace(result.outcome, warnings=["Nothing in s3:a:b.tar."])
    print_table([replace(result, outcome=outcome)], Console(file=text, width=80))
    assert "Nothing in s3:a:b.tar." in text.getvalue()


def test_names_break_between_their_words_and_never_within_one(result):
    name = "experiments/chest_xrays/mae-vit_small_patch16-800_epochs/step-00012000"
    numbers = {f"{count} a class": Percent(40, 1.0, spread=2.0) for count in (1, 5, 10, 20)}
    outcome = replace(result.outcome, numbers=numbers, chosen={"features": "stage2x4"}, warnings=[])
    long = replace(result, encoder=result.encoder | {"name": name}, outcome=outcome)
    for width in (80, 60, 20):
        text = io.StringIO()
        print_table([long, long], Console(file=text, width=width))
        lines = text.getvalue().splitlines()
        words = {word for line in lines for word in re.split(r"[^A-Za-z0-9]+", line)}
        assert set(re.split(r"[/_-]", name)) | {"stage2x4", "knn"} <= words
        assert "…" not in text.getvalue() and text.getvalue().count("40.0 ± 2.0") == 8
        assert max(map(len, lines)) <= max(width, 80)


def test_five_numbers_fit_too_and_one_evaluator_is_the_title(result):
    names = ("1 a class", "5 a class", "10 a class", "1 %", "10 %")
    numbers = {name: Percent(40 + i, 1.0, spread=2.0 + i) for i, name in enumerate(names)}
    few = replace(result, outcome=replace(result.outcome, evaluator="fewshot", numbers=numbers))
    text = io.StringIO()
    print_table([few, few], Console(file=text, width=80))
    assert all(f"{40 + i:.1f} ± {2 + i:.1f}" in text.getvalue() for i in range(5)) and "…" not in text.getvalue()
    assert text.getvalue().count("fewshot") == 1
    print_table([few, result], Console(file=text, width=160))
    assert "evaluator" in text.getvalue()


def test_an_interval_is_shown_and_what_is_unknown_is_not_written(result, tmp_path):
    number = Percent(70.0, 3.0, interval=(61.0, 79.5))
    outcome = replace(result.outcome, evaluator="multilabel", numbers={"auc": number})
    text = io.StringIO()
    print_table([replace(result, outcome=outcome)], Console(file=text, width=100))
    assert "macro AUC %" in text.getvalue() and "70.0 [61.0, 79.5]" in text.getvalue()
    found = json.loads(write(replace(result, outcome=outcome), tmp_path).read_text())["numbers"]["auc"]
    assert found == {"value": 70.0, "se": 3.0, "interval": [61.0, 79.5]}
