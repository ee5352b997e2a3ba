"""Barlow Twins around its loss: views, projector, two passes, what collapses and what is shown."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prelude.data.batch import Batch, Photometric
from prelude.data.errors import UserError
from prelude.objectives import options_for
from prelude.objectives.building import build_objective
from prelude.objectives.projector import projector
from prelude.pretrain.images import denormalise, images
from prelude.pretrain.recipes import validate_config
from prelude.pretrain.schedules import Progress
from prelude.pretrain.step_cost import blank_batch

START = Progress(0, 100, 10.0)
RESNET = {
    "name": "resnet10t",
    "image_size": 32,
    "kwargs": {"channels": [4, 6, 8, 12], "stem_width": 8, "layers": [1, 1, 1, 1]},
}


def config(encoder=RESNET, **objective):
    return validate_config(
        {
            "run_dir": "x",
            "data": {"shards": "x"},
            "encoder": encoder,
            "objective": {"name": "barlow_twins", "projector": [24, 16]} | objective,
            "train": {"epochs": 1, "global_batch": 16},
            "optimizer": {"lr": 1e-3, "lr_rule": "absolute", "weight_decay": 0.0},
        },
        "a test",
        options_for,
    )


def batch_of(objective, num: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(0)
    blank = blank_batch(objective.views, num)
    pixels = tuple(torch.randint(0, 256, view.shape, generator=generator, dtype=torch.uint8) for view in blank.views)
    return replace(blank, views=pixels, seeds=torch.arange(num) * 7919)


def test_the_views_are_the_paper_s():
    first, second = build_objective(config()).views.views
    common = {"jitter": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "grey": 0.2}
    assert first.photometric == Photometric(**common, blur=1.0, blur_sigma=(0.1, 2.0), solarise=0.0)
    assert second.photometric == Photometric(**common, blur=0.1, blur_sigma=(0.1, 2.0), solarise=0.2)
    for view in (first, second):
        assert (view.crop, view.scale, view.flip) == ("random_resized", (0.08, 1.0), 0.5)
        assert (view.ratio, view.interpolation, view.size) == ((3 / 4, 4 / 3), "bicubic", (32, 32))


def test_one_colour_of_one_view_can_be_changed_and_the_others_stay():
    first, second = build_objective(config(view_2={"blur": 0.0}, view_1={"hue": 0.3})).views.views
    assert (first.photometric.hue, first.photometric.blur) == (0.3, 1.0)
    assert (second.photometric.blur, second.photometric.solarise) == (0.0, 0.2)
    with pytest.raises(UserError, match="objective.view_1.blurr does not exist; did you mean objective.view_1.blur?"):
        config(view_1={"blurr": 0.0})


def test_the_projector_is_the_paper_s():
    layers = list(build_objective(config(projector=[24, 20, 16])).projector)
    assert [type(layer) for layer in layers if not isinstance(layer, nn.BatchNorm1d)] == [
        nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear,
    ]  # fmt: skip
    assert [isinstance(layer, nn.BatchNorm1d) for layer in layers] == [False, True, False] * 2 + [False]
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(12, 24), (24, 20), (20, 16)]
    assert all(layer.bias is None for layer in linear)


def test_the_paper_s_projector_has_its_published_size():
    with torch.device("meta"):
        head = projector(2048, [8192, 8192, 8192])
    assert sum(p.numel() for p in head.parameters()) == 2048 * 8192 + 2 * 8192**2 + 4 * 8192


def test_the_loss_is_the_paper_s_on_the_embeddings_of_two_separate_passes():
    objective = build_objective(config())
    batch = batch_of(objective)
    with torch.no_grad():
        twin = build_objective(config())
        z = [twin.projector(twin.encoder(view)) for view in images(batch, twin.views)]
        c = F.batch_norm(z[0], None, None, training=True).T @ F.batch_norm(z[1], None, None, training=True) / len(batch)
    on_diagonal = (c.diagonal() - 1).square().sum()
    off_diagonal = c.square().sum() - c.diagonal().square().sum()
    loss = objective(batch, START)
    assert loss.total.item() == pytest.approx((on_diagonal + 0.0051 * off_diagonal).item(), rel=1e-5)
    assert loss.parts["on_diagonal"].item() == pytest.approx(on_diagonal.item(), rel=1e-5)
    assert loss.parts["off_diagonal"].item() == pytest.approx(off_diagonal.item(), rel=1e-5)
    assert loss.parts["diagonal"].item() == pytest.approx(c.diagonal().mean().item(), abs=1e-5)
    assert loss.parts["off_diagonal_rms"].item() == pytest.approx((off_diagonal / (16 * 15)).sqrt().item(), rel=1e-5)
    spread = torch.cat(z, 1).std(0)
    assert loss.parts["embedding_std"].item() == pytest.approx(spread.mean().item(), rel=1e-5)
    assert loss.parts["dead_dimensions"].item() == 0


def test_batch_norm_sees_one_view_at_a_time():
    objective = build_objective(config())
    batch, norm = batch_of(objective), objective.projector[1]
    hidden = []
    objective.projector[0].register_forward_hook(lambda module, args, out: hidden.append(out.detach()))
    objective(batch, START)
    m1, m2 = (rows.mean(0) for rows in hidden)
    assert len(hidden) == 2 and not torch.allclose(m1, m2, rtol=1e-3)
    torch.testing.assert_close(norm.running_mean, 0.9 * 0.1 * m1 + 0.1 * m2, rtol=1e-5, atol=1e-7)


def test_the_loss_scale_multiplies_loss_and_gradient_and_the_weight_only_the_second_term():
    def outcome(**options):
        objective = build_objective(config(**options))
        loss = objective(batch_of(objective), START)
        loss.total.backward()
        return loss, objective.projector[0].weight.grad

    (one, gradient), (half, half_gradient) = outcome(), outcome(loss_scale=0.5)
    torch.testing.assert_close(half.total, 0.5 * one.total)
    torch.testing.assert_close(half_gradient, 0.5 * gradient)
    free, _ = outcome(off_diagonal_weight=0.0)
    torch.testing.assert_close(free.total, one.parts["on_diagonal"])
    torch.testing.assert_close(free.parts["off_diagonal"], one.parts["off_diagonal"])


def test_standardisation_and_loss_stay_float32_under_autocast():
    objective = build_objective(config())
    z = [torch.randn(64, 16, generator=torch.Generator().manual_seed(v)).bfloat16() for v in range(2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = objective.loss(*z, [64])
    exact = objective.loss(*(view.double() for view in z), [64])
    assert lower.total.dtype == torch.float32
    assert lower.total.item() == pytest.approx(exact.total.item(), rel=1e-5)


def test_a_batch_in_micro_batches_is_another_loss():
    assert not build_objective(config()).accumulates


def test_a_dead_dimension_is_counted():
    objective = build_objective(config())
    z = torch.randn(32, 16)
    z[:, :4] = 1.0
    assert objective.loss(z, z.clone(), [32]).parts["dead_dimensions"].item() == pytest.approx(0.25)


def trained(off_diagonal_weight: float) -> dict[str, float]:
    """The parts of the loss after forty steps on a handful of images."""
    still = {"jitter": 0.5, "grey": 0.0, "blur": 0.0, "solarise": 0.0}
    settings = config(projector=[32, 16], off_diagonal_weight=off_diagonal_weight, view_1=still, view_2=still)
    objective = build_objective(settings)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
    batch = batch_of(objective, 32)
    batch = replace(batch, views=(batch.views[0],) * 2)
    for step in range(40):
        loss = objective(replace(batch, seeds=batch.seeds + step), START)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    return {name: value.item() for name, value in loss.parts.items()}


def test_without_the_off_diagonal_the_embedding_collapses_in_redundancy_and_the_numbers_show_it():
    sound, broken = trained(0.1), trained(0.0)
    assert sound["diagonal"] > 0.7 and broken["diagonal"] > 0.7  # both agree between the views
    assert sound["off_diagonal_rms"] < 0.4 and broken["off_diagonal_rms"] > 0.7, (sound, broken)
    assert sound["effective_dimensions"] > 4 and broken["effective_dimensions"] < 2, (sound, broken)


def test_the_picture_shows_both_views_before_normalisation():
    objective = build_objective(config())
    batch = batch_of(objective, 3)
    picture = objective.pictures(batch)["views"]
    assert picture.size == (2 * 34 - 2, 3 * 34 - 2)
    second = denormalise(images(batch, objective.views)[1], objective.views)
    corner = torch.tensor(list(picture.crop((34, 68, 66, 100)).getdata()), dtype=torch.uint8).view(32, 32, 3)
    assert torch.equal(corner.permute(2, 0, 1), second[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projector": []}, "write the widths of one or more layers"),
        ({"projector": [8, 1]}, "write the widths of one or more layers"),
        ({"crop_scale": [0.5, 0.2]}, "write two shares of the area"),
        ({"view_1": {"blur_sigma": [0, 1]}}, "write two standard deviations above 0"),
        ({"view_1": {"hue": 0.7}}, "objective.view_1.hue"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        config(**options)
