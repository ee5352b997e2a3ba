"""Uni4Eye's half for volumes, against reference values and what must hold; the other half is MAE's."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from prelude.data.errors import UserError
from prelude.launch.made_up_data import made_up_batch, made_up_volumes
from prelude.objectives import check_objective, options_for
from prelude.objectives.building import build_objective
from prelude.objectives.cubes import cut, gather_cubes, join
from prelude.objectives.gradient_map import gradient_map
from prelude.objectives.masking import mask_noise
from prelude.pretrain.position import sincos_table, volume_table
from prelude.pretrain.recipes import validate_config
from prelude.pretrain.schedules import Progress
from prelude.pretrain.step_cost import step_cost
from prelude.pretrain.utilisation import Utilisation
from prelude.pretrain.volumes import NOISE_STD, Volumes, standardised, volumes

VIT = {"name": "vit_tiny_patch16_224", "patch_size": 4, "kwargs": {"depth": 1, "embed_dim": 24, "num_heads": 2}}
SMALL = {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
START = Progress(0, 10, 4.0)


def configured(encoder=None, name="uni4eye", **options):
    of_volumes = {"volume_size": [12, 8, 8], "volume_patch": 4} if name == "uni4eye" else {}
    return validate_config(
        {
            "run_dir": "x",
            "data": {"shards": "x", "volumes": {"shards": "y"}} if name == "uni4eye" else {"shards": "x"},
            "encoder": VIT | {"image_size": 16} | (encoder or {}),
            "objective": {"name": name} | SMALL | of_volumes | options,
            "train": {"epochs": 1, "global_batch": 4},
            "optimizer": {"lr": 1e-3},
        },
        "a test",
        options_for,
    )


def built(**options):
    config = configured(**options)
    check_objective(config)
    return build_objective(config)


def wave(height: int, width: int, depth: int) -> torch.Tensor:
    y, x, z = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in (height, width, depth)], indexing="ij")
    return (0.5 + 0.45 * torch.sin(0.7 * y + 1.1 * x + 0.5 * z))[None, None]


# ---- positions, patches and maps


def test_the_reference_rows_of_the_table():
    of_8 = [0.9092974268, 0.0199986667, -0.4161468365, 0.9998000067, 0.8414709848, 0.0099998333, 0.5403023059]
    of_8 += [0.9999500004]
    of_depth = [0.8414709848, 0.0998334166, 0.0099998333, 0.0009999998, 0.5403023059, 0.9950041653, 0.9999500004]
    of_depth += [0.9999995000]
    table = volume_table(16, (2, 3, 2))
    assert table[11].tolist() == pytest.approx(of_8 + of_depth, abs=1e-7)
    assert table.sum().item() == pytest.approx(100.8943895359, abs=1e-4)  # of float32
    assert sincos_table(8, (3, 3))[5].tolist() == pytest.approx(of_8, abs=1e-7)


@pytest.mark.parametrize("width", [32, 1024])
def test_every_place_of_a_volume_has_a_row_of_its_own(width):
    table = volume_table(width, (14, 14, 7))
    assert len(table.unique(dim=0)) == len(table) == 1372
    torch.testing.assert_close(table.square().sum(1), torch.full((1372,), width / 2.0))


def test_patches_come_row_by_row_with_the_depth_fastest():
    y, x, z = torch.meshgrid(*[torch.arange(4.0)] * 3, indexing="ij")
    patches = cut((100 * y + 10 * x + z)[None, None], (2, 2, 2))[0]
    assert patches[:, 0].tolist() == [0, 2, 20, 22, 200, 202, 220, 222]
    assert patches[1].tolist() == [2, 3, 12, 13, 102, 103, 112, 113]


def test_join_inverts_cut_and_some_patches_are_read_where_they_lie():
    voxels, size, grid = torch.arange(2 * 3 * 4 * 6 * 8.0).view(2, 3, 4, 6, 8), (2, 3, 4), (2, 2, 2)
    patches = cut(voxels, size)
    assert patches.shape == (2, 8, 72) and torch.equal(join(patches, size, grid), voxels)
    ids = torch.tensor([[7, 0, 3], [5, 5, 1]])
    some = gather_cubes(voxels, size, ids).permute(0, 1, 3, 4, 5, 2).flatten(2)
    assert torch.equal(some, patches[torch.arange(2)[:, None], ids])


def test_the_reference_map_of_a_volume():
    found = gradient_map(wave(6, 5, 4))[0, 0]
    assert found[2, 3, 1].item() == pytest.approx(0.1279577814, abs=6e-11)
    assert found.sum().item() == pytest.approx(18.6770859850, abs=6e-10)


def test_a_volume_that_is_the_same_at_all_depths_has_two_thirds_of_the_image_s_map():
    plane = wave(8, 7, 1)[..., 0]
    expected = gradient_map(plane) * 2 / 3
    found = gradient_map(plane[..., None].expand(-1, -1, -1, -1, 5))
    torch.testing.assert_close(found, expected[..., None].expand_as(found), rtol=1e-12, atol=1e-14)


def test_the_map_of_a_volume_commutes_with_flips_and_is_what_plain_convolutions_say():
    voxels = torch.rand(2, 1, 6, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = gradient_map(voxels)
    for axis in (2, 3, 4):
        torch.testing.assert_close(gradient_map(voxels.flip(axis)), found.flip(axis), rtol=1e-10, atol=1e-12)
    d, s = (torch.tensor(k, dtype=torch.float64) for k in ([-1, -2, 0, 2, 1], [1, 4, 6, 4, 1]))
    kernels = torch.stack([torch.einsum("i,j,k->ijk", *k) for k in ((d, s, s), (s, d, s), (s, s, d))])[:, None]
    padded = torch.nn.functional.pad(voxels, (2,) * 6, mode="reflect")
    expected = torch.nn.functional.conv3d(padded, kernels).abs().mean(1, keepdim=True) / 768
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


# ---- what the encoder sees


def plain_volumes(count=4, plan=None):
    return made_up_volumes(torch.arange(count), plan or built().views.volumes, 16)


def test_voxels_that_are_not_zero_have_mean_0_and_variance_1():
    unit = torch.rand(3, 2, 5, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    unit[0, :, :2] = 0
    unit[2, 1] = 0  # a channel that is empty
    found = standardised(unit)
    assert torch.equal(found == 0, unit == 0)
    for b, c in ((0, 0), (1, 1), (2, 0)):
        inside = found[b, c][unit[b, c] > 0]
        assert inside.mean().item() == pytest.approx(0, abs=1e-12)
        assert inside.square().mean().item() == pytest.approx(1)
    assert standardised(torch.full((1, 1, 3, 3, 3), 0.3)).abs().max() == 0


def test_flips_and_noise_are_functions_of_the_seed_alone():
    plan = replace(built().views.volumes, noise=0.5)
    batch = made_up_volumes(torch.arange(64), plan, 64)
    whole, part = volumes(batch, plan), volumes(batch._map(lambda t: t[[9, 3]]), plan)
    for one, other in ((whole.unit, part.unit), (whole.standardised, part.standardised)):
        assert torch.equal(one[[9, 3]], other)
    seen, flipped = batch.views[0].float() / 255, torch.zeros(64, 3)
    for sample in range(64):
        axes = [[a for a in range(3) if n >> a & 1] for n in range(8)]
        same = [dims for dims in axes if torch.equal(seen[sample].flip([a + 1 for a in dims]), whole.unit[sample])]
        assert len(same) == 1
        flipped[sample, same[0]] = 1
    assert (flipped.mean(0) - 0.5).abs().max() < 0.2 and flipped.unique(dim=0).shape[0] == 8
    noise = (whole.standardised - standardised(whole.unit)).flatten(1)
    noisy = noise.std(1) > 0
    assert 20 <= noisy.sum() <= 44 and noise[noisy].std().item() == pytest.approx(NOISE_STD, rel=0.03)
    assert abs(noise[noisy].mean().item()) < 0.003
    still = replace(plan, flip=0.0, noise=0.0)
    assert torch.equal(volumes(batch, still).unit, seen)


def test_both_kinds_have_the_numbers_of_patches_of_the_paper():
    of = {"encoder": VIT | {"image_size": 224, "patch_size": 16}, "volume_size": [224, 224, 112], "volume_patch": 16}
    config = configured(**of)
    with torch.device("meta"):
        objective = build_objective(config)
    assert (objective.num_patches, objective.num_cubes) == (196, 1372)
    assert objective.volume_embed.weight.shape == (24, 1, 16, 16, 16)
    assert built(**of | {"volume_size": [112, 112, 64]}).num_cubes == 196


def test_moving_a_patch_changes_what_the_encoder_makes_of_it():
    objective = built().double()
    voxels = torch.rand(1, 1, 12, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    there = torch.arange(12)[None]
    features = objective.encode_volumes(voxels, there)[:, 1:]
    for swap in ([1, 0, *range(2, 12)], [2, 1, 0, *range(3, 12)], [4, *range(1, 4), 0, *range(5, 12)]):
        moved = join(cut(voxels, (4, 4, 4))[:, swap], (4, 4, 4), (3, 2, 2))
        assert not torch.allclose(objective.encode_volumes(moved, there)[:, 1:], features[:, swap], atol=1e-3)


def test_the_projection_is_that_of_the_convolution_and_order_says_nothing():
    objective = built().double()
    voxels = torch.rand(2, 1, 12, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = objective.volume_embed(voxels).flatten(2).mT + objective.volume_pos_embed
    cls = objective.encoder.cls_token.expand(2, -1, -1)
    expected = objective.encoder.norm(objective.encoder.blocks(torch.cat([cls, tokens], dim=1)))
    keep = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(n)) for n in range(2)])
    found = objective.encode_volumes(voxels, keep)
    torch.testing.assert_close(found[:, :1], expected[:, :1])
    torch.testing.assert_close(found[:, 1:], expected[:, 1:][torch.arange(2)[:, None], keep])
    torch.testing.assert_close(objective.volume_features(voxels), expected[:, 1:].mean(1))


# ---- targets and the loss


@pytest.mark.parametrize("changes", [{}, {"volume_channels": 3, "volume_patch": [6, 4, 2], "norm_pix_loss": True}])
def test_the_loss_is_that_of_hidden_patches_of_voxels_and_of_the_map(changes):
    """Written out a second time over whole volumes."""
    objective = built(gradient_weight=0.5, **changes)
    plan = objective.views.volumes
    batch = plain_volumes(3, plan)
    loss = objective(batch, START)
    seen = volumes(batch, plan)
    mask = objective.volume_mask(mask_noise(batch.seeds, objective.num_cubes))
    result = objective.decode_volumes(seen, objective.encode_volumes(seen.standardised, mask.keep), mask)
    hidden = mask.hidden[..., None]
    for predicted, whole, name in (
        (result.predicted, seen.standardised, "voxel_mse"),
        (result.gradient.predicted, gradient_map(seen.unit), "volume_gradient_mse"),
    ):
        target = cut(whole, objective.cube)
        full = torch.zeros_like(target).scatter(1, mask.removed[..., None].expand_as(predicted), predicted)
        if changes.get("norm_pix_loss") and name == "voxel_mse":
            mean, std = target.mean(-1, keepdim=True), (target.var(-1, keepdim=True) + 1e-6).sqrt()
            full = full * std + mean
        expected = ((full - target).square() * hidden).sum() / (hidden.sum() * target.shape[-1])
        assert loss.parts[name].item() == pytest.approx(expected.item(), rel=1e-5)
    if not changes:
        total = loss.parts["voxel_mse"] + 0.5 * loss.parts["volume_gradient_mse"]
        assert loss.total.item() == pytest.approx(total.item(), rel=1e-5)


def test_hidden_voxels_reach_no_prediction_and_visible_ones_no_loss():
    objective = built()
    voxels = [torch.rand(1, 1, 12, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (0, 1)]
    mask = objective.volume_mask(torch.arange(12.0)[None])
    assert (mask.keep.shape, mask.removed.shape) == ((1, 6), (1, 6))

    def decoded(pixels):
        seen = Volumes(pixels, pixels)
        return objective.decode_volumes(seen, objective.encode_volumes(pixels, mask.keep), mask)

    is_hidden = join(mask.hidden[..., None].expand(-1, -1, 64).float(), (4, 4, 4), (3, 2, 2)) > 0
    before, after = decoded(voxels[0]), decoded(torch.where(is_hidden, voxels[1], voxels[0]))
    assert torch.equal(before.predicted, after.predicted)
    assert torch.equal(before.gradient.predicted, after.gradient.predicted)
    assert not torch.equal(before.pixels, after.pixels)
    assert torch.equal(before.pixels, cut(voxels[0], (4, 4, 4))[:, 6:])  # of hidden ones alone, in their order


def test_masks_hide_the_share_that_is_asked_for_by_the_seed_alone():
    objective = built(mask_ratio=0.75)
    noise = mask_noise(plain_volumes(3).seeds, 12)
    mask = objective.volume_mask(noise)
    assert mask.removed.shape == (3, 9)
    assert torch.equal(objective.volume_mask(noise[[2]]).removed[0], mask.removed[2])


def test_each_kind_leaves_the_other_s_own_parts_alone_and_shares_the_rest():
    objective = built()
    reached = {}
    for kind, batch in (
        ("images", made_up_batch(torch.arange(4), objective.views, 16)),
        ("volumes", plain_volumes(4, objective.views.volumes)),
    ):
        objective.zero_grad(set_to_none=True)
        objective(batch, START).total.backward()
        reached[kind] = {n for n, p in objective.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    own = {
        "images": {"encoder.patch_embed.proj", "decoder_pred", "gradient_decoder.decoder_pred"},
        "volumes": {"volume_embed", "volume_pred", "volume_gradient_pred"},
    }
    every = {name for name, p in objective.named_parameters()}
    for kind, other in (("images", "volumes"), ("volumes", "images")):
        left = every - reached[kind]
        assert left == {f"{part}.{name}" for part in own[other] for name in ("weight", "bias")}


def test_of_images_it_is_mae_with_gradient_maps_number_by_number():
    both, mae = built(), build_objective(configured(name="mae", gradient_weight=1.0, mask_ratio=0.5, flip=0.0,
                                                     norm_pix_loss=False))  # fmt: skip
    shared = mae.state_dict()
    assert {name for name in both.state_dict() if name not in shared} == {
        f"{part}.{name}"
        for part in ("volume_embed", "volume_pred", "volume_gradient_pred")
        for name in ("weight", "bias")
    }
    quieter = {name for name, value in shared.items() if not torch.equal(both.state_dict()[name], value)}
    assert quieter == {"gradient_decoder.decoder_pred.weight"}
    both.load_state_dict(shared, strict=False)
    batch = made_up_batch(torch.arange(4), mae.views, 16)
    one, other = both(batch, START), mae(batch, START)
    assert torch.equal(one.total, other.total) and one.parts.keys() == other.parts.keys()
    assert replace(both.views, volumes=None) == mae.views
    assert both.views.fingerprint() == mae.views.fingerprint()


def test_the_first_losses_are_those_of_who_sees_nothing():
    """Louder first predictions are silenced by an encoder that makes all volumes alike."""
    parts = built(norm_pix_loss=True)(plain_volumes(4), START).parts
    assert parts["volume_gradient_mse"] < 0.05  # 1.2 by weights as Xavier has them
    loss = built(norm_pix_loss=True, gradient_weight=0.0)(plain_volumes(4), START)
    assert loss.total.item() == pytest.approx(loss.parts["volume_trivial_loss"].item(), rel=0.01)
    of_images = built()(made_up_batch(torch.arange(4), built().views, 16), START).parts
    assert of_images["gradient_mse"] < 0.05


def test_its_own_parts_start_as_xavier_says_and_last_layers_a_hundred_times_smaller():
    objective = built()
    fan_in, fan_out = 64, 24
    bound = math.sqrt(6 / (fan_in + fan_out))
    weight = objective.volume_embed.weight
    assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    for head, outputs in ((objective.volume_pred, 64), (objective.volume_gradient_pred, 64)):
        assert head.bias.abs().max() == 0
        bound = 0.01 * math.sqrt(6 / (16 + outputs))
        assert head.weight.abs().max() <= bound and head.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_the_log_tells_kinds_apart_and_without_the_second_target_nothing_of_it_is_there():
    objective, plain = built(), built(gradient_weight=0.0)
    batch = plain_volumes(4, objective.views.volumes)
    assert {"voxel_mse", "volume_gradient_mse", "volume_trivial_loss", "volume_feature_std"} <= objective(
        batch, START
    ).parts.keys()
    parts = plain(batch, START).parts
    assert "voxel_mse" in parts and not {"volume_gradient_mse", "gradient_mse", "pixel_mse"} & parts.keys()
    assert [*plain.pictures(batch)] == ["volume_reconstruction"]
    assert not any("gradient" in name for name, _ in plain.named_parameters())


def test_pictures_show_slices_of_what_is_hidden_predicted_and_there():
    objective = built()
    batch = plain_volumes(3, objective.views.volumes)
    pictures = objective.pictures(batch)
    assert [*pictures] == ["volume_reconstruction", "volume_gradient"]
    page = torch.from_numpy(np.array(pictures["volume_reconstruction"]))
    assert page.shape == (3 * 12 + 2 * 2, 9 * 8 + 8 * 2, 3)
    seen = volumes(batch, objective.views.volumes).standardised
    hidden = objective.volume_mask(mask_noise(batch.seeds, 12)).hidden[..., None].expand(-1, -1, 64)
    hidden = join(hidden.float(), (4, 4, 4), (3, 2, 2)) > 0
    for row in range(3):
        low, high = seen[row].min(), seen[row].max()
        for nth, depth in enumerate((2, 4, 6)):
            shown, filled, original = (page[14 * row :, 10 * (3 * nth + k) :][:12, :8, 0] for k in range(3))
            expected = ((seen[row, 0, :, :, depth] - low) / (high - low) * 255).round()
            assert (original - expected).abs().max() <= 1
            there = ~hidden[row, 0, :, :, depth]
            assert torch.equal(shown, torch.where(there, original, 0))
            assert torch.equal(filled[there], original[there])
    assert [*objective.pictures(made_up_batch(torch.arange(2), objective.views, 16))] == ["reconstruction", "gradient"]


# ---- what cannot work

BEIT = {"name": "beit_base_patch16_224", "kwargs": {"use_abs_pos_emb": True, "global_pool": "token"}}
IMPOSSIBLE = [
    ({"volume_size": [12, 9, 8]}, r"\[12, 9, 8\] is not a whole number of patches .* write volume_size=\[12, 8, 8\]"),
    ({"volume_size": [4, 4, 2], "volume_patch": [2, 2, 1]}, "too flat for a gradient map.* gradient_weight=0"),
    ({"volume_size": [4, 4, 4]}, "mask_ratio=0.5 of the 1 patches of a volume leaves none to see; write a smaller"),
    (
        {"volume_size": [4, 4, 4], "volume_patch": 1, "norm_pix_loss": True},
        "patches of a volume, .* write objective.norm_pix_loss=false",
    ),
    ({"encoder": {"pos_embed": "learned"}}, "pos_embed=learned tells only places of a plane apart"),
    ({"encoder": BEIT}, "only places of a plane"),
    ({"encoder": {"name": "resnet18", "patch_size": None, "kwargs": {}}}, "builds a ResNet"),
    ({"decoder_dim": 4, "decoder_num_heads": 2}, "objective.decoder_dim=4 is too narrow"),
    ({"mask_block": 2}, "objective.mask_block does not exist"),
]


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE)
def test_what_cannot_work_is_refused_before_anything_is_built(changes, message):
    with pytest.raises(UserError, match=message):
        check_objective(configured(**changes))


def test_both_kinds_are_wanted_or_none():
    config = configured()
    without = config.model_copy(update={"data": config.data.model_copy(update={"volumes": None})})
    with pytest.raises(UserError, match="uni4eye learns from images and volumes, and data.volumes is missing; write"):
        check_objective(without)
    with pytest.raises(UserError, match="name=mae learns from images alone.* leave it out, or write"):
        check_objective(config.model_copy(update={"objective": configured(name="mae").objective}))


# ---- what a run costs


def test_a_plan_takes_the_mean_of_both_kinds_for_time_and_the_larger_for_memory():
    objective, mae = built(), build_objective(configured(name="mae", gradient_weight=1.0, mask_ratio=0.5))
    images, volumes, both = (step_cost(objective, volume_share=share) for share in (0.0, 1.0, 0.25))
    assert images.flops.largest(4) == pytest.approx(step_cost(mae).flops.largest(4))
    assert volumes.flops.largest(4) != images.flops.largest(4)
    assert both.flops.largest(4) == pytest.approx(0.75 * images.flops.largest(4) + 0.25 * volumes.flops.largest(4))
    heavy = step_cost(built(volume_size=[24, 24, 24]))
    for needs in ("held", "beside_gradients", "kept"):
        assert getattr(both, needs).largest(4) >= getattr(step_cost(mae), needs).largest(4)
        assert getattr(heavy, needs).largest(4) > 2 * getattr(both, needs).largest(4)


def test_no_share_of_the_peak_is_told_where_steps_cost_what_their_kind_costs():
    used = Utilisation(1e9)
    used.look_at(built(), configured(), "fp32")
    with used.counting(plain_volumes()):
        torch.ones(8, 8) @ torch.ones(8, 8)
    assert used.at(10.0) is None
