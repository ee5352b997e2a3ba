"""Several findings an image, stopped early: two ranks by the real launcher, one rank, and what goes on from them."""

import json
import shutil
from pathlib import Path

import pytest
import several_starts
import torch
import yaml
from findings import NAMES, write_findings
from runs import RunDir, deepspeed
from safetensors.torch import save_file
from tuned import VIT

from prelude.launch import finetune
from prelude.pretrain.encoders import build_encoder

NUM_STEPS = 24  # 6 epochs of 63 images in batches of 16
GONE_ON = 3  # a step whose checkpoint runs go on from


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("findings")
    (folder / "encoder").mkdir()
    save_file(build_encoder(VIT, seed=0).state_dict(), folder / "encoder" / "model.safetensors")
    section = {"encoder": VIT.model_dump(mode="json"), "mean": [0.5] * 3, "std": [0.2] * 3, "origin": {}}
    (folder / "encoder" / "config.json").write_text(json.dumps({"prelude": section}))
    recipe = {
        "run_dir": "tuned",
        "data": {"num_workers": 0, "shuffle": {"window": 64}},
        "evaluate": {
            "train_shards": write_findings(folder, "train", 90),
            "test_shards": write_findings(folder, "test", 45, first_patient=100),
            "label": "json",
            "label_names": NAMES,
            "label_field": "findings",
            "label_group": "patient",
        },
        "objective": {
            "loss": "sigmoid",
            "uncertain": "smoothed",
            "hold_out": 0.3,
            "patience": 1,
            "validate_every_epochs": 0.5,
            "ema_decay": 0.5,
        },
        "train": {"epochs": 6, "global_batch": 16, "precision": "fp32"},
        "optimizer": {"lr": 0.05, "betas": [0.9, 0.999]},
        "checkpoint": {"every_steps": 1, "keep": 30},
        "log": {"every_steps": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return [str(folder / "encoder"), "--config", str(folder / "recipe.yaml"), "--balanced"]


def run_here(arguments: list[str], run_dir: Path) -> RunDir:
    assert finetune.main([*arguments, f"run_dir={run_dir}"]) == 0
    return RunDir(run_dir)


@pytest.fixture(scope="module")
def one(arguments, tmp_path_factory) -> RunDir:
    return run_here(arguments, tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module")
def two(arguments, tmp_path_factory) -> RunDir:
    folder = tmp_path_factory.mktemp("two")
    plan = [{"name": "two", "door": "finetune", "argv": [*arguments, f"run_dir={folder / 'run'}"]}]
    answers = several_starts.made(deepspeed(2), folder, plan)
    assert answers["two"][0] == [0, 0], answers
    assert "stopped early, at step" in answers["two"][1] and "AUC % by label" in answers["two"][1]
    return RunDir(folder / "run")


def gone_on(run: RunDir, arguments: list[str], run_dir: Path) -> RunDir:
    """A run of one rank that goes on from a checkpoint of another's."""
    name = f"step-{GONE_ON:08d}"
    shutil.copytree(run.run_dir / "checkpoints" / name, run_dir / "checkpoints" / name)
    return run_here(arguments, run_dir)


def last_step(run: RunDir) -> int:
    return max(int(path.name.removeprefix("step-")) for path in (run.run_dir / "checkpoints").glob("step-*"))


def result_of(run: RunDir) -> dict:
    (path,) = (run.run_dir / "evaluations").glob("fine_tune-*.json")
    return json.loads(path.read_text())


def validations(run: RunDir) -> list[dict]:
    return [json.loads(line) for line in (run.run_dir / "validation.jsonl").read_text().splitlines()]


def test_the_run_ends_early_and_its_result_is_of_the_best_weights(one):
    result, curve = result_of(one), validations(one)
    best = max(curve, key=lambda line: line["auc"])
    assert last_step(one) == curve[-1]["step"] < NUM_STEPS
    assert result["chosen"]["step"] == best["step"] and result["chosen"]["held_out"] == best["auc"]
    assert "early stopping" in result["chosen"]["chosen_by"]
    assert result["details"]["held_out_curve"] == curve
    assert result["data"]["held_out"]["num_samples"] == 27 and result["data"]["train"]["num_samples"] == 63
    final, then = one.weights(last_step(one)), one.weights(best["step"])
    assert torch.equal(final["held_out.kept.head.weight"], then["average.module.head.weight"])
    assert not torch.equal(final["average.module.head.weight"], then["average.module.head.weight"])
    for name in ("auc", "map"):
        low, high = result["numbers"][name]["interval"]
        assert low <= result["numbers"][name]["value"] <= high
    assert set(result["details"]["by_features"]["all weights"]["by_label"]) == set(NAMES)


def test_the_encoder_of_the_best_weights_is_what_is_taken_further(one):
    from prelude.checkpoints.sources import open_encoder

    kept = one.weights(last_step(one))["held_out.kept.encoder.fc_norm.weight"]
    assert torch.equal(open_encoder(str(one.run_dir)).model.state_dict()["fc_norm.weight"], kept)


def test_what_goes_on_is_bitwise_the_run_that_was_never_interrupted(one, arguments, tmp_path):
    again = gone_on(one, arguments, tmp_path / "run")
    end = last_step(one)
    assert last_step(again) == end
    ours, theirs = again.weights(end), one.weights(end)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert result_of(again)["numbers"] == result_of(one)["numbers"]
    assert result_of(again)["chosen"] == result_of(one)["chosen"]


def test_a_run_that_has_ended_early_trains_no_more(one, arguments):
    before = result_of(one)
    run_here(arguments, one.run_dir)
    assert result_of(one)["numbers"] == before["numbers"] and last_step(one) < NUM_STEPS


def test_two_ranks_train_and_decide_as_one(one, two):
    assert [line["loss"] for line in two.metrics()] == pytest.approx([line["loss"] for line in one.metrics()], rel=1e-4)
    assert last_step(two) == last_step(one)
    assert validations(two) == pytest.approx(validations(one))
    assert result_of(two)["numbers"]["auc"]["value"] == pytest.approx(result_of(one)["numbers"]["auc"]["value"])


def test_one_rank_goes_on_from_two(two, arguments, tmp_path):
    again = gone_on(two, arguments, tmp_path / "run")
    assert last_step(again) == last_step(two) and result_of(again)["chosen"]["step"] == result_of(two)["chosen"]["step"]
    expected = [line["loss"] for line in two.metrics() if line["step"] > GONE_ON]
    assert [line["loss"] for line in again.metrics()] == pytest.approx(expected, rel=1e-4)
