"""Every objective on images of other channels than RGB, and on patches that are no squares."""

import pytest
import torch
from PIL import Image

from prelude.data.errors import UserError
from prelude.objectives import check_objective, options_for
from prelude.objectives.building import build_objective
from prelude.pretrain.images import images as device_images
from prelude.pretrain.recipes import validate_config
from prelude.pretrain.schedules import Progress
from prelude.pretrain.step_cost import blank_batch

VIT = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 4}
VIT["kwargs"] = {"depth": 2, "embed_dim": 32, "num_heads": 2, "global_pool": "avg", "fc_norm": False}
RESNET = {"name": "resnet10t", "image_size": 32, "kwargs": {"channels": [16, 32, 48, 64]}}
CONVNEXT = {"name": "convnext_atto", "image_size": 32, "patch_size": 2, "kwargs": {"depths": [1, 1, 1, 1]}}
SWIN = {"name": "swin_tiny_patch4_window7_224", "image_size": 32}
SWIN["kwargs"] = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
COLOURLESS = {"saturation": 0.0, "hue": 0.0, "grey": 0.0, "solarise": 0.5, "blur": 0.5}
JEPA = {"predictor_dim": 16, "predictor_depth": 1, "predictor_num_heads": 2, "target_scale": [0.1, 0.2]}
CASES = {
    "mae": (VIT, {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}),
    "mae of plain pixels": (
        VIT, {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, "norm_pix_loss": False},
    ),
    "mae with gradients": (
        VIT, {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, "gradient_weight": 1.0},
    ),
    "ijepa": (VIT, JEPA),
    "dseqjepa": (VIT, JEPA | {"lambda_start": 1.0}),
    "spark": (CONVNEXT | {"image_size": 64}, {"decoder_dim": 32}),
    "fcmae": (CONVNEXT | {"image_size": 64}, {"decoder_dim": 8}),
    "simmim": (SWIN, {"mask_patch": 8, "target_window": 7}),
    "barlow_twins": (RESNET, {"projector": [8, 8], "view_1": COLOURLESS, "view_2": COLOURLESS}),
    "vicreg": (RESNET, {"projector": [8, 8], "view_1": COLOURLESS, "view_2": COLOURLESS}),
    "lejepa": (RESNET, {"projector": [8, 8], "num_directions": 8, "colours": COLOURLESS}),
    "msbreg": (RESNET, {"projector": [8, 8], "predictor": [8], "view_1": COLOURLESS, "view_2": COLOURLESS}),
    "rotation": (RESNET, {}),
}  # fmt: skip


def config_of(case: str, channels: int, encoder=None, options=None, data=None):
    base, wanted = CASES[case]
    return validate_config(
        {
            "run_dir": "x",
            "data": {"shards": "x", "channels": channels, "mean": [0.4] * channels, "std": [0.2] * channels}
            | (data or {}),
            "encoder": base | (encoder or {}),
            "objective": {"name": case.partition(" ")[0]} | (wanted if options is None else options),
            "train": {"epochs": 1, "global_batch": 4},
            "optimizer": {"lr": 1e-3},
        },
        case,
        options_for,
    )


def batch_of(objective, deep=False):
    batch = blank_batch(objective.views, 4)
    views = []
    for v, view in enumerate(batch.views):
        drawn = torch.rand(view.shape, generator=torch.Generator().manual_seed(v)) * 255
        views.append(drawn if deep else drawn.to(torch.uint8))
    return type(batch)(**{**vars(batch), "views": tuple(views)})


@pytest.mark.parametrize("channels, deep", [(1, False), (2, True), (5, True)])
@pytest.mark.parametrize("case", CASES)
def test_an_objective_learns_from_every_channel_and_draws_pictures(case, channels, deep):
    config = config_of(case, channels)
    check_objective(config)
    objective = build_objective(config)
    batch = batch_of(objective, deep)
    loss = objective(batch, Progress(0, 10, 1.0)).total
    loss.backward()
    first = next(p for p in objective.encoder.parameters() if p.ndim == 4)
    assert loss.isfinite() and first.shape[1] == channels
    assert (first.grad.abs().sum((0, 2, 3)) > 0).all()
    pictures = objective.pictures(batch)
    assert pictures and all(isinstance(picture, Image.Image) and picture.mode == "RGB" for picture in pictures.values())


@pytest.mark.parametrize("case", ["mae", "spark"])
def test_the_last_channel_is_a_target_too(case):
    objective = build_objective(config_of(case, 4)).eval()
    batch = batch_of(objective)
    (images,) = device_images(batch, objective.views)
    places = objective.num_patches if case == "mae" else objective.num_cells
    noise = torch.rand(4, places, generator=torch.Generator().manual_seed(0))
    pixels = objective.reconstruct(images, noise).pixels  # (B, R, values)
    changed = images.clone()
    changed[:, 3] += 1
    moved = (objective.reconstruct(changed, noise).pixels - pixels).unflatten(-1, (-1, 4))
    assert not moved[..., :3].any() and torch.allclose(moved[..., 3], torch.ones(1))


@pytest.mark.parametrize("case", ["mae", "ijepa", "dseqjepa"])
def test_patches_need_be_no_squares(case):
    objective = build_objective(config_of(case, 3, {"patch_size": [8, 4]}))
    batch = batch_of(objective)
    loss = objective(batch, Progress(0, 10, 1.0)).total
    loss.backward()
    assert loss.isfinite() and objective.grid == (4, 8) and objective.pictures(batch)


@pytest.mark.parametrize("case, encoder", [("spark", CONVNEXT), ("barlow_twins", {**CONVNEXT, "patch_size": 2})])
def test_an_architecture_without_such_patches_refuses_them_by_name(case, encoder):
    with pytest.raises(UserError, match=r"encoder.patch_size=\[4, 2\].*encoder.name=convnext_atto"):
        check_objective(config_of(case, 3, encoder | {"patch_size": [4, 2]}))


def test_an_image_must_be_whole_patches_on_both_sides():
    with pytest.raises(UserError, match="not a whole number of patches of 8x3"):
        check_objective(config_of("mae", 3, {"patch_size": [8, 3]}))


@pytest.mark.parametrize("channels", [1, 4])
def test_colours_of_rgb_are_refused_by_name_with_all_that_is_to_be_written(channels):
    with pytest.raises(UserError) as caught:
        check_objective(config_of("barlow_twins", channels, options={"projector": [8, 8]}))
    said = str(caught.value)
    assert f"data.channels={channels}" in said
    for view in ("view_1", "view_2"):
        for name in ("saturation", "hue", "grey"):
            assert f"objective.{view}.{name}=0" in said
    check_objective(config_of("barlow_twins", 3, options={"projector": [8, 8]}))


@pytest.mark.parametrize(
    "data, said",
    [
        ({"mean": [0.5]}, "mean has 1 value and channels=4"),
        ({"std": [0.5] * 3}, "std has 3 values and channels=4"),
        ({"shown_channels": [0, 4]}, "shown_channels takes one to three numbers from 0 to 3"),
        ({"shown_channels": [0, 1, 2, 3]}, "shown_channels takes one to three numbers"),
        ({"channels": 0}, "data.channels=0 is refused"),
        ({"max_pixels": 0}, "data.max_pixels=0 is refused"),
    ],
)
def test_what_cannot_be_of_so_many_channels_is_refused(data, said):
    with pytest.raises(UserError, match=said):
        config_of("mae", 4, data=data)


def test_the_encoder_follows_the_data_and_nothing_else():
    assert config_of("mae", 4).encoder.in_chans == 4
    assert config_of("mae", 4, {"in_chans": 4}).encoder.in_chans == 4
    with pytest.raises(UserError, match="write data.channels alone"):
        config_of("mae", 4, {"in_chans": 3})
    with pytest.raises(UserError, match="write data.channels"):
        check_objective(config_of("mae", 4, {"kwargs": VIT["kwargs"] | {"in_chans": 4}}))


@pytest.mark.parametrize(
    "shown, expected", [([], [0, 1, 2]), ([3, 0, 2], [3, 0, 2]), ([1], [1, 1, 1]), ([3, 1], [3, 1, None])]
)
def test_pictures_show_the_channels_that_were_chosen(shown, expected):
    from prelude.pretrain.images import denormalise, normalise

    plan = build_objective(config_of("mae", 4, data={"shown_channels": shown})).views
    pixels = torch.randint(0, 256, (2, 4, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    drawn = denormalise(normalise(pixels, plan), plan)
    for place, channel in enumerate(expected):
        assert torch.equal(
            drawn[:, place], pixels[:, channel] if channel is not None else torch.zeros_like(pixels[:, 0])
        )
    assert plan.fingerprint() == build_objective(config_of("mae", 4)).views.fingerprint()
