"""Kill it anywhere, resume it at another size: the same run. All through the real launchers."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from runs import BIN, Run, deepspeed

from prelude.launch import pretrain

GOLDEN = Path(__file__).with_name("golden_mae.json")
NUM_SAMPLES = 200
NUM_STEPS = 38  # ceil(3 epochs x 200 samples / 16), so that epochs end in mid-batch
RECORDING = "objective.name=recording:RecordingMAE"


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory) -> Run:
    """Two ranks, from start to end."""
    run = Run(deepspeed(2), recipe, tmp_path_factory.mktemp("runs") / "uninterrupted", RECORDING)
    assert run.wait() == 0, run.output.read_text()[-3000:]
    return run


@pytest.fixture(scope="module")
def killed(recipe, tmp_path_factory) -> Run:
    """The whole process group killed in mid-epoch, and the same command again."""
    run_dir = tmp_path_factory.mktemp("runs") / "killed"
    Run(deepspeed(2), recipe, run_dir, RECORDING).at_step(18).signal_group(signal.SIGKILL).wait()
    assert not (run_dir / "checkpoints" / f"step-{NUM_STEPS:08d}").exists()
    run = Run(deepspeed(2), recipe, run_dir, RECORDING)
    assert run.wait() == 0, run.output.read_text()[-3000:]
    return run


@pytest.fixture(scope="module")
def resized(recipe, tmp_path_factory) -> Run:
    """2 ranks, pre-empted; 1 process at ZeRO 0, stopped by a file; 2 ranks of torchrun from another folder."""
    run_dir = tmp_path_factory.mktemp("runs") / "resized"
    first = Run(deepspeed(2), recipe, run_dir, RECORDING, "train.zero_stage=1", "data.num_workers=0")
    first.at_step(7).signal_group(signal.SIGTERM).wait()
    assert "step-00000005" < max(p.name for p in (run_dir / "checkpoints").glob("step-*")) < "step-00000038"

    second = Run([sys.executable], recipe, run_dir, RECORDING, "data.num_workers=3", "train.micro_batch=4")
    second.at_step(20)
    (run_dir / "STOP").touch()
    assert second.wait() == 75, second.output.read_text()[-3000:]

    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    third = Run(torchrun, recipe, run_dir, RECORDING, "train.zero_stage=2", cwd=run_dir.parent)
    assert third.wait() == 0, third.output.read_text()[-3000:]
    return third


def test_every_sample_comes_exactly_once_an_epoch(uninterrupted):
    records = uninterrupted.records()
    assert sorted(records) == list(range(NUM_STEPS * 16))
    for epoch in range(NUM_STEPS * 16 // NUM_SAMPLES):
        positions = range(epoch * NUM_SAMPLES, (epoch + 1) * NUM_SAMPLES)
        assert sorted(records[p]["sample"] for p in positions) == list(range(NUM_SAMPLES))


def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(uninterrupted, killed):
    ours, theirs = killed.weights(NUM_STEPS), uninterrupted.weights(NUM_STEPS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert killed.records() == uninterrupted.records()


def test_metrics_have_one_line_a_step_after_a_kill(uninterrupted, killed):
    assert [line["step"] for line in killed.metrics()] == list(range(1, NUM_STEPS + 1))
    assert [line["loss"] for line in killed.metrics()] == [line["loss"] for line in uninterrupted.metrics()]


def test_another_size_sees_the_same_samples_crops_flips_and_masks(uninterrupted, resized):
    assert resized.records() == uninterrupted.records()


def test_another_size_ends_at_the_same_weights_but_for_rounding(uninterrupted, resized):
    ours, theirs = resized.weights(NUM_STEPS), uninterrupted.weights(NUM_STEPS)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    losses = zip(resized.metrics(), uninterrupted.metrics(), strict=True)
    assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-3) for a, b in losses)


def test_retention_keeps_the_newest_checkpoints(uninterrupted):
    names = sorted(path.name for path in (uninterrupted.run_dir / "checkpoints").glob("step-*"))
    assert names == ["step-00000035", "step-00000038"]


def test_a_finished_run_is_left_as_it_is(recipe, uninterrupted, monkeypatch):
    monkeypatch.setenv("RECORD_TO", str(uninterrupted.run_dir))
    before = uninterrupted.metrics()
    assert pretrain.main(["--config", str(recipe), f"run_dir={uninterrupted.run_dir}", RECORDING]) == 0
    assert uninterrupted.metrics() == before


def test_the_first_ten_losses_are_the_golden_ones(uninterrupted):
    """Written by `python tests/launch/test_survival.py RUN_DIR` when a change of the method is meant."""
    losses = [line["loss"] for line in uninterrupted.metrics()[:10]]
    assert losses == pytest.approx(json.loads(GOLDEN.read_text()), rel=2e-4)


def test_the_run_leaves_what_a_person_looks_for(uninterrupted):
    run_dir = uninterrupted.run_dir
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "pictures/reconstruction-00000020.png"):
        assert (run_dir / name).is_file(), name
    assert list((run_dir / "tensorboard").iterdir())
    line = uninterrupted.metrics()[-1]
    assert line["images_per_second"] > 0 and 0 <= line["data_wait"] <= 1 and line["eta_seconds"] == 0


if __name__ == "__main__":
    lines = (Path(sys.argv[1]) / "metrics.jsonl").read_text().splitlines()[:10]
    GOLDEN.write_text(json.dumps([json.loads(line)["loss"] for line in lines]) + "\n")
