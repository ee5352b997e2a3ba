"""Probes and the watch for collapse in whole runs through the real launcher."""

import json

import pytest
import torch
from runs import Run, deepspeed

from evaluators.frozen import Labelled, evaluate
from evaluators.knn import knn
from evaluators.linear_probe import linear_probe

NUM_STEPS = 20
SETTINGS = ["train.epochs=1.6", "train.zero_stage=2", "log.every_steps=2"]


def reports(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.run_dir / "online.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def shards(recipe) -> str:
    return str(recipe.parent / "shapes" / "train-*.tar")


@pytest.fixture(scope="module")
def watched(recipe, shards, tmp_path_factory) -> Run:
    online = [f"evaluate.train_shards={shards}", f"evaluate.test_shards={shards}", "evaluate.every_steps=5"]
    run = Run(deepspeed(2), recipe, tmp_path_factory.mktemp("runs") / "watched", *SETTINGS, *online)
    assert run.wait() == 0, run.output.read_text()[-3000:]
    return run


def test_weights_are_bitwise_those_of_a_run_that_nobody_judges(recipe, watched, tmp_path):
    alone = Run(deepspeed(2), recipe, tmp_path / "alone", *SETTINGS)
    assert alone.wait() == 0, alone.output.read_text()[-3000:]
    ours, theirs = watched.weights(NUM_STEPS), alone.weights(NUM_STEPS)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [line["loss"] for line in watched.metrics()] == [line["loss"] for line in alone.metrics()]
    assert not (alone.run_dir / "online.jsonl").exists()


def test_the_last_evaluation_is_that_of_the_checkpoint(watched, shards):
    found = reports(watched)
    assert any("same shards" in report["text"] for report in found)
    evaluations = [report for report in found if report["kind"] == "evaluation"]
    assert evaluations[0]["step"] == 0 and evaluations[-1]["step"] == NUM_STEPS
    offline = evaluate([str(watched.run_dir)], [knn, linear_probe], Labelled(shards, shards, "cls"))
    for name, result in zip(("knn", "linear"), offline, strict=True):
        assert evaluations[-1]["numbers"][name] == pytest.approx(result.outcome.numbers["top1"].value, abs=0.51)
    assert f"step {NUM_STEPS}  k-NN" in watched.output.read_text()
    assert not list(watched.run_dir.glob("online-encoder*"))


def test_a_run_that_collapses_stops_if_asked_to_and_keeps_what_was_healthy(recipe, tmp_path):
    asked = ["collapse.stop=true", "collapse.grace_steps=4", "collapse.sustained_steps=2", "checkpoint.keep=1"]
    run = Run(deepspeed(2), recipe, tmp_path / "run", *SETTINGS, *asked, "objective.name=collapsing:LateCollapse")
    assert run.wait() == 3, run.output.read_text()[-3000:]
    (report,) = reports(run)
    assert (report["kind"], report["cause"], report["stop"]) == ("collapse", "same_features", True)
    assert "step-00000010, the last healthy checkpoint" in report["text"]
    assert "change objective.decoder_dim" in report["text"]
    assert "error: The run looks collapsed (same_features)" in run.output.read_text()
    assert run.metrics()[-1]["step"] == report["step"] < NUM_STEPS
    kept = sorted(path.name for path in (run.run_dir / "checkpoints").glob("step-*"))
    assert kept == ["step-00000010", "step-00000015"]
