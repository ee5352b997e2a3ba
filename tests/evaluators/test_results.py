import io
import json

import pytest
import torch
from rich.console import Console

from evaluators.results import Outcome, Result, hits, percent, print_table, write


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


def test_uncertainty_is_binomial():
    number = percent(30, 100)
    assert number.value == pytest.approx(30) and number.se == pytest.approx(4.5826, abs=1e-3)


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
    with pytest.raises(OSError):
        write(result, tmp_path)
    assert path.read_text() == before


def test_the_table_fits_a_terminal_and_shows_uncertainty_and_warnings(result):
    text = io.StringIO()
    print_table([result], Console(file=text, width=80))
    assert "[a]/step-00000010" in text.getvalue() and "30.0 ± 4.6" in text.getvalue()
    assert "[a]/step-00000010: A warning." in text.getvalue()
