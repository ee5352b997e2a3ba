"""Which number format a run computes in: by what is asked, by what is measured, by what it began with."""

import pytest
import torch

from prelude.data.errors import UserError
from prelude.pretrain import precision
from prelude.pretrain.config import Config

CPU = torch.device("cpu")


def config(**train) -> Config:
    return Config.model_validate(
        {
            "run_dir": "x",
            "data": {"shards": "x"},
            "encoder": {"name": "x", "image_size": 8},
            "objective": {"name": "x"},
            "train": {"epochs": 1, "global_batch": 8} | train,
            "optimizer": {"lr": 1},
        }
    )


def resolved(meta=None, **train) -> tuple[str, str]:
    found, notice = precision.resolve(config(**train), CPU, meta or {})
    return str(found), notice


def meta_of(name: str, asked: str) -> dict:
    return {"precision": name, "config": {"train": {"precision": asked}}}


@pytest.fixture
def measured(monkeypatch):
    return lambda ratio: monkeypatch.setattr(precision, "product_ratio", lambda: ratio)


def test_what_is_asked_for_is_taken_unmeasured(monkeypatch):
    monkeypatch.delattr(precision, "product_ratio")
    for name in ("bf16", "fp16", "fp32"):
        assert resolved(precision=name) == (name, "")
    with pytest.raises(UserError, match="train.precision=bf16, or train.zero_stage=0"):
        resolved(precision="fp16", zero_stage=1)


def test_float32_is_that_of_convolutions_too(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for name, rounded in (("bf16", True), ("fp32", False)):
        precision.agreed(config(precision=name), CPU, {})
        assert torch.backends.cudnn.allow_tf32 == rounded


@pytest.mark.parametrize(("ratio", "name"), [(0.3, "bf16"), (0.9, "fp32"), (14.0, "fp32")])
def test_auto_takes_bf16_where_it_was_measured_to_be_faster(measured, ratio, name):
    measured(ratio)
    assert resolved() == (f"{name} (a product in bf16 takes {ratio:.2g} times as long as in fp32)", "")


@pytest.mark.parametrize("ratio", [0.3, 9.0])
@pytest.mark.parametrize(
    ("before", "asked_before", "asked"),
    [("fp32", "auto", "bf16"), ("bf16", "bf16", "fp32"), ("fp16", "fp16", "auto"), ("bf16", "bf16", "auto")],
)
def test_a_run_that_goes_on_otherwise_says_so(measured, ratio, before, asked_before, asked):
    measured(ratio)
    fresh, _ = resolved(precision=asked)
    found, notice = resolved(meta_of(before, asked_before), precision=asked)
    assert found == fresh
    changes = fresh.split()[0] != before
    assert bool(notice) == changes
    assert not changes or f"train.precision {before} -> {fresh.split()[0]}" in notice


@pytest.mark.parametrize("before", ["bf16", "fp32"])
@pytest.mark.parametrize("ratio", [0.3, 9.0])
def test_auto_keeps_what_the_run_began_with(measured, ratio, before):
    measured(ratio)
    here, _ = resolved()
    found, notice = resolved(meta_of(before, "auto"))
    if here.startswith(before):
        assert (found, notice) == (here, "")
    else:
        assert found == f"{before} (as the run began)" and here in notice
        assert f"write train.precision={here.split()[0]}" in notice


def test_a_checkpoint_that_does_not_say_leaves_the_choice_open(measured):
    measured(0.3)
    assert resolved({"config": {"train": {"precision": "auto"}}})[0].startswith("bf16")


def test_measuring_draws_nothing():
    before = torch.get_rng_state()
    assert precision.product_ratio() > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_deepspeed_reduces_in_float32_whatever_is_computed_in():
    # An empty list: DeepSpeed would otherwise reduce the gradients of linear layers in the lower precision.
    assert precision.autocast_section("bf16") == {
        "enabled": True,
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],
    }
    assert precision.autocast_section("fp32") == {"enabled": False}
