"""Rotation prediction: exact turns, their order and labels, and what the loss can and cannot see."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from prelude.data.batch import Batch
from prelude.data.errors import UserError
from prelude.objectives import check_objective, options_for
from prelude.objectives.building import build_objective
from prelude.objectives.rotation import Rotation, RotationOptions, rotated
from prelude.pretrain.images import images as device_images
from prelude.pretrain.optimizers import apply_schedule, build_optimizer
from prelude.pretrain.recipes import validate_config
from prelude.pretrain.schedules import Progress
from prelude.pretrain.step_cost import blank_batch

START = Progress(0, 100, 10.0)
RESNET = {
    "name": "resnet10t",
    "image_size": 32,
    "kwargs": {"channels": [8, 12, 16, 24], "stem_width": 8, "layers": [1, 1, 1, 1]},
}


def config(encoder=RESNET, **objective):
    return validate_config(
        {
            "run_dir": "x",
            "data": {"shards": "x"},
            "encoder": encoder,
            "objective": {"name": "rotation"} | objective,
            "train": {"epochs": 1, "global_batch": 16},
            "optimizer": {"lr": 3e-3, "lr_rule": "absolute"},
        },
        "a test",
        options_for,
    )


def batch_of(objective, num: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(0)
    blank = blank_batch(objective.views, num)
    pixels = torch.randint(0, 256, blank.views[0].shape, generator=generator, dtype=torch.uint8)
    return replace(blank, views=(pixels,), seeds=torch.arange(num) * 7919)


def test_turns_are_those_of_numpy_and_of_pil_in_uint8():
    image = torch.arange(3 * 5 * 5, dtype=torch.uint8).view(1, 3, 5, 5)
    turned = rotated(image, [0, 1, 2, 3])
    picture = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    for k, transpose in enumerate(
        (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    ):
        channels_last = turned[k].permute(1, 2, 0).numpy()
        assert np.array_equal(channels_last, np.rot90(image[0].permute(1, 2, 0).numpy(), k))
        assert np.array_equal(channels_last, np.asarray(picture if transpose is None else picture.transpose(transpose)))
    assert torch.equal(turned[2], image[0].flip(-1).flip(-2))


def test_four_quarter_turns_are_none_and_no_pixel_is_invented():
    images = torch.randn(2, 3, 7, 7)
    again = images
    for _ in range(4):
        again = rotated(again, [1])
    assert torch.equal(again, images)
    for turned in rotated(images, [0, 1, 2, 3]).unflatten(0, (2, 4)).unbind(1):
        assert torch.equal(turned.flatten(2).sort().values, images.flatten(2).sort().values)


def test_samples_are_image_major():
    images = torch.randn(3, 3, 4, 4)
    samples = rotated(images, [0, 1, 3])
    assert samples.shape == (9, 3, 4, 4)
    for i in range(3):
        for k, turns in enumerate([0, 1, 3]):
            assert torch.equal(samples[3 * i + k], torch.rot90(images[i], turns, (-2, -1)))


def test_a_turned_source_gives_the_same_samples_with_shifted_labels():
    images = torch.randn(2, 3, 6, 6)
    samples = rotated(images, [0, 1, 2, 3]).unflatten(0, (2, 4))
    shifted = rotated(torch.rot90(images, 1, (-2, -1)), [0, 1, 2, 3]).unflatten(0, (2, 4))
    assert torch.equal(shifted, samples.roll(-1, dims=1))


@pytest.mark.parametrize(("rotations", "chance"), [([0, 90, 180, 270], 4), ([0, 180], 2), ([90, 270], 2)])
def test_a_constant_answer_costs_the_entropy_of_the_choice(rotations, chance):
    objective = build_objective(config(rotations=rotations))
    loss = objective.loss(torch.zeros(6 * chance, chance))
    assert loss.total.item() == pytest.approx(math.log(chance), abs=1e-6)
    assert loss.parts["accuracy"].item() == pytest.approx(1 / chance)
    assert set(loss.parts) == {"accuracy", "trivial_loss", *(f"accuracy_{degrees}" for degrees in rotations)}


def test_labels_and_accuracies_belong_to_their_rotation():
    objective = build_objective(config())
    labels = torch.arange(4).repeat(5)
    logits = 20.0 * nn.functional.one_hot(labels, 4)
    assert objective.loss(logits).total < 1e-6
    logits[1::4] = logits[2::4]  # what is turned by 90 degrees is taken for 180
    parts = objective.loss(logits).parts
    assert parts["trivial_loss"].item() == pytest.approx(math.log(4))
    assert {name: value.item() for name, value in parts.items() if name.startswith("accuracy")} == {
        "accuracy": 0.75, "accuracy_0": 1.0, "accuracy_90": 0.0, "accuracy_180": 1.0, "accuracy_270": 1.0,
    }  # fmt: skip


def test_the_head_is_linear_on_pooled_features_and_all_turns_share_a_batch():
    objective = build_objective(config())
    batch = batch_of(objective)
    (images,) = device_images(batch, objective.views)
    twin = build_objective(config())
    logits = twin.head(twin.encoder(rotated(images, [0, 1, 2, 3])))
    expected = nn.functional.cross_entropy(logits, torch.arange(4).repeat(len(batch)))
    torch.testing.assert_close(objective(batch, START).total, expected)
    norms = [module for module in objective.encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.num_batches_tracked.item() for norm in norms} == {1}


class MeanColour(nn.Module):
    """Sees nothing of the orientation."""

    head_hidden_size = 3

    def forward(self, images):
        return images.mean((2, 3))


def test_a_function_that_no_rotation_changes_cannot_beat_chance():
    objective = Rotation(MeanColour(), RotationOptions(), image_size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.1)
    batch = batch_of(objective, 32)
    for _ in range(30):
        loss = objective(batch, START).total
        assert loss > math.log(4) - 1e-6
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(math.log(4), abs=1e-2)


def test_few_images_are_learned_by_heart():
    settings = config(crop_scale=None, flip=0.0)
    objective = build_objective(settings)
    optimizer = build_optimizer(objective, settings)
    batch = batch_of(objective, 16)
    for _ in range(60):
        apply_schedule(optimizer.param_groups, settings, START)
        loss = objective(batch, START)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    assert loss.parts["accuracy"] > 0.97


def test_the_paper_s_crop_on_small_images_is_a_shift_of_the_whole_one():
    (view,) = build_objective(config(crop_scale=None, shift=4)).views.views
    assert (view.crop, view.crop_share, view.shift, view.flip) == ("center", 1.0, 4, 0.5)
    (view,) = build_objective(config()).views.views
    assert (view.crop, view.scale, view.interpolation, view.shift) == ("random_resized", (0.08, 1.0), "bilinear", 0)


def test_images_that_are_not_square_are_refused():
    with pytest.raises(UserError, match="image_size=32x48 is not square, .* write encoder.image_size=32"):
        check_objective(config(encoder=RESNET | {"image_size": [32, 48]}))
    check_objective(config())


@pytest.mark.parametrize("rotations", [[0], [0, 45], [0, 0], []])
def test_other_angles_are_refused(rotations):
    with pytest.raises(UserError, match="write two or more of 0, 90, 180 and 270"):
        config(rotations=rotations)


def test_the_picture_has_a_frame_for_each_guess_and_moves_no_statistic():
    objective = build_objective(config()).train()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    batch = batch_of(objective, 3)
    picture = objective.pictures(batch)["rotations"]
    assert picture.size == (4 * 34 - 2, 3 * 34 - 2)
    assert objective.encoder.training
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    objective.eval()
    (images,) = device_images(batch, objective.views)
    guesses = objective.head(objective.encoder(rotated(images, [0, 1, 2, 3]))).argmax(1).view(3, 4)
    for i in range(3):
        for k in range(4):
            green = picture.getpixel((k * 34, i * 34)) == (0, 160, 60)
            assert green == (guesses[i, k].item() == k)
