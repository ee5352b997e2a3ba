import math

import pytest

from prelude.data.errors import UserError
from prelude.pretrain.budget import within
from prelude.pretrain.recipes import validate_config
from prelude.pretrain.schedules import beginning


def a_config(**optimizer):
    values = {
        "run_dir": "run",
        "data": {"shards": "x.tar"},
        "encoder": {"name": "resnet18", "image_size": 32},
        "objective": {"name": "any"},
        "train": {"epochs": 200, "global_batch": 96},
        "optimizer": {"lr": 0.1, **optimizer},
    }
    return validate_config(values, "here")


def as_numbers(overrides) -> dict[str, list[float]]:
    return {
        key: [float(part) for part in value.strip("[]").split(",")]
        for key, _, value in (text.partition("=") for text in overrides)
    }


@pytest.mark.parametrize("num_samples", [7, 96, 999, 20_000, 1_281_167])
@pytest.mark.parametrize("num_images", [96, 97, 960, 12_345, 1_000_003])
def test_the_engine_counts_the_batches_that_were_asked_for(num_samples, num_images):
    (epochs,) = as_numbers(within(a_config(), num_images, num_samples))["train.epochs"]
    config = a_config()
    config = config.model_copy(update={"train": config.train.model_copy(update={"epochs": epochs})})
    assert beginning(config, num_samples).num_steps == math.ceil(num_images / 96)


def test_warm_up_and_milestones_keep_their_share_of_the_run():
    found = as_numbers(within(a_config(warmup_epochs=10.0, milestones=[60, 120]), 96_000, 9600))
    assert found["train.epochs"] == [pytest.approx(10)]
    assert found["optimizer.warmup_epochs"] == [pytest.approx(0.5)]
    assert found["optimizer.milestones"] == pytest.approx([3, 6])


def test_an_encoder_is_held_still_for_the_same_share_of_the_run():
    config = a_config()  # 200 epochs of 100 steps
    config = config.model_copy(update={"train": config.train.model_copy(update={"freeze_encoder_steps": 19_999})})
    for num_images, steps in ((96_000, 999), (9600, 99), (96, 0), (200 * 9600, 19_999)):
        assert as_numbers(within(config, num_images, 9600))["train.freeze_encoder_steps"] == [steps]


def test_less_than_a_batch_is_refused():
    with pytest.raises(UserError, match="95 images cannot make one batch of train.global_batch=96"):
        within(a_config(), 95, 1000)
