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
from in_memory import MemoryLoader, NoStore
from runs import LAUNCHED, deepspeed

from prelude.data.errors import UserError
from prelude.pretrain.engine import Engine
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
def reference(name: str) -> tuple[dict, list[float], list[float]]:
    """The same training written out in plain torch: (weights, loss of each step, norm of its gradient)."""
    case = engine_cases.CASES[name]
    config = engine_cases.config_of(case, Path("x"))
    model = untrained(name)
    optimizer = build_optimizer(model, config)
    num_steps = math.ceil(config.train.epochs * engine_cases.NUM_SAMPLES / 8)
    losses, norms = [], []
    for step in range(num_steps):
        progress = Progress(step, num_steps, engine_cases.NUM_SAMPLES / 8)
        apply_schedule(optimizer.param_groups, config, progress)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        loss = model(engine_cases.batch_at(torch.arange(8) + 8 * step), progress).total
        losses.append(loss.item())
        optimizer.zero_grad()
        if step in case.get("bad_steps", ()):
            model.load_state_dict(before, strict=False)
            norms.append(math.nan)
            continue
        loss.backward()
        clipping = config.train.gradient_clipping or math.inf
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clipping).item())
        optimizer.step()
        model.after_step(progress, torch.ones(()))
    return model.state_dict(), losses, norms


def untrained(name: str) -> engine_cases.Regression:
    torch.manual_seed(0)
    return engine_cases.objective_of(engine_cases.CASES[name])


def found_in(runs: Path, name: str) -> dict:
    return json.loads((runs / f"{name}.json").read_text())


LOWER = ("bf16", "fp16_clipped", "fp16_one_bad_step", "auto_by_rank_0", "auto_and_on_elsewhere")
STOPPED = ("all_bad", "all_bad_hardly_logged", "bad_samples_above_the_share", "asked_while_saving",
           "full_disk_while_training")  # fmt: skip
OF_MICRO_BATCHES = ("bad_activations_accumulated",)  # which are all that a batch norm sees at once
SOUND = [name for name in engine_cases.CASES if name not in (*LOWER, *STOPPED, *OF_MICRO_BATCHES)]


@pytest.mark.parametrize("name", SOUND)
def test_training_equals_plain_torch_on_the_joined_batch(runs, name):
    weights, losses, norms = reference(name)
    ours = torch.load(runs / f"{name}.pt", weights_only=True)
    for key, value in weights.items():
        torch.testing.assert_close(ours[key], value, rtol=2e-5, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}")
    case, logged = engine_cases.CASES[name], found_in(runs, name)["records"]
    bad, every = case.get("bad_steps", ()), case.get("log", {}).get("every_steps", 1)
    assert [record["step"] for record in logged] == [s for s in range(1, 7) if s % every == 0 or s == 6]
    for record in logged:
        step = record["step"] - 1
        if step in bad:
            assert not math.isfinite(record["grad_norm"])
            continue
        assert record["loss"] == pytest.approx(losses[step], rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norms[step], rel=1e-5)
    assert logged[-1]["skipped_steps"] == len(bad)


# The second is told of the third step when the fourth has been taken, and none of them is logged
@pytest.mark.parametrize(("name", "steps"), [("all_bad", 3), ("all_bad_hardly_logged", 4)])
def test_a_run_that_stays_non_finite_stops_and_says_what_to_do(runs, name, steps):
    found = found_in(runs, name)
    assert "not finite (steps in a row: 3), the last being step 3" in found["message"]
    assert "optimizer.lr" in found["message"] and found["step"] == steps
    untouched, ours = untrained(name).state_dict(), torch.load(runs / f"{name}.pt", weights_only=True)
    assert all(torch.equal(ours[key], untouched[key]) for key in untouched)


def test_a_refused_step_leaves_the_statistics_of_norms_as_they_were_before_its_first_micro_batch(runs):
    found = found_in(runs, "bad_activations_accumulated")
    after = found["statistics"]
    assert len(after) == 6 and found["records"][-1]["skipped_steps"] == 1
    assert after[2] == after[1] and after[1] != after[0] and after[3] != after[2]
    assert all(torch.tensor(values).isfinite().all() for step in after for values in step.values())


def test_in_fp16_the_scale_is_out_of_the_gradients_before_they_are_looked_at_and_clipped(runs):
    weights, losses, norms = reference("fp16_clipped")
    records = found_in(runs, "fp16_clipped")["records"]
    assert [record["loss"] for record in records] == pytest.approx(losses, rel=5e-3)
    assert [record["grad_norm"] for record in records] == pytest.approx(norms, rel=5e-3)
    assert records[-1]["skipped_steps"] == 0 and min(norms) > 0.05  # all are clipped
    assert_moved_alike(runs, "fp16_clipped", weights)


def test_in_fp16_a_step_that_is_not_finite_is_refused_and_the_next_one_is_taken(runs):
    weights, losses, norms = reference("fp16_one_bad_step")
    records = found_in(runs, "fp16_one_bad_step")["records"]
    assert records[-1]["skipped_steps"] == 1 and records[-1]["loss"] == pytest.approx(losses[-1], rel=5e-3)
    assert records[-1]["grad_norm"] == pytest.approx(norms[-1], rel=5e-2)
    assert_moved_alike(runs, "fp16_one_bad_step", weights)


def assert_moved_alike(runs: Path, name: str, weights: dict) -> None:
    """From where they began to `weights`, on average to a few hundredths of the way."""
    start, ours = untrained(name).state_dict(), torch.load(runs / f"{name}.pt", weights_only=True)
    for key, value in weights.items():
        assert ours[key].dtype == torch.float32
        assert (ours[key] - value).abs().mean() < 0.03 * (value - start[key]).abs().mean(), key


def test_a_run_ends_above_a_share_of_bad_samples_whichever_rank_reads_them(runs):
    """Four of the twelve samples of each step; at its end those of the next one have been read too."""
    found = found_in(runs, "bad_samples_above_the_share")
    (message,) = {of_rank["message"] for of_rank in found["of_ranks"]}
    assert message.startswith("12 of 36 samples could not be read, more than data.max_bad_share=0.3; see ")
    assert message.endswith("bad_samples.jsonl.") and found["step"] == 2  # 8 are no more than a batch
    below = found_in(runs, "bad_samples_below_the_share")
    assert [record["bad_samples"] for record in below["records"]] == [8, 12, 16, 20, 24, 24]
    assert below["outcome"] == {"reason": "finished", "step": 6}


def test_what_torch_s_generator_gives_is_new_at_every_step_and_rank_and_the_same_in_every_run(runs):
    drawn, again, otherwise = (
        [of_rank["drawn"] for of_rank in found_in(runs, name)["of_ranks"]]
        for name in ("drawing", "drawing_again", "drawing_with_another_seed")
    )
    assert drawn == again and [len(of_rank) for of_rank in drawn] == [6] * int(runs.name)
    values = [value for of_rank in [*drawn, *otherwise] for value in of_rank]
    assert len(set(values)) == len(values) and all(0 <= value < 1 for value in values)


def test_the_peak_memory_is_that_of_the_rank_with_most(runs):
    records = found_in(runs, "plain")["records"]
    assert {record["peak_memory"] for record in records} == {engine_cases.PEAK_MEMORY * int(runs.name)}


def test_a_loss_over_the_whole_batch_is_not_accumulated(tmp_path):
    class OverTheBatch(engine_cases.Regression):
        accumulates = False

    config = engine_cases.config_of({"train": {"micro_batch": 2}}, tmp_path)
    loader = MemoryLoader(2, engine_cases.NUM_SAMPLES, engine_cases.batch_at)
    with pytest.raises(UserError, match="takes its loss over the whole batch, .* 4 micro-batches .*micro_batch=auto"):
        Engine(config, OverTheBatch(), loader, NoStore(), [])


def test_a_run_whose_encoder_would_never_move_does_not_begin(tmp_path):
    config = engine_cases.config_of({"train": {"freeze_encoder_steps": 6}}, tmp_path)
    loader = MemoryLoader(8, engine_cases.NUM_SAMPLES, engine_cases.batch_at)
    with pytest.raises(UserError, match="freeze_encoder_steps=6 would hold the encoder still to the end of .* 6 steps"):
        Engine(config, engine_cases.Regression(), loader, NoStore(), [])


def test_a_signal_during_a_save_leads_to_no_other_step_and_no_second_save(runs):
    found = found_in(runs, "asked_while_saving")
    assert found["outcome"] == {"reason": "preempted", "step": 4}
    assert found["saved"] == [2, 4] and len(found["records"]) == 4


def test_a_checkpoint_that_fails_while_training_goes_on_is_told_at_the_next_step(runs):
    found = found_in(runs, "full_disk_while_training")
    assert found["outcome"] is None and "step-00000004 could not be saved" in found["message"]
    assert "goes on from step-00000002" in found["message"]
    assert [record["step"] for record in found["records"]] == [1, 2, 3, 4]  # the fifth was taken and is lost
    assert sorted(path.name for path in (runs / "checkpoints").iterdir()) == ["latest", "step-00000002"]


def test_bf16_computes_in_lower_precision_and_keeps_float32_weights(runs):
    ours = torch.load(runs / "bf16.pt", weights_only=True)
    exact, *_ = reference("plain")
    assert all(value.dtype == torch.float32 for value in ours.values())
    difference = (ours["encoder.weight"] - exact["encoder.weight"]).abs().max()
    assert 1e-6 < difference < 0.05


def test_all_ranks_take_the_precision_that_rank_0_has_measured(runs):
    found = found_in(runs, "auto_by_rank_0")
    assert found["precision"] == "bf16 (a product in bf16 takes 0.5 times as long as in fp32)"
    ours, asked_for = (torch.load(runs / f"{name}.pt", weights_only=True) for name in ("auto_by_rank_0", "bf16"))
    assert all(torch.equal(ours[key], asked_for[key]) for key in asked_for)


def test_a_run_goes_on_in_its_precision_where_another_would_be_chosen(runs):
    found = found_in(runs, "auto_and_on_elsewhere")
    assert found["precision"] == "bf16 (as the run began)"
    assert found["notice"] == (
        "train.precision=auto goes on in bf16, as the run began; here it would choose fp32 (a product in bf16 takes 9 "
        "times as long as in fp32); write train.precision=fp32 to go on in that"
    )
