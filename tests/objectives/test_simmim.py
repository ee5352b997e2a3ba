"""SimMIM's mask, target, loss and encoders. Numbers of the official code: test_simmim_fixtures.py."""

import math
from dataclasses import replace

import pytest
import torch
from simmim_models import SWIN, VIT, closed_form, images, outcome, swin_names, the_mask, vit_names

from prelude.data.errors import UserError
from prelude.objectives import check_objective, options_for
from prelude.objectives.building import build_objective
from prelude.objectives.local_statistics import window_statistics
from prelude.objectives.masking import mask_noise
from prelude.objectives.replaced_patches import final_map
from prelude.objectives.simmim import num_hidden
from prelude.pretrain.recipes import validate_config
from prelude.pretrain.schedules import Progress
from prelude.pretrain.step_cost import blank_batch

SWIN_V2 = {
    "name": "swinv2_tiny_window8_256",
    "image_size": 32,
    "kwargs": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
}
FAMILIES = {
    "swin": SWIN.model_dump(exclude={"in_chans"}),
    "swin v2": SWIN_V2,
    "vit": VIT.model_dump(exclude={"in_chans"}),
    "vit with registers": VIT.model_dump(exclude={"in_chans"}) | {"kwargs": VIT.kwargs | {"reg_tokens": 2}},
    "eva": {"name": "vit_small_patch16_dinov3", "image_size": 32, "patch_size": 4, "kwargs": VIT.kwargs},
    "beit": {
        "name": "beit_base_patch16_224",
        "image_size": 32,
        "patch_size": 4,
        "kwargs": VIT.kwargs | {"use_fc_norm": False, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    },
    "oblong": SWIN.model_dump(exclude={"in_chans"}) | {"image_size": [32, 64]},
    "oblong patches": VIT.model_dump(exclude={"in_chans"}) | {"patch_size": [8, 4]},
}


def config(encoder, **objective):
    return validate_config(
        {
            "run_dir": "x",
            "data": {"shards": "x"},
            "encoder": encoder,
            "objective": {"name": "simmim", "mask_patch": 8} | objective,
            "train": {"epochs": 1, "global_batch": 4},
            "optimizer": {"lr": 1e-3},
        },
        "a test",
        options_for,
    )


@pytest.mark.parametrize(
    ("cells", "ratio", "hidden"), [(36, 0.6, 22), (49, 0.6, 30), (64, 0.6, 39), (144, 0.6, 87), (256, 0.6, 154),
                                   (100, 0.55, 55), (4, 0.01, 1)]
)  # fmt: skip
def test_so_many_cells_are_hidden(cells, ratio, hidden):
    assert num_hidden(cells, ratio) == hidden


def test_every_image_hides_as_many_cells_and_every_cell_as_often():
    objective = closed_form(SWIN, swin_names())
    hidden = objective.mask(mask_noise(torch.arange(4000), 16)).hidden
    assert (hidden.sum(1) == 10).all()
    assert (hidden.float().mean(0) - 10 / 16).abs().max() < 5 * math.sqrt(10 / 16 * 6 / 16 / 4000)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_pixels_never_reach_the_map_whatever_they_are(family):
    settings = config(FAMILIES[family])
    check_objective(settings)
    objective = build_objective(settings)
    height, width = settings.encoder.size
    pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    mask = objective.mask(mask_noise(torch.arange(2), objective.num_cells))
    hidden = mask.hidden.unflatten(1, objective.grid)[:, None].repeat_interleave(8, 2).repeat_interleave(8, 3)
    changed = pixels.masked_fill(hidden, math.nan)
    for training in (False, True):
        objective.train(training)
        assert torch.equal(objective.encode(changed, mask.hidden), objective.encode(pixels, mask.hidden))
    objective.decode(objective.encode(changed, mask.hidden)).square().mean().backward()
    encoder = objective.encoder
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters()), family
    assert not torch.equal(objective.encode(pixels + 0.1, mask.hidden), objective.encode(pixels, mask.hidden))


@pytest.mark.parametrize("family", FAMILIES)
def test_with_nothing_hidden_the_map_is_the_encoder_s_and_outside_of_a_call_nothing_is_replaced(family):
    objective = build_objective(config(FAMILIES[family])).eval()
    pixels = torch.randn(2, 3, *objective.views.views[0].size, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(2, objective.num_cells, dtype=torch.bool)
    before = objective.encoder(pixels)
    own = final_map(objective.encoder, pixels)
    assert torch.equal(objective.encode(pixels, nothing), own)
    assert not torch.equal(objective.encode(pixels, ~nothing), own)
    assert torch.equal(objective.encoder(pixels), before)


def test_only_hidden_pixels_carry_a_loss_and_all_alike():
    objective = closed_form(SWIN, swin_names())
    predicted = outcome(objective)[1].detach().requires_grad_()
    mask = the_mask()
    objective.loss(objective.reconstruction(images(), predicted, mask)).total.backward()
    hidden = mask.hidden.unflatten(1, (4, 4))[:, None].repeat_interleave(8, 2).repeat_interleave(8, 3)
    expected = hidden.expand(2, 3, 32, 32) / (3 * 2 * 10 * 64)
    torch.testing.assert_close(predicted.grad.abs(), expected.double())


def test_the_trivial_loss_of_plain_pixels_is_that_of_their_median():
    objective = closed_form(SWIN, swin_names())
    bright = objective.reconstruction(images() + 3, images(), the_mask())
    middle = bright.pixels.flatten(0, 1).quantile(0.5, dim=0, interpolation="lower")
    loss = objective.loss(replace(bright, predicted=middle.expand_as(bright.pixels)))
    assert loss.parts["trivial_loss"].item() == pytest.approx(loss.total.item(), rel=1e-9)
    mean = objective.loss(replace(bright, predicted=bright.pixels.mean((0, 1)).expand_as(bright.pixels)))
    assert mean.total.item() > loss.parts["trivial_loss"].item()


def test_visible_pixels_leave_a_raw_target_alone_and_reach_a_local_one_from_23_pixels_away():
    mask, pixels = the_mask(), images()
    changed = pixels.clone()
    changed[0, :, 0, 8] += 0.5  # the first pixel of the second cell, which is visible
    for window, far in [(None, False), (47, True)]:
        objective = closed_form(SWIN, swin_names(), target_window=window)
        before, after = (objective.reconstruction(x, x, mask) for x in (pixels, changed))
        moved = (after.pixels - after.mean) / after.scale - (before.pixels - before.mean) / before.scale
        moved = moved.abs() > 1e-9
        assert moved[0].any() == far and not moved[1].any()
    moved = (window_statistics(changed, 47)[0] - window_statistics(pixels, 47)[0])[0, 0].abs() > 1e-9
    assert moved[23, 31] and not moved[24].any()


def test_the_target_of_a_window_of_three_and_of_47():
    values = torch.tensor([[1.0, 2, 4], [0, 3, 5], [7, 6, 8]], dtype=torch.float64)[None, None]
    mean, scale = window_statistics(values, 3)
    expected = [[-0.3873, -0.2673, 0.3873], [-1.1363, -0.3651, 0.1543], [0.9487, 0.3986, 1.2010]]
    torch.testing.assert_close(((values - mean) / scale)[0, 0], torch.tensor(expected).double(), atol=6e-5, rtol=0)
    pixels = images(64, 1)
    mean, scale = window_statistics(pixels, 47)
    target = (pixels - mean) / scale
    assert target[0, 0, 0, :3].tolist() == pytest.approx([0.009501720254, 0.067550157794, 0.125313987107], abs=6e-13)
    assert target[0, 1, 31, 32].item() == pytest.approx(1.331300290688, abs=6e-13)
    assert target[0, 2, 63, 63].item() == pytest.approx(-0.645819585655, abs=6e-13)
    found = [target.abs().mean().item(), target.square().mean().item()]
    assert found == pytest.approx([0.896072313946, 0.980379405639], abs=6e-13)


@pytest.mark.parametrize("window", [3, 7, 47])
def test_windows_are_those_of_loops_over_pixels(window):
    pixels = torch.randn(1, 2, 9, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, scale = window_statistics(pixels, window)
    for row in range(9):
        for column in range(12):
            part = pixels[
                ...,
                max(row - window // 2, 0) : row + window // 2 + 1,
                max(column - window // 2, 0) : column + window // 2 + 1,
            ].flatten(2)
            torch.testing.assert_close(mean[..., row, column], part.mean(2), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(scale[..., row, column], (part.var(2) + 1e-6).sqrt(), rtol=1e-10, atol=1e-12)


def test_a_local_target_knows_neither_brightness_nor_contrast():
    def target(pixels):
        mean, scale = window_statistics(pixels, 7)
        return (pixels - mean) / scale

    pixels = images()
    assert target(torch.full_like(pixels, 3.0)).abs().max() < 1e-6
    torch.testing.assert_close(target(pixels + 1000), target(pixels), rtol=0, atol=1e-8)
    torch.testing.assert_close(target(pixels * 5), target(pixels), rtol=1e-4, atol=1e-6)
    whole = (pixels - pixels.mean((2, 3), keepdim=True)) / (pixels.var((2, 3), keepdim=True) + 1e-6).sqrt()
    mean, scale = window_statistics(pixels, 63)
    torch.testing.assert_close((pixels - mean) / scale, whole, rtol=1e-10, atol=1e-10)


def test_bright_flat_areas_keep_their_variance_in_single_precision():
    levels = torch.randint(253, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    bright = (levels / 255 - 0.45) / 0.225
    for ours, exact in zip(window_statistics(bright, 47), window_statistics(bright.double(), 47), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)


def test_the_head_s_channels_are_pixels_with_the_colour_slowest():
    objective = closed_form(SWIN, swin_names())
    features = torch.randn(1, 16, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat, picture = objective.head(features), objective.decode(features)
    for k, i, j, a, b in [(0, 0, 0, 0, 0), (2, 7, 3, 1, 0), (1, 4, 6, 0, 1)]:
        assert picture[0, k, 8 * a + i, 8 * b + j] == flat[0, k * 64 + i * 8 + j, a, b]


def test_a_plain_transformer_starts_with_weights_cut_at_one_deviation_and_scaled_by_depth():
    objective = build_objective(config(FAMILIES["vit"]))
    first, second = objective.encoder.blocks
    for weight in (first.attn.qkv.weight, objective.encoder.patch_embed.proj.weight, objective.encoder.cls_token):
        assert weight.abs().max() <= 0.02 and weight.std().item() == pytest.approx(0.0108, rel=0.2)
    assert second.mlp.fc2.weight.abs().max() <= 0.02 / 2 and first.mlp.fc2.weight.abs().max() > 0.013


def test_targets_and_loss_stay_float32_under_autocast():
    objective = build_objective(config(FAMILIES["swin"], target_window=7))
    batch = blank_batch(objective.views, 4)
    batch.views[0].copy_(torch.randint(0, 256, batch.views[0].shape, generator=torch.Generator().manual_seed(0)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective(batch, Progress(0, 10, 1.0))
    assert loss.total.dtype == torch.float32
    assert loss.total.item() == pytest.approx(objective(batch, Progress(0, 10, 1.0)).total.item(), rel=0.05)


def test_the_picture_shows_what_is_seen_predicted_and_there():
    objective = build_objective(config(FAMILIES["swin"], target_window=7))
    picture = objective.pictures(blank_batch(objective.views, 3))["reconstruction"]
    assert picture.size == (3 * 34 - 2, 3 * 34 - 2)


RESNET = {"name": "resnet18", "image_size": 32}
IMPOSSIBLE = [
    (RESNET, {}, "builds a ResNet, whose patches cannot be replaced by a token; write"),
    (
        FAMILIES["swin"],
        {"mask_patch": 6},
        "mask_patch=6 neither holds whole patches of 4x4",
    ),
    (FAMILIES["swin"], {"mask_patch": 12}, "nor cuts encoder.image_size=32x32 into whole cells"),
    (FAMILIES["swin"], {"mask_patch": 16, "mask_ratio": 0.9}, "leaves none to see; write objective.mask_ratio=0.6"),
    (
        FAMILIES["swin"] | {"image_size": [16, 32]},
        {"mask_patch": 16},
        "of 2 cells .* leaves none to see; write objective.mask_ratio=0.5",
    ),
    (FAMILIES["swin"] | {"image_size": 36}, {}, "no whole number of positions .*write encoder.image_size=40"),
]


@pytest.mark.parametrize(("encoder", "options", "message"), IMPOSSIBLE)
def test_what_cannot_work_is_refused_before_anything_is_built(encoder, options, message):
    with pytest.raises(UserError, match=message):
        check_objective(config(encoder, **options))


def test_a_window_without_a_middle_is_refused():
    with pytest.raises(UserError, match="write an odd number of pixels, such as 47"):
        config(FAMILIES["swin"], target_window=8)


def test_vit_and_swin_names_cover_every_parameter():
    closed_form(VIT, vit_names())
