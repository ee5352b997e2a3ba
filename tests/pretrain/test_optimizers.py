import pytest
import timm
import torch
from torch import nn

from prelude.data.errors import UserError
from prelude.pretrain.config import Config
from prelude.pretrain.optimizers import (
    TOKENS,
    apply_schedule,
    build_optimizer,
    parameter_groups,
    refuse_no_rate,
    scheduled,
)
from prelude.pretrain.schedules import Progress, cosine, warmup_cosine


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 3))
        self.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)


def config(**optimizer) -> Config:
    return Config.model_validate(
        {
            "run_dir": "x",
            "data": {"shards": "x"},
            "encoder": {"name": "x", "image_size": 8},
            "objective": {"name": "x"},
            "train": {"epochs": 800, "global_batch": 4096},
            "optimizer": {"lr": 1.5e-4} | optimizer,
        }
    )


def names(model, group):
    return {name for name, p in model.named_parameters() if any(p is q for q in group["params"])}


def test_vectors_and_biases_are_never_decayed_and_tokens_as_the_recipe_says():
    model = Model()
    decayed, spared = parameter_groups(model, decay_tokens=True)
    assert names(model, decayed) == {"linear.weight", "cls_token"}
    assert names(model, spared) == {"linear.bias", "norm.weight", "norm.bias"}
    decayed, spared = parameter_groups(model, decay_tokens=False)
    assert names(model, decayed) == {"linear.weight"}
    assert "cls_token" in names(model, spared)


def test_biases_and_frequencies_of_positions_are_never_decayed():
    model = nn.Module()
    model.rope, model.attn = nn.Module(), nn.Module()
    model.rope.freqs = nn.Parameter(torch.ones(2, 3, 2, 4))
    model.attn.relative_position_bias_table = nn.Parameter(torch.ones(5, 3))
    (spared,) = parameter_groups(model, decay_tokens=True)
    assert spared["name"] == "spared" and len(spared["params"]) == 2


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("swinv2_tiny_window8_256", "cpb_mlp"),
        ("levit_128s", "attention_biases"),
        ("efficientvit_m0", "attention_biases"),
        ("maxxvit_rmlp_nano_rw_256", "rel_pos"),
        ("mvitv2_tiny", "rel_pos_h"),
        ("hiera_tiny_224", "pos_embed"),
    ],
)
def test_what_timm_spares_is_spared(name, part):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    theirs = set(model.no_weight_decay()) & {name for name, _ in model.named_parameters()}
    assert any(part in name.split(".") for name in theirs)
    _, spared = parameter_groups(model, decay_tokens=False)
    assert theirs <= names(model, spared)
    decayed, _ = parameter_groups(model, decay_tokens=True)
    assert theirs & names(model, decayed) == {name for name in theirs if name.startswith(TOKENS)}


def test_temperatures_and_networks_of_biases_that_timm_forgets_are_spared():
    for name, part in (("xcit_nano_12_p8_224", "temperature"), ("swinv2_cr_tiny_ns_224", "meta_mlp")):
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
        decayed, _ = parameter_groups(model, decay_tokens=True)
        found = [name for name, _ in model.named_parameters() if part in name.split(".")]
        assert found and not names(model, decayed) & set(found)


def test_empty_groups_are_left_out():
    assert [group["name"] for group in parameter_groups(nn.Linear(2, 2, bias=False), decay_tokens=True)] == ["decayed"]


# Reference values of the MAE recipe at batch 4096 over 800 epochs, per epoch of 313 steps.
@pytest.mark.parametrize(
    ("epoch", "lr"), [(0, 0.0), (0.5, 3.0e-5), (20, 1.2e-3), (40, 2.4e-3), (420, 1.2e-3), (799.9, 1.03e-10)]
)
def test_the_mae_schedule_has_the_published_values(epoch, lr):
    progress = Progress(int(epoch * 1000), 800_000, 1000.0)
    value, weight_decay = scheduled(config(warmup_epochs=40), progress)
    assert value == pytest.approx(lr, rel=5e-3, abs=1e-12)
    assert weight_decay == 0.05


def test_weight_decay_follows_half_a_cosine_where_an_end_is_given():
    settings = config(weight_decay=0.04, weight_decay_end=0.4)
    decays = [scheduled(settings, Progress(step, 100, 10.0))[1] for step in (0, 50, 100)]
    assert decays == pytest.approx([0.04, 0.22, 0.4])


def test_the_ends_of_the_schedule_are_the_recipe_s_and_it_never_climbs_again():
    values = [warmup_cosine(step, warmup=10, total=50, start=1, peak=5, end=2) for step in (0, 5, 10, 50, 70)]
    assert values == pytest.approx([1, 3, 5, 2, 2])
    assert cosine(1, 0, 1.3) == 0


def test_warmup_lr_and_min_lr_follow_the_same_rule_as_lr():
    settings = config(warmup_lr=1e-5, min_lr=1e-6, warmup_epochs=1)
    first, _ = scheduled(settings, Progress(0, 100, 10.0))
    last, _ = scheduled(settings, Progress(100, 100, 10.0))
    assert (first, last) == pytest.approx((16e-5, 16e-6))


@pytest.mark.parametrize(("name", "kind"), [("adamw", "AdamW"), ("sgd", "SGD"), ("lars", "Lars"), ("lamb", "Lamb")])
def test_every_optimizer_takes_the_schedule(name, kind):
    settings = config(name=name, momentum=0.8) if name in ("sgd", "lars") else config(name=name, betas=(0.8, 0.9))
    model = Model()
    optimizer = build_optimizer(model, settings)
    assert type(optimizer).__name__ == kind
    assert {group.get("momentum", group.get("betas")) for group in optimizer.param_groups} <= {0.8, (0.8, 0.9)}
    lr, _ = apply_schedule(optimizer.param_groups, settings, Progress(400, 800, 1.0))
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(lr, 0.05), (lr, 0.0)]


def test_lars_computes_the_reference_steps():
    model = nn.Linear(2, 2)
    settings = config(name="lars", lr=0.1, lr_rule="absolute", weight_decay=0.01)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2], [3, 4]]))
        model.bias.copy_(torch.tensor([1.0, -1]))
    optimizer = build_optimizer(model, settings)
    apply_schedule(optimizer.param_groups, settings, Progress(0, 10**9, 1.0))
    for _ in range(2):
        model.weight.grad = torch.tensor([[0.1, -0.2], [0.3, 0.4]])
        model.bias.grad = torch.tensor([0.5, 0.25])
        optimizer.step()
    expected = torch.tensor([[0.9997033974, 2.0004853497], [2.9991101922, 3.9988135896]])
    # timm divides by |g| + wd |p| where the reference divides by |g + wd p|: equal to 3e-5 here
    torch.testing.assert_close(model.weight.detach(), expected, rtol=3e-5, atol=0)
    torch.testing.assert_close(model.bias.detach(), torch.tensor([0.855, -1.0725]))


@pytest.mark.parametrize(
    ("optimizer", "steps", "remedy"),
    [
        ({"warmup_epochs": 0.5}, 1, "optimizer.warmup_epochs=0"),
        ({"first_step": 1}, 1, "optimizer.first_step=0"),
        ({"first_step": 1, "reach_end": True}, 2, "optimizer.first_step=0"),
    ],
)
def test_a_run_whose_learning_rate_is_always_0_is_refused_and_one_step_more_is_not(optimizer, steps, remedy):
    told = f"A run of {steps} steps? would train nothing, .* learning rate is 0 .*{remedy}"
    with pytest.raises(UserError, match=told):
        refuse_no_rate(config(**optimizer), Progress(0, steps, 1.0))
    refuse_no_rate(config(**optimizer), Progress(0, steps + 1, 1.0))
    refuse_no_rate(config(), Progress(0, 1, 1.0))
