import math

import pytest
import timm

from prelude.checkpoints.sources import OpenedEncoder
from prelude.data.errors import UserError
from prelude.evaluators.features.pixels import open_pixels
from prelude.evaluators.protocols.papers import PROTOCOLS, protocol_of
from prelude.pretrain.config import EncoderConfig


def opened(name, **settings):
    model = timm.create_model(name, num_classes=0, **settings)
    return OpenedEncoder(model, EncoderConfig(name=name, image_size=32), (0.5,) * 3, (0.2,) * 3, "encoder", "weights")


def test_rates_at_the_papers_batches():
    assert PROTOCOLS["mae"].peak_lr(0.1) == pytest.approx(6.4)
    assert PROTOCOLS["barlow_twins"].peak_lr(0.3) == 0.3
    assert PROTOCOLS["vissl"].peak_lr(0.01) == 0.01
    assert PROTOCOLS["ijepa"].peak_lr(0.05) == pytest.approx(3.2)


def test_curves_of_the_papers():
    mae, steps = PROTOCOLS["mae"], 9000  # 100 an epoch
    assert [mae.lr_factor(step, steps) for step in (0, 500, 1000)] == pytest.approx([0, 0.5, 1])
    assert mae.lr_factor(5000, steps) == pytest.approx(0.5) and mae.lr_factor(8999, steps) < 1e-6
    vissl = PROTOCOLS["vissl"]
    found = [vissl.lr_factor(epoch * 10, 280) for epoch in (0, 7, 8, 15, 16, 23, 24, 27)]
    assert found == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    ijepa = [PROTOCOLS["ijepa"].lr_factor(epoch * 10, 500) for epoch in (14, 15, 30, 45)]
    assert ijepa == pytest.approx([1, 0.1, 0.01, 0.001])
    barlow = PROTOCOLS["barlow_twins"]
    assert barlow.lr_factor(0, 1000) == barlow.lr_factor(9, 1000) == 1  # constant within an epoch of ten steps
    assert barlow.lr_factor(10, 1000) == pytest.approx(0.5 * (1 + math.cos(math.pi / 100)))


def test_kinds_are_those_of_the_paper_or_what_the_encoder_has():
    vit = opened("vit_tiny_patch16_224", img_size=32)
    resnet = opened("resnet18")
    assert PROTOCOLS["mae"].kinds_of(vit) == ("cls",) and PROTOCOLS["ijepa"].kinds_of(vit) == ("mean", "last4")
    assert PROTOCOLS["mae"].kinds_of(resnet) == PROTOCOLS["barlow_twins"].kinds_of(resnet) == ("pool",)
    shallow = opened("vit_tiny_patch16_224", img_size=32, depth=2)
    assert PROTOCOLS["ijepa"].kinds_of(shallow) == ("mean",)
    assert PROTOCOLS["ijepa"].kinds_of(open_pixels("pixels:8")) == ("pixels",)


def test_views_are_augmented_as_the_papers_do():
    (view,) = PROTOCOLS["barlow_twins"].plan(open_pixels("pixels:8")).views
    assert (view.crop, view.scale, view.flip, view.interpolation) == ("random_resized", (0.08, 1.0), 0.5, "bilinear")
    assert PROTOCOLS["mae"].plan(open_pixels("pixels:8")).views[0].interpolation == "bicubic"


def test_changes_replace_and_impossible_ones_are_refused():
    changed = protocol_of("mae", epochs=3.0, learning_rates=(0.1, 0.3), global_batch=None)
    assert (changed.epochs, changed.learning_rates, changed.global_batch) == (3.0, (0.1, 0.3), 16384)
    with pytest.raises(UserError, match="write one of mae, ijepa"):
        protocol_of("moco")
    for wrong in ({"epochs": 0.0}, {"learning_rates": (0.1, -1.0)}, {"global_batch": 0}):
        with pytest.raises(UserError, match="cannot be"):
            protocol_of("mae", **wrong)
