"""Learning rates and parameter groups that particular papers want, and that each key changes something."""

import math

import pytest
import torch
from torch import nn

from prelude.data.errors import UserError
from prelude.pretrain.config import Config
from prelude.pretrain.optimizers import apply_schedule, build_optimizer, scheduled
from prelude.pretrain.recipes import validate_config
from prelude.pretrain.schedules import Progress


def config(train=None, **optimizer) -> Config:
    return validate_config(
        {
            "run_dir": "x",
            "data": {"shards": "x"},
            "encoder": {"name": "x", "image_size": 8},
            "objective": {"name": "x"},
            "train": {"epochs": 1000, "global_batch": 2048} | (train or {}),
            "optimizer": {"lr": 0.2} | optimizer,
        },
        "a test",
    )


def model_with_bias() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


BARLOW = {"name": "lars", "weight_decay": 1e-6, "warmup_epochs": 10, "min_lr": 0.0002, "spared_lr_ratio": 0.024}


# The official schedule at batch 2048, 626 steps an epoch, 1000 epochs: weights, and biases and norms.
@pytest.mark.parametrize(
    ("step", "weights", "vectors"),
    [
        (0, 0, 0),
        (1, 2.5559105e-4, 6.1341853e-6),
        (3130, 0.8, 0.0192),
        (6260, 1.6, 0.0384),
        (313000, 0.81348008, 0.019523522),
        (625999, 0.0016, 3.84e-5),
    ],
)
def test_the_barlow_twins_schedule_has_the_published_values(step, weights, vectors):
    settings = config(**BARLOW)
    optimizer = build_optimizer(model_with_bias(), settings)
    apply_schedule(optimizer.param_groups, settings, Progress(step, 626_000, 626.0))
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"decayed": weights, "spared": vectors}, rel=1e-6, abs=1e-12)


def test_lars_computes_the_official_steps():
    """Two steps of one 1 x 2 weight from (3, 4), rate 1.6."""
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[3.0, 4.0]])
    settings = config(**BARLOW | {"lr": 1.6, "lr_rule": "absolute", "warmup_epochs": 0, "min_lr": 0})
    optimizer = build_optimizer(layer, settings)
    for gradient, expected in (((0.6, 0.8), (2.9952, 3.9936)), ((-1.0, 0.0), (2.9988672, 3.98783997))):
        apply_schedule(optimizer.param_groups, settings, Progress(0, 10**9, 1.0))
        layer.weight.grad = torch.tensor([gradient])
        optimizer.step()
        # timm divides by |g| + wd |p| where the official code divides by |g + wd p|: 1e-7 apart here
        torch.testing.assert_close(layer.weight.detach(), torch.tensor([expected]), rtol=1e-6, atol=0)


def test_what_lars_spares_moves_as_with_momentum_sgd():
    lars, sgd = model_with_bias(), model_with_bias()
    settings = config(**BARLOW)
    ours = build_optimizer(lars, settings)
    plain = torch.optim.SGD([p for p in sgd.parameters() if p.ndim == 1], lr=1.0, momentum=0.9)
    for step in range(1, 4):
        apply_schedule(ours.param_groups, settings, Progress(step, 1000, 1.0))
        plain.param_groups[0]["lr"] = next(group["lr"] for group in ours.param_groups if not group["decayed"])
        for p, q in zip(lars.parameters(), sgd.parameters(), strict=True):
            p.grad = torch.full_like(p, 0.5 * step)
            q.grad = p.grad.clone()
        ours.step()
        plain.step()
    for p, q in zip(lars.parameters(), sgd.parameters(), strict=True):
        assert torch.equal(p, q) == (p.ndim == 1)


ROTATION = {"name": "sgd", "lr": 0.1, "lr_rule": "absolute", "nesterov": True, "weight_decay": 5e-4}


def test_milestones_have_the_published_values_of_rotation_prediction():
    settings = config({"epochs": 200}, **ROTATION, milestones=[60, 120, 160], milestone_factor=0.2)
    steps_per_epoch = 50000 / 128
    for epoch, expected in [
        (0, 0.1),
        (59.999, 0.1),
        (60, 0.1 / 5),
        (119, 0.02),
        (120, 0.004),
        (160, 8e-4),
        (199, 8e-4),
    ]:
        lr, _ = scheduled(settings, Progress(round(epoch * 1000), 10**6, 1000.0))
        assert lr == pytest.approx(expected), epoch
    # An epoch need not be a whole number of steps: 60 of them end within step 23437
    rates = [scheduled(settings, Progress(step, 78125, steps_per_epoch))[0] for step in (23437, 23438)]
    assert rates == pytest.approx([0.1, 0.02])


def test_a_milestone_that_ends_with_a_step_is_not_a_step_late_by_floating_point():
    settings = config({"epochs": 200}, **ROTATION, milestones=[30, 60, 120])  # each of them at a whole step
    steps = [milestone + off for milestone in (15_625, 31_250, 62_500) for off in (-1, 0)]
    rates = [scheduled(settings, Progress(step, 104_167, 50_000 / 96))[0] for step in steps]
    assert rates == pytest.approx([0.1, 1e-2, 1e-2, 1e-3, 1e-3, 1e-4])


def test_a_warm_up_leads_to_the_first_plateau():
    settings = config({"epochs": 10}, lr=1.0, lr_rule="absolute", warmup_epochs=4, warmup_lr=0.2, milestones=[2, 6])
    rates = [scheduled(settings, Progress(epoch, 10, 1.0))[0] for epoch in (0, 2, 4, 6, 9)]
    assert rates == pytest.approx([0.2, 0.2 + (0.1 - 0.2) * 0.5, 0.1, 0.01, 0.01])


def test_nesterov_and_decayed_vectors_are_torch_s_sgd():
    ours, theirs = model_with_bias(), model_with_bias()
    settings = config({"epochs": 10}, **ROTATION | {"weight_decay": 0.1}, decay_vectors=True, milestones=[5])
    optimizer = build_optimizer(ours, settings)
    plain = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)
    for step in range(3):
        apply_schedule(optimizer.param_groups, settings, Progress(step, 10, 1.0))
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.step()
        plain.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("key", ["nesterov", "decay_vectors", "spared_lr_ratio", "milestones", "milestone_factor"])
def test_each_key_changes_what_is_trained(key):
    def trained(**changes):
        settings = config({"epochs": 4}, **ROTATION | {"weight_decay": 0.1} | changes)
        model = model_with_bias()
        optimizer = build_optimizer(model, settings)
        for step in range(4):
            apply_schedule(optimizer.param_groups, settings, Progress(step, 4, 1.0))
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    base = {"milestones": [3]} if key == "milestone_factor" else {}
    values = {
        "nesterov": False,
        "decay_vectors": True,
        "spared_lr_ratio": 0.5,
        "milestones": [2],
        "milestone_factor": 0.5,
    }
    assert not torch.equal(trained(**base), trained(**base, **{key: values[key]}))


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"name": "adamw", "nesterov": True}, "adamw has no nesterov; leave it out, or write name=sgd"),
        ({"name": "lars", "nesterov": True}, "lars has no nesterov"),
        ({"decay_vectors": True, "spared_lr_ratio": 0.1}, "leaves nothing undecayed for spared_lr_ratio"),
        ({"milestones": [5], "min_lr": 0.1}, "min_lr ends the cosine, which milestones replace; write one"),
        ({"milestone_factor": 0.2}, "milestone_factor has no effect without milestones; write both"),
        ({"milestones": [5, 3]}, "write epochs above 0 in growing order"),
        ({"milestones": [5, 1000]}, "which a run of train.epochs=1000 never reaches; leave it out"),
        ({"name": "lars", "weight_decay": 0}, "lars adapts only what is decayed; write a small weight_decay"),
        ({"name": "lars", "weight_decay_end": 0}, "lars adapts only what is decayed; write a small weight_decay"),
        ({"name": "lars", "decay_vectors": True}, "lars would adapt biases and norms"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(optimizer, message):
    with pytest.raises(UserError, match=message):
        config(**optimizer)


def test_lars_under_zero_is_refused_with_the_reason():
    with pytest.raises(UserError, match="needs the norm of each whole parameter, which ZeRO stage 1 splits"):
        config({"zero_stage": 1}, **BARLOW)


SPARK = {
    "name": "lamb",
    "lr": 2e-4,
    "weight_decay": 0.04,
    "weight_decay_end": 0.2,
    "warmup_epochs": 40,
    "warmup_lr": 1e-6,
    "min_lr": 2e-7,
}


# The official schedule at batch 4096, 313 steps an epoch, 1600 epochs: learning rate and weight decay
@pytest.mark.parametrize(
    ("step", "rate", "decay"),
    [
        (0, 1.6e-5, 0.04),
        (6260, 1.608e-3, 0.04006168),
        (12519, 3.1997457e-3, 0.04024658),
        (12520, 3.2e-3, 0.04024661),
        (250400, 1.6659561e-3, 0.12000025),
        (500799, 3.2e-6, 0.2),
    ],
)
def test_the_spark_schedule_has_the_published_values(step, rate, decay):
    settings = config({"epochs": 1600, "global_batch": 4096}, **SPARK)
    assert scheduled(settings, Progress(step, 500_800, 313.0)) == pytest.approx((rate, decay), rel=1e-5)


def test_lamb_computes_the_official_steps():
    """Two steps of one 1 x 2 weight from (3, 4), rate 0.1, decay 0.04; the second gradient, of norm 10, is cut to 5."""
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[3.0, 4.0]])
    optimizer = build_optimizer(layer, config(**SPARK | {"lr": 0.1, "lr_rule": "absolute"}))
    optimizer.param_groups[0].update(lr=0.1, weight_decay=0.04)
    for gradient, expected in (((0.6, 0.8), (2.65270281, 3.64029908)), ((6.0, 8.0), (2.34070373, 3.31542563))):
        layer.weight.grad = torch.tensor([gradient])
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 5.0)  # as the engine does with train.gradient_clipping=5
        optimizer.step()
        torch.testing.assert_close(layer.weight.detach(), torch.tensor([expected]), rtol=1e-6, atol=0)


def test_lamb_clips_nothing_by_itself():
    """Adam's direction forgets the size of a gradient, but not the sizes of gradients relative to each other."""
    weights = []
    for factor in (1.0, 100.0):
        layer = nn.Linear(2, 1, bias=False)
        layer.weight.data = torch.tensor([[3.0, 4.0]])
        optimizer = build_optimizer(layer, config(**SPARK))
        for gradient in ((0.06, 0.8), (0.6, -0.1)):
            layer.weight.grad = factor * torch.tensor([gradient])
            optimizer.step()
        weights.append(layer.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=0)


def test_spark_s_schedules_reach_their_ends_with_the_last_update():
    """The official code divides by steps - 1, for the rate and for the decay."""
    steps, warmup, peak = 313 * 1600, 313 * 40, 3.2e-3
    settings = config(
        {"epochs": 1600, "global_batch": 4096}, lr=2e-4, warmup_epochs=40, warmup_lr=1e-6, min_lr=2e-7,
        weight_decay=0.04, weight_decay_end=0.2, reach_end=True,
    )  # fmt: skip
    for step in (0, 1, warmup - 1, warmup, warmup + 1, 300_000, steps - 2, steps - 1):
        if step < warmup:
            rate = 0.005 * peak + 0.995 * peak * step / warmup
        else:
            rate = 0.001 * peak + 0.999 * peak * (
                0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - 1 - warmup))
            )
        decay = 0.2 + (0.04 - 0.2) * (0.5 + 0.5 * math.cos(math.pi * step / (steps - 1)))
        found = scheduled(settings, Progress(step, steps, 313.0))
        assert found == pytest.approx((rate, decay), rel=1e-9)
    without = config({"epochs": 10}, min_lr=0.01)
    assert scheduled(without, Progress(9, 10, 1.0))[0] > 1.01 * without.lr_factor * 0.01
