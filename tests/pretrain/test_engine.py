"""The engine through the real launcher, on one and two ranks, against plain torch on the joined batch."""

import json
import math
import os
import subprocess
from functools import cache
from pathlib import Path

import engine_cases
import pytest
import torch
from runs import LAUNCHED, deepspeed

from prelude.pretrain.optimizers import apply_schedule, build_optimizer
from prelude.pretrain.schedules import Progress


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("worlds")
    command = [*deepspeed(2), engine_cases.__file__, str(out)]
    env = os.environ | LAUNCHED
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


@pytest.fixture(params=[1, 2], ids=["1 rank", "2 ranks"])
def runs(request, launched) -> Path:
    return launched / str(request.param)


@cache
def reference(name: str) -> tuple[dict, list[float]]:
    """The same training written out in plain torch: (weights, loss of each step)."""
    case = engine_cases.CASES[name]
    config = engine_cases.config_of(case, Path("x"))
    torch.manual_seed(0)
    model = engine_cases.Regression(norm=case.get("norm", False))
    optimizer = build_optimizer(model, config)
    num_steps = math.ceil(config.train.epochs * engine_cases.NUM_SAMPLES / 8)
    losses = []
    for step in range(num_steps):
        progress = Progress(step, num_steps, engine_cases.NUM_SAMPLES / 8)
        apply_schedule(optimizer.param_groups, config, progress)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        loss = model(engine_cases.batch_at(torch.arange(8) + 8 * step), progress).total
        losses.append(loss.item())
        optimizer.zero_grad()
        if step in case.get("bad_steps", ()):
            model.load_state_dict(before, strict=False)
            continue
        loss.backward()
        if config.train.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.gradient_clipping)
        optimizer.step()
        model.after_step(progress, torch.ones(()))
    return model.state_dict(), losses


LOWER = ("bf16", "auto_by_rank_0", "auto_and_on_elsewhere")
UNSOUND = (*LOWER, "all_bad", "asked_while_saving", "full_disk_while_training")
SOUND = [name for name in engine_cases.CASES if name not in UNSOUND]


@pytest.mark.parametrize("name", SOUND)
def test_training_equals_plain_torch_on_the_joined_batch(runs, name):
    weights, losses = reference(name)
    ours = torch.load(runs / f"{name}.pt", weights_only=True)
    for key, value in weights.items():
        torch.testing.assert_close(ours[key], value, rtol=2e-5, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}")
    logged = json.loads((runs / f"{name}.json").read_text())["records"]
    bad = engine_cases.CASES[name].get("bad_steps", ())
    for step, (record, loss) in enumerate(zip(logged, losses, strict=True)):
        assert step in bad or record["loss"] == pytest.approx(loss, rel=1e-5)
    assert logged[-1]["skipped_steps"] == len(bad)


def test_a_run_that_stays_non_finite_stops_and_says_what_to_do(runs):
    logged = json.loads((runs / "all_bad.json").read_text())
    assert "not finite (steps in a row: 3)" in logged["message"]
    assert "optimizer.lr" in logged["message"]
    torch.manual_seed(0)
    untouched = engine_cases.Regression().state_dict()
    ours = torch.load(runs / "all_bad.pt", weights_only=True)
    assert all(torch.equal(ours[key], untouched[key]) for key in untouched)


def test_a_signal_during_a_save_leads_to_no_other_step_and_no_second_save(runs):
    found = json.loads((runs / "asked_while_saving.json").read_text())
    assert found["outcome"] == {"reason": "preempted", "step": 4}
    assert found["saved"] == [2, 4] and len(found["records"]) == 4


def test_a_checkpoint_that_fails_while_training_goes_on_is_told_at_the_next_step(runs):
    found = json.loads((runs / "full_disk_while_training.json").read_text())
    assert found["outcome"] is None and "step-00000004 could not be saved" in found["message"]
    assert "goes on from step-00000002" in found["message"]
    assert [record["step"] for record in found["records"]] == [1, 2, 3, 4]  # the fifth was taken and is lost
    assert sorted(path.name for path in (runs / "checkpoints").iterdir()) == ["latest", "step-00000002"]


def test_bf16_computes_in_lower_precision_and_keeps_float32_weights(runs):
    ours = torch.load(runs / "bf16.pt", weights_only=True)
    exact, _ = reference("plain")
    assert all(value.dtype == torch.float32 for value in ours.values())
    difference = (ours["encoder.weight"] - exact["encoder.weight"]).abs().max()
    assert 1e-6 < difference < 0.05


def test_all_ranks_take_the_precision_that_rank_0_has_measured(runs):
    found = json.loads((runs / "auto_by_rank_0.json").read_text())
    assert found["precision"] == "bf16 (a product in bf16 takes 0.5 times as long as in fp32)"
    ours, asked_for = (torch.load(runs / f"{name}.pt", weights_only=True) for name in ("auto_by_rank_0", "bf16"))
    assert all(torch.equal(ours[key], asked_for[key]) for key in asked_for)


def test_a_run_goes_on_in_its_precision_where_another_would_be_chosen(runs):
    found = json.loads((runs / "auto_and_on_elsewhere.json").read_text())
    assert found["precision"] == "bf16 (as the run began)"
    assert found["notice"] == (
        "train.precision=auto goes on in bf16, as the run began; here it would choose fp32 (a product in bf16 takes 9 "
        "times as long as in fp32); write train.precision=fp32 to go on in that"
    )
