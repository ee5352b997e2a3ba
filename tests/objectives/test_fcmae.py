"""FCMAE against numbers of the official code (facebookresearch/ConvNeXt-V2) in double precision, and its invariants.

Weights and images are closed forms: tensor number i of the list filled with 0.2 sin(0.37 j + 0.11 i), norm weights one
more. The reference has global response norms of each image, as the authors' own results do.
"""

import math
from dataclasses import replace

import pytest
import timm
import torch

from prelude.data.errors import UserError
from prelude.objectives import check_objective, options_for
from prelude.objectives.building import build_objective
from prelude.objectives.fcmae import FCMAE, num_visible
from prelude.objectives.masking import PatchMask, mask_noise, random_mask
from prelude.objectives.options import FCMAEOptions
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import build_encoder, lay_out_encoder
from prelude.pretrain.recipes import validate_config
from prelude.pretrain.schedules import Progress
from prelude.pretrain.step_cost import blank_batch

CELLS = ["101110011", "110011110"]  # 1: hidden
ENCODER = EncoderConfig(name="convnextv2_tiny", image_size=96, kwargs={"depths": [1, 1, 1, 1], "dims": [4, 6, 8, 10]})
BLOCK = "conv_dw.weight conv_dw.bias norm.weight norm.bias mlp.fc1.weight mlp.fc1.bias mlp.grn.weight mlp.grn.bias "
BLOCK += "mlp.fc2.weight mlp.fc2.bias"


def names() -> list[str]:
    found = [f"encoder.stem.{place}.{kind}" for place in (0, 1) for kind in ("weight", "bias")]
    for stage in range(4):
        if stage:
            kinds = [(place, kind) for place in (0, 1) for kind in ("weight", "bias")]
            found += [f"encoder.stages.{stage}.downsample.{place}.{kind}" for place, kind in kinds]
        found += [f"encoder.stages.{stage}.blocks.0.{name}" for name in BLOCK.split()]
    found += ["project.weight", "project.bias", "mask_token"]
    found += [f"decoder.0.{name}" for name in BLOCK.split()]
    return [*found, "to_pixels.weight", "to_pixels.bias"]


def closed_form(norm_pix_loss=True) -> FCMAE:
    options = FCMAEOptions(norm_pix_loss=norm_pix_loss, decoder_dim=12)
    encoder = build_encoder(ENCODER, seed=0)
    fcmae = FCMAE(encoder, options, image_size=(96, 96), mean=(0.0,) * 3, std=(1.0,) * 3).double()
    parameters = {name: p for name, p in fcmae.named_parameters() if p.requires_grad}
    assert sorted(parameters) == sorted(names())
    for i, name in enumerate(names()):
        values = 0.2 * torch.sin(0.37 * torch.arange(parameters[name].numel(), dtype=torch.float64) + 0.11 * i)
        layer_norm = "norm" in name or name.startswith("encoder.stem.1") or "downsample.0" in name
        if layer_norm and name.endswith("weight"):
            values += 1
        parameters[name].data.copy_(values.view_as(parameters[name]))
    return fcmae


def images() -> torch.Tensor:
    b, c, r, q = torch.meshgrid(*(torch.arange(x, dtype=torch.float64) for x in (2, 3, 96, 96)), indexing="ij")
    return torch.sin(0.05 * (96 * r + q) + c + 0.7 * b)


def mask_of(rows: list[str]) -> PatchMask:
    hidden = torch.tensor([[int(cell) for cell in cells] for cells in rows])
    order = hidden.argsort(dim=1, stable=True)  # visible first
    num_keep = int((hidden[0] == 0).sum())
    return PatchMask(order[:, :num_keep], order[:, num_keep:], order.argsort(dim=1))


def reconstructed(fcmae, pixels, mask):
    encoded = fcmae.sparse_encoder(pixels, mask.keep, fcmae.grid)
    return encoded, fcmae.decode(pixels, encoded, mask)


def test_the_tensors_are_the_official_ones():
    fcmae = closed_form()
    assert len(names()) == 71
    assert sum(p.numel() for p in fcmae.parameters() if p.requires_grad) == 46_432


def test_the_map_and_the_prediction_are_the_official_ones():
    fcmae, mask = closed_form(), mask_of(CELLS)
    encoded, result = reconstructed(fcmae, images(), mask)
    whole = encoded.positions.unpack(encoded.maps[-1])
    expected = [2.517075784, -0.593653868, 0.261284382, 2.576339421]
    assert whole[0, :4, 0, 1].tolist() == pytest.approx(expected, abs=6e-10)
    assert whole[1, :2, 2, 2].tolist() == pytest.approx([3.033898363, -0.512677095], abs=6e-10)
    place = mask.removed[0].tolist().index(0)
    expected = [1.206247145, -0.178574012, -0.640786833, 0.923724806]
    assert result.predicted[0, place, :4].tolist() == pytest.approx(expected, abs=6e-10)
    hidden = mask.hidden.view(2, 1, 3, 3).expand_as(whole)
    assert not whole[hidden].any() and (whole[~hidden] != 0).all()


@pytest.mark.parametrize(("norm_pix_loss", "loss"), [(True, 1.519558048347729), (False, 1.019564593104175)])
def test_the_loss_is_the_official_one(norm_pix_loss, loss):
    fcmae = closed_form(norm_pix_loss)
    assert fcmae.loss(reconstructed(fcmae, images(), mask_of(CELLS))[1]).total.item() == pytest.approx(loss, abs=1e-14)


def test_the_trivial_loss_of_plain_pixels_is_that_of_the_mean_of_all_images():
    fcmae = closed_form(False)
    _, bright = reconstructed(fcmae, images() + 3, mask_of(CELLS))
    loss = fcmae.loss(replace(bright, predicted=bright.pixels.mean((0, 1)).expand_as(bright.pixels)))
    nearer = bright.pixels.mean(1).var(0).mean() / len(bright.pixels)  # to the mean of these than to that of all
    assert loss.parts["trivial_loss"].item() == pytest.approx((loss.total + nearer).item(), rel=1e-9)


def test_the_gradient_is_the_official_one():
    fcmae = closed_form()
    fcmae.loss(reconstructed(fcmae, images(), mask_of(CELLS))[1]).total.backward()
    norms = {name: p.grad.norm().item() for name, p in fcmae.named_parameters() if p.requires_grad}
    expected = {
        "encoder.stem.0.weight": 4.134846209e-3,
        "encoder.stages.1.downsample.1.weight": 4.108994532e-2,
        "encoder.stages.0.blocks.0.conv_dw.weight": 3.144423396e-4,
        "encoder.stages.0.blocks.0.mlp.grn.weight": 3.281127503e-5,
        "encoder.stages.3.blocks.0.mlp.grn.bias": 7.852243830e-4,
        "mask_token": 0.5201477791,
        "decoder.0.conv_dw.weight": 0.09340316420,
        "decoder.0.mlp.grn.weight": 0.5949392852,
        "to_pixels.bias": 0.02728196055,
    }
    assert {name: norms[name] for name in expected} == pytest.approx(expected, rel=2e-9)
    whole = torch.tensor(list(norms.values()), dtype=torch.float64).norm().item()
    assert whole == pytest.approx(4.4373807199, abs=6e-11)


@pytest.mark.parametrize(("image", "loss"), [(0, 1.515606490009), (1, 1.523509606687)])
def test_an_image_s_loss_is_its_own(image, loss):
    fcmae = closed_form()
    alone = fcmae.loss(reconstructed(fcmae, images()[image, None], mask_of(CELLS[image : image + 1]))[1]).total.item()
    assert alone == pytest.approx(loss, abs=6e-13)


def test_inside_a_rectangle_of_visible_cells_the_encoder_is_the_dense_one_on_that_crop():
    fcmae = closed_form()
    encoded = fcmae.sparse_encoder(images(), mask_of(["100100111"] * 2).keep, fcmae.grid)
    dense = fcmae.encoder.forward_intermediates(images()[..., :64, 32:], intermediates_only=True)
    for ours, theirs in zip(encoded.maps, dense, strict=True):
        whole = encoded.positions.unpack(ours)
        size = theirs.shape[-1] // 2
        torch.testing.assert_close(whole[..., : 2 * size, size:], theirs, rtol=0, atol=1e-13)


def test_hidden_pixels_change_targets_alone_whatever_they_are():
    fcmae, mask, pixels = closed_form(), mask_of(CELLS), images()
    hidden = mask.hidden.view(2, 1, 3, 3).repeat_interleave(32, 2).repeat_interleave(32, 3)
    before, after = (reconstructed(fcmae, x, mask)[1] for x in (pixels, pixels.masked_fill(hidden, math.nan)))
    assert torch.equal(before.predicted, after.predicted) and after.pixels.isnan().all()
    after.predicted.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in fcmae.parameters() if p.requires_grad)
    changed = reconstructed(fcmae, pixels.masked_fill(hidden, 0.5), mask)[1]
    assert fcmae.loss(changed).total != fcmae.loss(before).total


def test_a_flat_cell_has_target_zero_and_predicting_nothing_costs_its_share():
    fcmae, mask = closed_form(), mask_of(CELLS)
    noise = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, result = reconstructed(fcmae, noise, mask)
    nothing = type(result)(torch.zeros_like(result.predicted), result.pixels, mask)
    assert fcmae.loss(nothing).total.item() == pytest.approx(3071 / 3072, abs=1e-5)
    flat = type(result)(torch.zeros_like(result.predicted), torch.ones_like(result.pixels), mask)
    assert fcmae.loss(flat).total.item() < 1e-12


@pytest.mark.parametrize(("cells", "ratio", "visible"), [(49, 0.6, 19), (25, 0.8, 5), (100, 0.9, 10), (16, 0.6, 6)])
def test_so_many_cells_are_visible(cells, ratio, visible):
    assert num_visible(cells, ratio) == visible
    mask = random_mask(mask_noise(torch.arange(3000), cells), visible)
    assert (mask.hidden.float().mean(0) - (1 - visible / cells)).abs().max() < 0.05


def config(encoder, **objective):
    return validate_config(
        {
            "run_dir": "x",
            "data": {"shards": "x"},
            "encoder": encoder,
            "objective": {"name": "fcmae", "decoder_dim": 16} | objective,
            "train": {"epochs": 1, "global_batch": 4},
            "optimizer": {"lr": 1e-3},
        },
        "a test",
        options_for,
    )


SMALL = {
    "name": "convnextv2_atto",
    "image_size": 32,
    "patch_size": 1,
    "kwargs": {"depths": [1, 1, 1, 1], "dims": [4, 6, 8, 12]},
}


def test_the_encoder_goes_back_to_plain_timm_and_the_picture_is_drawn():
    settings = config(SMALL | {"image_size": [32, 48]})
    check_objective(settings)
    objective = build_objective(settings)
    batch = blank_batch(objective.views, 4)
    batch.views[0].copy_(torch.randint(0, 256, batch.views[0].shape, generator=torch.Generator().manual_seed(0)))
    loss = objective(batch, Progress(0, 10, 1.0))
    loss.total.backward()
    assert 0.9 < loss.total.item() < 1.2 and objective.grid == (4, 6)
    assert objective.pictures(batch)["reconstruction"].size == (3 * 50 - 2, 4 * 34 - 2)
    plain = timm.create_model("convnextv2_atto", num_classes=0, patch_size=1, **SMALL["kwargs"])
    plain.load_state_dict(objective.exported_encoder().state_dict())
    pixels = torch.randn(2, 3, 32, 48)
    assert torch.equal(plain.eval()(pixels), objective.exported_encoder().eval()(pixels))


@pytest.mark.parametrize(
    ("name", "encoder", "both"), [("atto", 3_386_760, 7_257_992), ("tiny", 27_864_960, 31_965_568)]
)
def test_published_sizes(name, encoder, both):
    model = lay_out_encoder(EncoderConfig(name=f"convnextv2_{name}", image_size=224))
    with torch.device("meta"):
        objective = FCMAE(model, FCMAEOptions(), image_size=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3)
    trained = {n: p.numel() for n, p in objective.named_parameters() if p.requires_grad}
    assert sum(count for n, count in trained.items() if n.startswith("encoder.")) == encoder
    assert sum(trained.values()) == both


@pytest.mark.parametrize(
    ("encoder", "options", "message"),
    [
        (SMALL | {"patch_size": 4}, {}, "is not cut into two or more whole cells"),
        (SMALL, {"mask_ratio": 0.99}, "leaves none to see; write objective.mask_ratio=0.6"),
        (SMALL | {"image_size": [8, 16]}, {}, "of 1 x 2 cells leaves none to see; write objective.mask_ratio=0.5"),
        ({"name": "vit_tiny_patch16_224", "image_size": 32}, {}, "vit_tiny_patch16_224"),
    ],
)
def test_what_cannot_work_is_refused(encoder, options, message):
    with pytest.raises(UserError, match=message):
        check_objective(config(encoder, **options))
