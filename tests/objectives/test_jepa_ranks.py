"""I-JEPA and DSeq-JEPA through the real launcher: one rank, two ranks and plain torch compute the same."""

import json
import os
import subprocess
from functools import cache
from pathlib import Path

import jepa_cases
import pytest
import torch
from runs import LAUNCHED, deepspeed

from prelude.pretrain.optimizers import apply_schedule, build_optimizer
from prelude.pretrain.schedules import Progress

NAMES = list(jepa_cases.CASES)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{number of ranks: folder of results}"""
    out = tmp_path_factory.mktemp("ranks")
    env = os.environ | LAUNCHED
    command = [*deepspeed(2), jepa_cases.__file__, str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {ranks: out / str(ranks) for ranks in (1, 2)}


@cache
def reference(name: str) -> tuple[dict, list[float]]:
    """The same training written out in plain torch: (weights, loss of each step)."""
    config = jepa_cases.config_of(name, Path("x"))
    model = jepa_cases.objective_of(name, config)
    optimizer = build_optimizer(model, config)
    num_steps = jepa_cases.CASES[name].get("steps", jepa_cases.STEPS)
    losses = []
    for step in range(num_steps):
        progress = Progress(step, num_steps, jepa_cases.NUM_SAMPLES / 8)
        apply_schedule(optimizer.param_groups, config, progress)
        loss = model(jepa_cases.batch_at(torch.arange(8) + 8 * step), progress).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step(Progress(step + 1, num_steps, progress.steps_per_epoch), torch.ones(()))
        losses.append(loss.item())
    return model.state_dict(), losses


def weights(runs, ranks, label):
    return torch.load(runs[ranks] / f"{label}.pt", weights_only=True)


def logged(runs, ranks, label):
    return json.loads((runs[ranks] / f"{label}.json").read_text())


def drawn(runs, ranks, label) -> dict:
    """{(what, step, position): digest} over all ranks."""
    found = {}
    for path in runs[ranks].glob(f"{label}.rank*.jsonl"):
        for line in path.read_text().splitlines():
            what, step, position, digest = json.loads(line)
            assert found.setdefault((what, step, position), digest) == digest
    return found


@pytest.mark.parametrize("name", NAMES)
def test_masks_regions_and_decisions_are_the_same_at_any_number_of_ranks(runs, name):
    alone, shared = drawn(runs, 1, name), drawn(runs, 2, name)
    assert alone == shared
    whats = {"masks", "lambda", "regions"} if name.startswith("dseq") else {"masks"}
    steps = jepa_cases.CASES[name].get("steps", jepa_cases.STEPS)
    assert set(alone) == {(what, p // 8, p) for what in whats for p in range(8 * steps)}


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_agree_between_one_rank_and_two(runs, name):
    for alone, shared in zip(logged(runs, 1, name), logged(runs, 2, name), strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], rel=2e-6)
        assert shared["grad_norm"] == pytest.approx(alone["grad_norm"], rel=2e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("gradient")])
def test_single_gradients_agree_between_one_rank_and_two(runs, name):
    """One step of plain gradient descent at rate 1: weights moved by their gradient."""
    start = jepa_cases.objective_of(name, jepa_cases.config_of(name, runs[1])).state_dict()
    alone, shared = weights(runs, 1, name), weights(runs, 2, name)
    moved = 0
    for key in (key for key in start if not key.startswith("teacher.")):
        expected, got = alone[key] - start[key], shared[key] - start[key]
        moved += bool(expected.abs().max() > 0)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-7, msg=lambda text, key=key: f"{key}: {text}")
    assert moved > 30


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_weights_and_teacher_are_those_of_plain_torch(runs, ranks, name):
    """At ZeRO stages 0, 1 and 2: the teacher follows weights that all ranks already agree on."""
    state, losses = reference(name)
    assert [line["loss"] for line in logged(runs, ranks, name)] == pytest.approx(losses, rel=1e-5)
    ours, followed = weights(runs, ranks, name), 0.0
    for key, value in state.items():
        # Adam turns a gradient's rounding error into a step where the gradient is next to nothing.
        assert (ours[key] - value).abs().max() < (2e-4 if key.endswith("bias") else 2e-5), key
        if key.startswith("teacher."):
            followed = max(followed, (value - ours[key.replace("teacher.", "encoder.")]).abs().max().item())
    assert len(losses) == 1 or followed > 1e-4  # a teacher that were the student would pass all of the above


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_has_the_same_teacher_lambda_and_decisions_to_the_bit(runs, ranks):
    whole, resumed = weights(runs, ranks, jepa_cases.RESUMED), weights(runs, ranks, "resumed")
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    half = jepa_cases.STEPS // 2
    later = {key: value for key, value in drawn(runs, ranks, jepa_cases.RESUMED).items() if key[1] >= half}
    assert later == drawn(runs, ranks, "resumed")
    for then, now in zip(logged(runs, ranks, jepa_cases.RESUMED)[half:], logged(runs, ranks, "resumed"), strict=True):
        for key in ("loss", "lr", "weight_decay", "grad_norm", "parts"):
            assert then[key] == now[key], key


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_teacher_is_what_a_checkpoint_says_it_exports(runs, ranks):
    from prelude.checkpoints.sources import open_encoder

    opened = open_encoder(str(runs[ranks] / "ijepa_zero2" / "checkpoints"))
    held = weights(runs, ranks, "ijepa_zero2")
    for name, value in opened.model.state_dict().items():
        assert torch.equal(value, held[f"teacher.{name}"])
    assert any(not torch.equal(held[f"teacher.{n}"], held[f"encoder.{n}"]) for n in opened.model.state_dict())
