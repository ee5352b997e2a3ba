"""The gradient map, and MAE with it as a second target, against reference values and what must hold."""

import math
from dataclasses import replace

import pytest
import torch

from prelude.launch.made_up_data import made_up_batch
from prelude.objectives import check_objective, options_for
from prelude.objectives.building import build_objective
from prelude.objectives.gradient_map import gradient_map, grey
from prelude.objectives.mae import Gradients, Reconstruction
from prelude.objectives.masking import random_mask
from prelude.objectives.patches import patch_values
from prelude.pretrain.images import images
from prelude.pretrain.recipes import validate_config
from prelude.pretrain.schedules import Progress

TINY = {"name": "vit_tiny_patch16_224", "patch_size": 4, "kwargs": {"depth": 1, "embed_dim": 16, "num_heads": 2}}
START = Progress(0, 10, 4.0)


def image(height: int, width: int, channels: int = 3) -> torch.Tensor:
    c, y, x = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in (channels, height, width)], indexing="ij")
    return (0.5 + 0.45 * torch.sin(0.7 * y + 1.1 * x + 0.9 * c))[None]


def built(size=8, channels=3, mean=0.0, std=1.0, **options):
    small = {"name": "mae", "decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, "mask_ratio": 0.5}
    data = {"shards": "x", "channels": channels, "mean": [mean] * channels, "std": [std] * channels}
    config = validate_config(
        {
            "run_dir": "x",
            "data": data,
            "encoder": TINY | {"image_size": size},
            "objective": small | {"gradient_weight": 1.0} | options,
            "train": {"epochs": 1, "global_batch": 4},
            "optimizer": {"lr": 1e-3},
        },
        "a test",
        options_for,
    )
    check_objective(config)
    return build_objective(config)


# ---- the map


def test_the_reference_values():
    found = gradient_map(image(8, 8))[0, 0]
    assert grey(image(8, 8))[0, 0, 0, 0].item() == pytest.approx(0.7568741866, abs=6e-11)
    numbers = [found[2, 3], found[0, 1], found[0, 0], found.sum(), found.max()]
    expected = [0.2717550471, 0.2420113087, 0, 13.2445842244, 0.4088666585]
    assert [number.item() for number in numbers] == pytest.approx(expected, abs=6e-11)
    assert gradient_map(image(6, 7)).sum().item() == pytest.approx(8.1027717838, abs=6e-11)


def test_it_is_what_plain_convolutions_say():
    pixels = torch.rand(2, 3, 9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    derivative, smoothing = (torch.tensor(k, dtype=torch.float64) for k in ([-1, -2, 0, 2, 1], [1, 4, 6, 4, 1]))
    padded = torch.nn.functional.pad(grey(pixels), (2, 2, 2, 2), mode="reflect")
    kernels = torch.stack([smoothing[:, None] * derivative, derivative[:, None] * smoothing])[:, None]
    expected = torch.nn.functional.conv2d(padded, kernels).abs().sum(1, keepdim=True) / 96
    torch.testing.assert_close(gradient_map(pixels), expected, rtol=1e-12, atol=1e-14)


def test_a_shade_says_nothing_and_a_ramp_is_known():
    ramp = (torch.arange(8, dtype=torch.float64) / 7).expand(1, 3, 8, 8)
    row = gradient_map(ramp)[0, 0]
    assert torch.allclose(row[:, 2:6], torch.full((8, 4), 4 / 21, dtype=torch.float64))
    assert row[:, [0, 7]].abs().max() < 1e-12 and row[:, 1].tolist() == pytest.approx([1 / 7] * 8)
    constant = gradient_map(torch.full((1, 3, 6, 6), 0.4, dtype=torch.float64))
    assert constant.abs().max() < 1e-12


def test_negatives_shifts_and_flips():
    pixels = image(8, 8)
    found = gradient_map(pixels)
    for same in (1 - pixels, pixels + 0.3):
        torch.testing.assert_close(gradient_map(same), found, rtol=1e-10, atol=1e-12)
    for dim in (2, 3):
        torch.testing.assert_close(gradient_map(pixels.flip(dim)), found.flip(dim), rtol=1e-10, atol=1e-12)


def test_one_channel_is_grey_already_and_five_are_averaged():
    one = image(8, 8, channels=1)
    assert torch.equal(grey(one), one)
    torch.testing.assert_close(grey(image(8, 8, channels=5)), image(8, 8, channels=5).mean(1, keepdim=True))


# ---- beside pixels


def test_the_reference_loss_of_both_targets():
    """Mask (1, 0, 1, 1) of four patches of 4 x 4 pixels, 1 hidden."""
    mae = built(norm_pix_loss=False, mask_ratio=0.75).double()
    mask = random_mask(torch.tensor([[1.0, 0.0, 2.0, 3.0]]), 1)
    assert mask.removed.tolist() == [[0, 2, 3]]
    pixels, ids = image(8, 8), mask.removed
    i = ids[0][:, None].double()
    predicted = (0.5 + 0.1 * torch.sin(i + 0.3 * torch.arange(48, dtype=torch.float64)))[None].requires_grad_()
    of_map = (0.1 * torch.cos(i + 0.3 * torch.arange(16, dtype=torch.float64)))[None].requires_grad_()
    gradient = Gradients(of_map, patch_values(mae.gradient_of(pixels), mae.patch_size, ids))
    loss = mae.loss(Reconstruction(predicted, patch_values(pixels, mae.patch_size, ids), mask, ids, gradient))
    loss.total.backward()
    found = [loss.parts["pixel_mse"], loss.parts["gradient_mse"], loss.total, predicted.grad.norm(), of_map.grad.norm()]
    expected = [0.1053319577, 0.0713564509, 0.1766884086, 0.0540914754, 0.0771127156]
    assert [number.item() for number in found] == pytest.approx(expected, abs=6e-11)


def test_the_target_is_of_pixels_before_mean_and_deviation():
    plain, normalised = built(), built(mean=0.4, std=0.2)
    batch = made_up_batch(torch.arange(4), plain.views, 16)
    targets = []
    for mae in (plain, normalised):
        (pixels,) = images(batch, mae.views)
        targets.append(mae.gradient_of(pixels))
    torch.testing.assert_close(*targets, atol=1e-5, rtol=1e-5)
    shown = torch.where(batch.flips[:, 0, None, None, None], batch.views[0].flip(-1), batch.views[0])
    expected = gradient_map(shown / 255)
    torch.testing.assert_close(targets[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("decoder", [{}, {"decoder": "cross", "predicted_share": 0.25}, {"mask_block": 2}])
def test_each_target_has_a_decoder_of_its_own_and_weights_scale_its_loss(decoder):
    mae, heavy = built(size=16, **decoder), built(size=16, gradient_weight=3.0, **decoder)
    batch = made_up_batch(torch.arange(4), mae.views, 16)
    loss, other = mae(batch, START), heavy(batch, START)
    assert (other.total - loss.total).item() == pytest.approx(2 * loss.parts["gradient_mse"].item(), rel=1e-4)
    loss.total.backward()
    own = {name: p for name, p in mae.named_parameters() if name.startswith("gradient_decoder.")}
    assert own and all(p.grad is not None and p.grad.abs().sum() > 0 for p in own.values())
    assert not torch.equal(mae.decoder_blocks.state_dict().popitem()[1], own["gradient_decoder.decoder_pred.weight"])
    assert own["gradient_decoder.decoder_pred.weight"].shape == (16, 16)  # a map has one channel


def test_hidden_pixels_reach_neither_prediction():
    mae = built(size=16).double()
    pixels, other = image(16, 16), image(16, 16).flip(2)
    noise = torch.arange(16.0)[None]
    before = mae.reconstruct(pixels, noise)
    hidden = before.mask.hidden.view(1, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    after = mae.reconstruct(torch.where(hidden, other, pixels), noise)
    assert torch.equal(before.gradient.predicted, after.gradient.predicted)
    assert not torch.equal(before.gradient.target, after.gradient.target)


def test_without_the_second_target_nothing_is_drawn_or_named_otherwise():
    plain, both = built(gradient_weight=0.0), built()
    assert {*both.state_dict()} - {*plain.state_dict()} == {
        name for name in both.state_dict() if name.startswith("gradient_decoder.")
    }
    assert plain.gradient_decoder is None
    batch = made_up_batch(torch.arange(4), plain.views, 16)
    assert [*plain.pictures(batch)] == ["reconstruction"] and [*both.pictures(batch)] == ["reconstruction", "gradient"]
    assert "gradient_mse" not in plain(batch, START).parts


def test_the_trivial_loss_is_that_of_the_mean_map():
    mae = built(norm_pix_loss=False)
    batch = made_up_batch(torch.arange(4), mae.views, 16)
    (pixels,) = images(batch, mae.views)
    result = mae.reconstruct(pixels, torch.arange(4.0).expand(4, -1))
    best = Gradients(result.gradient.target.mean().expand_as(result.gradient.target), result.gradient.target)
    same = result.pixels.mean((0, 1)).expand_as(result.pixels)
    nothing = replace(result, predicted=same, gradient=best)
    loss = mae.loss(nothing)
    nearer = result.pixels.mean(1).var(0).mean() / len(pixels)  # to the mean of these images than to that of all
    assert loss.parts["trivial_loss"].item() == pytest.approx((loss.total + nearer).item(), rel=1e-5)
    assert math.isfinite(loss.total.item())
