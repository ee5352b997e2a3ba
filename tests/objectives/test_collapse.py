"""Every objective, made to collapse and left in peace: the watch speaks in the first case and is silent in the other.

Trained by plain torch for a few steps on a handful of images, each step logged, and judged by the default settings.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from collapse_cases import a_record, a_watch
from small_objectives import IMAGES, OBJECTIVES, built, config_of

from prelude.checkpoints.store import Store
from prelude.data.batch import Batch
from prelude.launch.training import monitors_of
from prelude.objectives import objective_class
from prelude.objectives.dseqjepa import DSeqJEPA
from prelude.objectives.ijepa import IJEPA
from prelude.pretrain.collapse import CollapseWatch
from prelude.pretrain.encoders import forward_tokens
from prelude.pretrain.schedules import Progress

STEPS = 50  # a shorter run is not judged


def batch_for(objective, step: int) -> Batch:
    """The same images at every step, under draws of their own."""
    images = IMAGES
    num_views = len(objective.views.views)
    seeds = images.seeds + 7919 * step
    boxes, flips = (values.expand(-1, num_views, *values.shape[2:]) for values in (images.boxes, images.flips))
    return replace(images, views=images.views * num_views, boxes=boxes, flips=flips, seeds=seeds)


def causes(name: str, objective, lr: float = 2e-3, change=lambda batch: batch) -> set[str]:
    """What the watch says of a training run while it goes on; its verdict at the end must agree."""
    watch = a_watch(objective_class(name).remedies)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=lr, fused=True)
    found = set()
    for step in range(STEPS):
        loss = objective(change(batch_for(objective, step)), Progress(step, STEPS, 10.0))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        objective.after_step(Progress(step + 1, STEPS, 10.0), torch.ones(()))
        parts = {name: float(value) for name, value in loss.parts.items()}
        watch.record(replace(a_record(step + 1, loss.total.item(), STEPS), parts=parts))
        found |= {report.cause for report in watch.found()}
    watch.finish()
    (verdict,) = watch.found()
    assert verdict.cause == ("collapsed" if found else "healthy"), (verdict.text, found)
    numbers.append((name, loss.total.item(), parts))
    return found


numbers: list = []


def noise(batch: Batch, view: int = 0) -> Batch:
    """With one view of which nothing can be known."""
    generator = torch.Generator().manual_seed(int(batch.seeds[0]))
    drawn = torch.randint(256, batch.views[view].shape, generator=generator, dtype=torch.uint8)
    return replace(batch, views=tuple(drawn if i == view else pixels for i, pixels in enumerate(batch.views)))


def bright_and_dark(batch: Batch) -> Batch:
    """Images of which every patch tells what the others are like: noise is learned by nobody in so few steps."""
    (pixels,) = batch.views
    offset = torch.linspace(0, 180, len(pixels)).reshape(-1, *[1] * (pixels.ndim - 1))
    return replace(batch, views=((pixels // 4 + offset).to(torch.uint8),))


def in_turn_with_volumes(change=lambda batch: batch):
    """Every second batch is of volumes, each an image that fades from slice to slice, with the draws of its step."""
    turns, planes = itertools.count(), IMAGES.views[0][:, :1, ::2, ::2, None]
    volumes = ((planes + 40.0) * torch.linspace(0.3, 0.8, 8)).to(torch.uint8)  # (B, 1, 16, 16, 8)
    return lambda batch: change(replace(batch, views=(volumes,)) if next(turns) % 2 else batch)


@pytest.mark.parametrize(
    ("name", "momentum", "patience"),
    [("ijepa", 0.99, 300), ("msbreg", 0.9, 30), ("ijepa", 1.0, 0), ("mae", None, 0)],
)
def test_a_teacher_has_three_times_the_steps_that_it_averages_over_to_follow(name, momentum, patience, tmp_path):
    config = config_of(name, **({"momentum": momentum} if momentum else {}))
    monitors = monitors_of(config, tmp_path, Store(tmp_path), num_workers=1)
    (watch,) = [monitor for monitor in monitors if isinstance(monitor, CollapseWatch)]
    assert watch.teacher_patience == pytest.approx(patience)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_healthy_run_is_left_in_peace(name):
    # So slow that a teacher keeps up in so few steps; so fast that pixels are learned, from small initial weights
    lr = {"ijepa": 5e-4, "dseqjepa": 5e-4, "mae": 5e-3, "simmim": 5e-3}.get(name, 2e-3)
    changes = {"uni4eye": in_turn_with_volumes(bright_and_dark), "simmim": bright_and_dark}  # whose targets are pixels
    change = {"change": changes[name]} if name in changes else {}
    assert causes(name, built(name), lr, **change) == set(), numbers[-1]


def test_mae_whose_encoder_says_nothing_of_images_that_have_no_mean():
    mae = built("mae")
    mae.encoder.norm.requires_grad_(False).weight.zero_()  # every token becomes the bias
    assert causes("mae", mae, lr=5e-3, change=noise) == {"trivial_loss", "same_features"}, numbers[-1]


def test_uni4eye_whose_encoder_says_nothing_of_either_kind():
    uni4eye = built("uni4eye")
    uni4eye.encoder.norm.requires_grad_(False).weight.zero_()  # every token becomes the bias
    found = causes("uni4eye", uni4eye, lr=5e-3, change=in_turn_with_volumes(noise))
    assert found == {"trivial_loss", "same_features"}, numbers[-1]


def test_simmim_whose_encoder_says_nothing_of_images_that_have_no_mean():
    simmim = built("simmim")
    simmim.encoder.norm.requires_grad_(False).weight.zero_()  # every token becomes the bias
    assert causes("simmim", simmim, lr=5e-3, change=noise) == {"trivial_loss", "same_features"}, numbers[-1]


def test_fcmae_whose_last_stage_says_nothing_of_images_that_have_no_mean():
    fcmae = built("fcmae")
    first, *others = fcmae.encoder.stages[3].downsample.children()
    first.requires_grad_(False).weight.zero_()  # every position becomes the bias
    assert causes("fcmae", fcmae, change=noise) == {"trivial_loss", "same_features"}, numbers[-1]


def test_spark_whose_last_stage_says_nothing_of_images_that_have_no_mean():
    spark = built("spark")
    for layer in spark.encoder.layer4.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.weight.requires_grad_(False).zero_()  # every position becomes the bias
    assert causes("spark", spark, change=noise) == {"trivial_loss", "same_features"}, numbers[-1]


class WithoutStopGradient:
    """The teacher is the encoder itself and is trained to be predictable, which a constant is best at."""

    def teach(self, images):
        return forward_tokens(self.encoder, images)[:, self.num_prefix :]

    def look(self, images):
        _, saliency = super().look(images)
        return self.teach(images), saliency


@pytest.mark.parametrize(("name", "cls"), [("ijepa", IJEPA), ("dseqjepa", DSeqJEPA)])
def test_a_joint_embedding_whose_targets_are_trained(name, cls):
    objective = built(name, momentum=0.0)
    objective.__class__ = type("Forced", (WithoutStopGradient, cls), {})
    found = causes(name, objective, lr=5e-3)
    assert found & {"same_features", "few_dimensions"}, numbers[-1]


@pytest.mark.parametrize("name", ["ijepa", "dseqjepa"])
def test_a_teacher_that_does_not_follow(name):
    assert "lost_teacher" in causes(name, built(name, momentum=1.0), lr=1e-2), numbers[-1]


def test_barlow_twins_without_the_off_diagonal():
    coloured = {"blur": 0.0}  # views that differ in their colours have less in common that could be learned
    objective = built("barlow_twins", off_diagonal_weight=0.0, view_1=coloured, view_2=coloured)
    assert "redundant_embedding" in causes("barlow_twins", objective, lr=1e-2), numbers[-1]


def test_barlow_twins_whose_views_have_nothing_in_common():
    found = causes("barlow_twins", built("barlow_twins"), change=lambda batch: noise(batch, view=1))
    assert found & {"trivial_loss", "redundant_embedding"}, numbers[-1]


def test_vicreg_without_variance_and_covariance():
    objective = built("vicreg", variance_weight=0.0, covariance_weight=0.0)
    assert causes("vicreg", objective, lr=1e-2) == {"redundant_embedding"}, numbers[-1]


def test_msbreg_without_its_singular_values_or_a_teacher_of_its_own():
    objective = built("msbreg", singular_value_weight=0.0, brownian_weight=0.0, momentum=0.0, momentum_end=0.0)
    objective.predictor = torch.nn.Identity()  # what keeps BYOL from a constant is gone too
    assert causes("msbreg", objective, lr=3e-2) & {"redundant_embedding", "few_dimensions"}, numbers[-1]


def test_lejepa_without_its_regulariser():
    objective = built("lejepa", sigreg_weight=0.0)
    assert causes("lejepa", objective, lr=1e-2) == {"redundant_embedding"}, numbers[-1]


def test_vicreg_whose_views_have_nothing_in_common():
    found = causes("vicreg", built("vicreg"), change=lambda batch: noise(batch, view=1))
    assert "trivial_loss" in found, numbers[-1]


def test_rotation_of_images_without_an_upright():
    def symmetric(batch):
        (pixels,) = batch.views
        return replace(batch, views=(sum(torch.rot90(pixels // 4, k, dims=(2, 3)) for k in range(4)),))

    assert "trivial_loss" in causes("rotation", built("rotation"), change=symmetric), numbers[-1]
