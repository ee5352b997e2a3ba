"""Probes and the watch for collapse in whole runs through the real launcher, on two ranks."""

import json

import pytest
import several_starts
import torch
from runs import RunDir, deepspeed

from prelude.evaluators.frozen.knn import knn
from prelude.evaluators.frozen.linear_probe import linear_probe
from prelude.evaluators.judging import evaluate
from prelude.evaluators.labelled import Labelled

NUM_STEPS = 50
SETTINGS = ["train.epochs=4", "train.zero_stage=2", "log.every_steps=2", "objective.name=collapsing:LateCollapse"]


def reports(run: RunDir, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run.run_dir / "online.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def checkpoints(run: RunDir) -> list[str]:
    return sorted(path.name for path in (run.run_dir / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def shards(recipe) -> str:
    return str(recipe.parent / "shapes" / "train-*.tar")


@pytest.fixture(scope="module")
def runs(recipe, shards, tmp_path_factory) -> dict[str, tuple[RunDir, str]]:
    """By name, what two ranks have left and told, one run after the other in one launch. `judged`: with online probes;
    told of its collapse, and left running. `stopped`: the same without probes; stopped by its collapse."""
    folder = tmp_path_factory.mktemp("runs")
    online = [f"evaluate.train_shards={shards}", f"evaluate.test_shards={shards}", "evaluate.every_steps=10"]
    more = {"judged": online, "stopped": ["collapse.stop=true", "checkpoint.keep=1"]}
    plan = [
        {"name": name, "argv": ["--config", str(recipe), f"run_dir={folder / name}", *SETTINGS, *settings]}
        for name, settings in more.items()
    ]
    answers = several_starts.made(deepspeed(2), folder, plan)
    assert {name: codes for name, (codes, _) in answers.items()} == {"judged": [0, 0], "stopped": [3, 3]}, answers
    return {name: (RunDir(folder / name), told) for name, (_, told) in answers.items()}


@pytest.fixture
def judged(runs) -> RunDir:
    return runs["judged"][0]


@pytest.fixture
def stopped(runs) -> RunDir:
    return runs["stopped"][0]


def test_weights_are_bitwise_those_of_a_run_that_nobody_judges(judged, stopped):
    ours, theirs = judged.weights(30), stopped.weights(30)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    losses = [line["loss"] for line in stopped.metrics()]
    assert [line["loss"] for line in judged.metrics()][: len(losses)] == losses


def test_the_last_evaluation_is_that_of_the_checkpoint(runs, judged, shards):
    evaluations = reports(judged, "evaluation")
    assert evaluations[0]["step"] == 0 and evaluations[-1]["step"] == NUM_STEPS
    assert any("same shards" in notice["text"] for notice in reports(judged, "notice"))
    offline = evaluate([str(judged.run_dir)], [knn, linear_probe], Labelled(shards, shards, "cls"))
    for name, result in zip(("knn", "linear"), offline, strict=True):
        assert evaluations[-1]["numbers"][name] == result.outcome.numbers["top1"].value
    assert f"step {NUM_STEPS}  k-NN" in runs["judged"][1]
    assert not list(judged.run_dir.glob("online-encoder*"))


def test_a_collapse_is_told_and_the_last_healthy_checkpoint_kept(runs, judged):
    (report,) = reports(judged, "collapse")
    assert (report["cause"], report["stop"]) == ("same_features", False)
    assert "step-00000030, the last healthy checkpoint" in report["text"]
    assert "change objective.decoder_dim" in report["text"]
    assert "warning The run looks collapsed" in runs["judged"][1]
    (verdict,) = reports(judged, "verdict")
    assert verdict["cause"] == "collapsed" and "the run has ended collapsed" in runs["judged"][1]
    assert checkpoints(judged) == ["step-00000030", "step-00000045", "step-00000050"]  # keep: 2


def test_a_run_stops_at_its_collapse_if_asked_to(runs, stopped):
    (report,) = reports(stopped, "collapse")
    assert report["stop"] and stopped.metrics()[-1]["step"] == report["step"] < NUM_STEPS
    assert "error: The run looks collapsed (same_features)" in runs["stopped"][1]
    assert checkpoints(stopped) == ["step-00000030", "step-00000035"]  # keep: 1
