"""I-JEPA: what a prediction may depend on, what the loss is, how the teacher follows."""

import copy

import numpy as np
import pytest
import torch
from jepa_models import START, a_batch, encoder_config, gradients, mark, pixels_of, predictions_of, some_images, tiny

from prelude.data.errors import UserError
from prelude.objectives import check_objective
from prelude.objectives.blocks import BlockMasks
from prelude.objectives.ijepa import IJEPA, IJEPAOptions, gather
from prelude.objectives.momentum_teacher import follow, momentum_teacher
from prelude.pretrain.config import Config, OptimizerConfig
from prelude.pretrain.encoders import forward_tokens
from prelude.pretrain.feature_health import feature_health
from prelude.pretrain.optimizers import parameter_groups, scheduled
from prelude.pretrain.schedules import Progress
from prelude.pretrain.step_cost import Ledger, step_cost

GRID = (8, 8)


def drawn(model, count=2, step=0):
    return model.blocks.draw(torch.arange(count), step)


# What depends on what


def test_changing_pixels_outside_the_context_never_changes_the_prediction():
    model, images = tiny().double(), some_images()
    masks = drawn(model)
    context = pixels_of(mark(masks.context, 64), GRID)
    predicted = predictions_of(model, images, masks)
    changed = torch.where(context, images, some_images(seed=9))
    assert torch.equal(predictions_of(model, changed, masks), predicted)
    assert not torch.equal(predictions_of(model, torch.where(context, some_images(seed=9), images), masks), predicted)


def test_changing_target_pixels_changes_the_target_alone():
    model, images = tiny().double(), some_images()
    masks = drawn(model)
    changed = torch.where(pixels_of(mark(masks.targets, 64), GRID), some_images(seed=9), images)
    assert torch.equal(predictions_of(model, changed, masks), predictions_of(model, images, masks))
    before, after = (gather(model.normalised(model.teach(x)), masks.targets) for x in (images, changed))
    assert (after - before).abs().amax((1, 2, 3)).min() > 1e-4


@pytest.mark.parametrize("predictor", ["repeat", "packed"])
def test_moving_one_target_block_changes_the_prediction_of_that_block_alone(predictor):
    model, images = tiny(predictor=predictor).double(), some_images()
    masks = drawn(model)
    moved = masks.targets.clone()
    moved[:, 2] = (moved[:, 2] + 3) % 64
    before = predictions_of(model, images, masks)
    after = predictions_of(model, images, BlockMasks(masks.context, moved))
    torch.testing.assert_close(after[:, [0, 1, 3]], before[:, [0, 1, 3]], rtol=0, atol=1e-13)
    assert (after[:, 2] - before[:, 2]).abs().max() > 1e-4


@pytest.mark.parametrize("predictor", ["repeat", "packed"])
def test_the_order_of_blocks_does_not_matter_and_the_loss_is_the_mean_over_blocks(predictor):
    model, images = tiny(predictor=predictor).double(), some_images()
    masks = drawn(model)
    target = model.normalised(model.teach(images))
    error = model.error(predictions_of(model, images, masks), gather(target, masks.targets))  # (B, M, T)
    shuffled = BlockMasks(masks.context, masks.targets[:, [3, 0, 2, 1]])
    other = model.error(predictions_of(model, images, shuffled), gather(target, shuffled.targets))
    torch.testing.assert_close(other, error[:, [3, 0, 2, 1]], rtol=0, atol=1e-13)
    torch.testing.assert_close(error.mean(), error.mean((0, 2)).mean(), rtol=0, atol=1e-14)


def test_packed_computes_something_else_than_repeat():
    """In one sequence context tokens do not see mask tokens; with them hidden in `repeat` too, both agree."""
    model, images = tiny().double(), some_images()
    masks = drawn(model)
    repeat = predictions_of(model, images, masks)
    model.options = model.options.model_copy(update={"predictor": "packed"})
    packed = predictions_of(model, images, masks)
    assert (packed - repeat).abs().max() > 1e-6
    context = forward_tokens(model.encoder, images, masks.context)
    num_context, num_targets = masks.context.shape[1], masks.targets.shape[2]
    visible = torch.ones(num_context + num_targets, num_context + num_targets, dtype=torch.bool)
    visible[:num_context, num_context:] = False
    alone = model.predictor(context, masks.context, masks.targets, visible[None, None])
    torch.testing.assert_close(alone, packed, rtol=0, atol=1e-12)


def test_the_predictor_equals_one_written_for_a_single_target_block():
    model, images = tiny().double(), some_images()
    masks, p = drawn(model), model.predictor
    context = forward_tokens(model.encoder, images, masks.context)
    for m in range(4):
        known = p.embed(context) + p.pos_embed[masks.context]
        asked = p.mask_token + p.pos_embed[masks.targets[:, m]]
        tokens = torch.cat([known, asked], dim=1)
        for block in p.blocks:
            tokens = block(tokens)
        expected = p.proj(p.norm(tokens[:, -asked.shape[1] :]))
        torch.testing.assert_close(predictions_of(model, images, masks)[:, m], expected, rtol=0, atol=1e-13)


# Target and loss


def test_targets_have_mean_zero_and_variance_one_over_channels():
    model = tiny().double()
    target = model.normalised(model.teach(some_images()))
    assert target.shape == (2, 64, 32) and target.dtype == torch.float64
    assert target.mean(-1).abs().max() < 1e-12
    features = model.teach(some_images())
    variance = features.var(-1, correction=0)
    torch.testing.assert_close(target.var(-1, correction=0), variance / (variance + 1e-5), rtol=1e-9, atol=0)


def test_the_loss_is_smooth_l1_in_numpy():
    model, batch = tiny(), a_batch(4)
    loss = model(batch, START).total.item()
    from prelude.pretrain.images import images as device_images

    (images,) = device_images(batch, model.views)
    masks = model.blocks.draw(batch.seeds, START.step)
    features = model.teach(images).numpy().astype(np.float64)
    normal = (features - features.mean(-1, keepdims=True)) / np.sqrt(features.var(-1, keepdims=True) + 1e-5)
    target = np.stack([normal[b][masks.targets[b].numpy()] for b in range(4)])
    distance = np.abs(predictions_of(model, images, masks).detach().numpy() - target)
    expected = np.where(distance < 1, 0.5 * distance**2, distance - 0.5).mean()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_target_and_loss_stay_float32_under_bf16_autocast():
    model, batch = tiny(), a_batch(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(batch, START)
        target = model.normalised(model.teach(some_images().float()))
    assert low.total.dtype == target.dtype == torch.float32
    assert low.total.item() == pytest.approx(model(batch, START).total.item(), rel=0.03)


def test_other_grids_work_in_the_same_code():
    for size, patch in [((64, 32), 8), ((40, 56), 8), (56, 8)]:
        model = tiny(size=size, patch=patch)
        sides = (size, size) if isinstance(size, int) else size
        loss = model(a_batch(2, sides), START).total
        loss.backward()
        assert loss.isfinite()


# The teacher


def test_gradients_reach_everything_but_the_teacher():
    model = tiny()
    model(a_batch(), START).total.backward()
    found = gradients(model)
    trained = {name for name, p in model.named_parameters() if not name.startswith("teacher.")}
    assert set(found) == trained
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    assert not any(p.requires_grad for p in model.teacher.parameters())


def test_the_teacher_is_the_exponential_moving_average():
    student = tiny().encoder
    teacher = momentum_teacher(student)
    before = copy.deepcopy(teacher.state_dict())
    for parameter in student.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    follow(teacher, student, torch.tensor(0.25))
    for name, value in teacher.state_dict().items():
        expected = 0.75 * before[name].double() + 0.25 * student.state_dict()[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(teacher.pos_embed, before["pos_embed"])
    frozen = copy.deepcopy(teacher.state_dict())
    follow(teacher, student, torch.tensor(0.0))
    assert all(torch.equal(value, frozen[name]) for name, value in teacher.state_dict().items())
    follow(teacher, student, torch.tensor(1.0))
    torch.testing.assert_close(list(teacher.parameters()), list(student.parameters()))


def test_the_teacher_still_moves_at_momenta_near_one():
    """A difference of 0.1 at momentum 0.9999: what bf16 weights would lose altogether."""
    student = torch.nn.Linear(1, 1)
    teacher = momentum_teacher(student)
    student.weight.data.fill_(1.0), teacher.weight.data.fill_(0.9)
    for _ in range(20_000):
        follow(teacher, student, torch.tensor(0.0001))
    assert teacher.weight.item() == pytest.approx(1 - 0.1 * 0.9999**20_000, rel=1e-3)


def test_momentum_follows_the_applied_step_alone(monkeypatch):
    """The released schedule: 0.996 + (k - 1) 0.004 / T after the k-th step of T."""
    seen = []
    monkeypatch.setattr(
        "prelude.objectives.ijepa.follow", lambda teacher, student, share: seen.append(1 - share.item())
    )
    model = tiny()
    for k in (1, 25_000, 106_250, 187_500):
        model.after_step(Progress(k, 187_500, 625.0), torch.ones(()))
    assert seen == pytest.approx([0.996, 0.996533312, 0.9982666453, 0.99999997867], abs=1e-9)


def test_the_teacher_drops_nothing_whatever_mode_is_set():
    config = encoder_config(drop_path_rate=0.9)
    from prelude.pretrain.encoders import build_encoder

    options = IJEPAOptions(predictor_dim=16, predictor_depth=1)
    model = IJEPA(build_encoder(config, seed=0), options, image_size=(32, 32), mean=(0.0,) * 3, std=(1.0,) * 3)
    model.train()
    assert model.encoder.training and not any(module.training for module in model.teacher.modules())
    images = some_images().float()
    assert torch.equal(model.teach(images), model.teach(images))


def test_the_teacher_is_what_is_exported_and_starts_as_the_encoder():
    model = tiny()
    assert model.exported_encoder() is model.teacher
    assert all(torch.equal(a, b) for a, b in zip(model.teacher.parameters(), model.encoder.parameters(), strict=True))
    prefixes = {name.split(".")[0] for name in model.state_dict()}
    assert prefixes == {"encoder", "teacher", "predictor"}


def test_zero_stage_3_is_refused_with_a_reason():
    values = {
        "run_dir": "x",
        "data": {"shards": "none"},
        "encoder": encoder_config().model_dump(),
        "objective": {"name": "ijepa", "predictor_num_heads": 12},
        "train": {"epochs": 1, "global_batch": 8, "zero_stage": 3},
        "optimizer": {"lr": 1e-3},
    }
    with pytest.raises(UserError, match="write train.zero_stage=2"):
        check_objective(Config.model_validate(values))


# Weights, schedules, options


def test_initial_weights_are_those_of_the_released_code():
    model = tiny(predictor_dim=64)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.35), name
        else:
            assert (parameter == ("norm" in name and name.endswith("weight"))).all(), name
    scaled = tiny(depth_scaled_init=True)
    for layer in range(3):
        for weight in (scaled.encoder.blocks[layer].attn.proj.weight, scaled.encoder.blocks[layer].mlp.fc2.weight):
            assert weight.std().item() == pytest.approx(0.02 / (2 * layer + 2) ** 0.5, rel=0.1)
    assert scaled.predictor.blocks[1].mlp.fc2.weight.std().item() == pytest.approx(0.01, rel=0.15)
    louder = tiny(patch_init_std=0.08)
    assert louder.teacher.patch_embed.proj.weight.std().item() == pytest.approx(0.08, rel=0.1)
    assert louder.encoder.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    balanced = tiny(patch_init_std="balanced")
    projection = balanced.encoder.patch_embed.proj.weight
    expected = 0.02 * (768 / projection[0].numel()) ** 0.5  # the patch size decides, whatever it is overridden to
    assert projection.std().item() == pytest.approx(expected, rel=0.1)


def test_the_mask_token_is_decayed_and_biases_are_not():
    groups = {group["name"]: group["params"] for group in parameter_groups(tiny(), decay_tokens=True)}
    model = tiny()
    groups = {group["name"]: group["params"] for group in parameter_groups(model, decay_tokens=True)}
    assert any(p is model.predictor.mask_token for p in groups["decayed"])
    assert all(p.ndim <= 1 for p in groups["spared"])
    frozen = set(model.teacher.parameters())
    assert not frozen & set(groups["decayed"] + groups["spared"])


def recipe(**optimizer):
    common = {
        "lr": 1e-3, "lr_rule": "absolute", "warmup_lr": 2e-4, "min_lr": 1e-6, "warmup_epochs": 40,
        "weight_decay": 0.04, "weight_decay_end": 0.4, "first_step": 1, "betas": (0.9, 0.999),
    }  # fmt: skip
    return Config.model_validate(
        {
            "run_dir": "x",
            "data": {"shards": "none"},
            "encoder": {"name": "none", "image_size": 224},
            "objective": {"name": "ijepa"},
            "train": {"epochs": 300, "global_batch": 2048},
            "optimizer": common | optimizer,
        }
    )


def test_learning_rate_and_weight_decay_are_the_released_schedules():
    """Values of the released code for 300 epochs of 625 steps, at its k-th step."""
    expected = {
        1: (2.00032e-4, 0.04000000003),
        12_500: (6.0e-4, 0.0439334319),
        25_000: (1e-3, 0.0555618176),
        106_250: (5.005e-4, 0.2574241043),
        187_500: (1e-6, 0.4),
    }
    for k, (lr, weight_decay) in expected.items():
        got = scheduled(recipe(), Progress(k - 1, 187_500, 625.0))
        assert got[0] == pytest.approx(lr, rel=1e-9)
        assert got[1] == pytest.approx(weight_decay, abs=1e-9)


def test_weight_decay_can_rise_linearly_as_the_papers_text_says():
    _, middle = scheduled(recipe(weight_decay_schedule="linear"), Progress(93_749, 187_500, 625.0))
    assert middle == pytest.approx(0.22)
    assert OptimizerConfig(lr=1e-3).first_step == 0


def test_a_predictor_that_its_heads_do_not_divide_is_refused():
    with pytest.raises(UserError, match="predictor_dim=100 must be a multiple of 4 and of its 12"):
        IJEPA.check(IJEPAOptions(predictor_dim=100), encoder_config(num_heads=12, embed_dim=48))


# Seeing what happens


def test_collapse_shows_in_the_log():
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(256, 16, generator=generator)
    health = feature_health(spread)
    assert health["feature_std"] == pytest.approx(1, abs=0.05)
    assert health["feature_rank"] == pytest.approx(16, abs=1.5)
    assert health["feature_cosine"] == pytest.approx(0, abs=0.01)
    line = torch.randn(256, 1, generator=generator) * torch.ones(16) + 100
    assert feature_health(line)["feature_rank"] == pytest.approx(1, abs=1e-3)
    assert feature_health(line)["feature_cosine"] > 0.99
    point = feature_health(torch.ones(8, 16))
    assert point["feature_std"] == 0 and point["feature_rank"].isfinite()
    wide = torch.randn(8, 64, generator=generator)
    eigenvalues = torch.linalg.svdvals(wide - wide.mean(0)).square()
    expected = eigenvalues.sum() ** 2 / eigenvalues.square().sum()
    assert feature_health(wide)["feature_rank"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_what_is_logged_and_drawn():
    model = tiny()
    parts = model(a_batch(), START).parts
    health = {"feature_std", "feature_rank", "feature_rank_share", "feature_cosine"}
    assert set(parts) == health | {"teacher_cosine", "prediction_std"}
    assert not any(value.requires_grad for value in parts.values())
    picture = model.pictures(a_batch(3))["blocks"]
    assert picture.width > 6 * 128 and picture.height > 3 * 128


# What it costs


def watched(model, step, count=4):
    """(FLOPs of an image, most bytes at once) of a step that is really taken."""
    with Ledger([*model.parameters(), *model.buffers()]) as ledger:
        model(a_batch(count), Progress(step, 1000, 10.0)).total.backward()
    model.zero_grad()
    return ledger.flops / count, max(ledger.course)


@pytest.mark.parametrize(
    ("options", "too_much"),
    [
        ({}, 0.1),
        ({"predictor": "packed"}, 0.1),
        ({"masks": "official", "target_scale": (0.2, 0.26)}, 0.5),  # cut to the poorest image, which no plan knows
    ],
    ids=str,
)
def test_a_plan_tells_the_memory_of_the_largest_blocks_and_the_flops_of_usual_ones(options, too_much):
    """By those of the first step an H100 took half as much again as was told."""
    model = tiny(**options)
    flops, memory = zip(*(watched(model, step) for step in range(0, 60, 4)), strict=True)  # the 56th has the largest
    cost = step_cost(model)
    assert max(memory) * 0.95 < cost.held.largest(4) < max(memory) * (1 + too_much)
    assert -0.06 < cost.flops.largest(4) / 4 / (sum(flops) / len(flops)) - 1 < too_much
