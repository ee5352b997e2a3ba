"""What a dry run says of a run's cost: by hand on a model small enough, and against what a run takes."""

import importlib.util
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from runs import ROOT
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from prelude.data.batch import View, ViewPlan
from prelude.data.errors import UserError
from prelude.pretrain import devices
from prelude.pretrain import step_cost as step_cost_module
from prelude.pretrain.config import Config
from prelude.pretrain.fitting import misfit
from prelude.pretrain.images import images
from prelude.pretrain.objective import Loss, Objective, Options
from prelude.pretrain.preview import duration, preview
from prelude.pretrain.step_cost import Ledger, ProductsInFloat32, step_cost

FLOAT = 4  # bytes


class Chain(nn.Sequential):
    """Two layers, of which a checkpointed forward keeps the inputs alone."""

    checkpointing = False

    def set_grad_checkpointing(self, enable=True):
        self.checkpointing = enable

    def forward(self, x):
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
        return x


class Small(Objective):
    def __init__(self, width=64):
        encoder = Chain(nn.Sequential(nn.Linear(192, width), nn.Tanh()), nn.Sequential(nn.Linear(width, 8), nn.Tanh()))
        super().__init__(encoder, Options(), image_size=(8, 8), mean=None, std=None)
        self.teacher = nn.Linear(10, 100).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()))
        self.views = ViewPlan((View((8, 8)),))

    def forward(self, batch, progress):
        self.seen += 1
        return Loss(self.encoder(images(batch, self.views)[0].flatten(1)).square().mean())


def config_of(**train) -> Config:
    return Config.model_validate(
        {
            "run_dir": "x",
            "data": {"shards": "x"},
            "encoder": {"name": "x", "image_size": 8},
            "objective": {"name": "x"},
            "train": {"epochs": 3, "global_batch": 16, "micro_batch": 4, "zero_stage": 1} | train,
            "optimizer": {"lr": 0.016},
        }
    )


def preview_of(objective=None, world_size=2, **train):
    return preview(
        config_of(**train), objective or Small(), num_samples=100, world_size=world_size, precision="fp32"
    )  # fmt: skip


def test_flops_grow_with_the_images():
    flops = step_cost(Small()).flops
    of_layers = [2 * 192 * 64, 2 * 64 * 8]
    # Forward, the gradient of the weights, and that of the second layer's input: the images need none
    assert flops.largest(1000) == 1000 * (2 * sum(of_layers) + of_layers[1])


def test_the_attention_of_a_cpu_is_counted():
    queries, keys = torch.randn(1, 2, 5, 8, requires_grad=True), torch.randn(1, 2, 7, 8)
    with Ledger() as ledger:
        scaled_dot_product_attention(queries, keys, keys).sum().backward()
    one_product = 2 * 2 * 5 * 7 * 8
    assert ledger.flops == (2 + 5) * one_product


def test_activations_are_what_the_backward_needs():
    kept = step_cost(Small()).kept
    images_and_tanhs = 192 + 64 + 8
    assert kept.largest(1000) == pytest.approx(1000 * FLOAT * images_and_tanhs, rel=0.05)


def test_checkpointing_keeps_less_and_computes_the_forward_again():
    plain, checkpointed = step_cost(Small(640)), step_cost(Small(640), checkpointing=True)
    assert checkpointed.kept.largest(100) == pytest.approx(100 * FLOAT * (192 + 640 + 8), rel=0.05)
    assert checkpointed.flops.largest(1) > 1.3 * plain.flops.largest(1)


def test_a_step_is_watched_without_a_trace():
    objective = Small()
    before, generator = {k: v.clone() for k, v in objective.state_dict().items()}, torch.get_rng_state()
    step_cost(objective, "bf16", checkpointing=True)
    assert all(torch.equal(before[name], value) for name, value in objective.state_dict().items())
    assert all(parameter.grad is None for parameter in objective.parameters())
    assert not objective.encoder.checkpointing and torch.equal(generator, torch.get_rng_state())


def test_the_rows_agree_with_the_config():
    rows = dict(preview_of().rows())
    assert rows["batch"] == "16 = 2 ranks x 4 images x 2"
    assert dict(preview_of(world_size=1, micro_batch=1).rows())["batch"] == "16 = 1 rank x 1 image x 16"
    assert rows["length"] == "6.2 steps an epoch, 19 in all"
    assert rows["peak learning rate"] == "0.001"


@pytest.mark.parametrize(
    "stage, shares", [(0, (1, 2, 1)), (1, (1.25, 0.5, 1)), (2, (1.25, 0.5, 0.25)), (3, (0.5, 0.5, 0.25))]
)
def test_state_is_shared_as_the_stage_says(stage, shares):
    objective = Small()
    trained = FLOAT * sum(p.numel() for p in objective.encoder.parameters())
    memory = preview_of(objective, world_size=4, micro_batch="auto", zero_stage=stage).rank_memory()
    assert [memory.weights, memory.optimizer, memory.gradients] == [share * trained for share in shares]
    teacher = FLOAT * 1100 / (4 if stage == 3 else 1)
    assert memory.frozen == teacher + FLOAT


def test_the_largest_micro_batch_is_the_last_that_fits():
    found = preview_of()
    memory = found.held.rank_memory(found.cost, 777, 1, 2).peak
    assert found.held.largest_micro_batch(found.cost, memory, 1, 2) == 777
    assert found.held.largest_micro_batch(found.cost, 1000, 1, 2) == 0


def usable(memory: float) -> devices.Figures:
    return devices.Figures(None, memory, "this machine")


def sizes(batch: int, world_size: int) -> list[int]:
    return [size for size in range(1, batch // world_size + 1) if batch % (size * world_size) == 0]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1])
def test_a_run_that_does_not_fit_is_told_with_the_largest_micro_batch_that_keeps_its_batch(stage, world_size):
    batch = 720  # with many divisors
    peaks = {}  # of runs that are configured so
    for size in sizes(batch, world_size):
        found = preview_of(Small(640), world_size, global_batch=batch, micro_batch=size, zero_stage=stage)
        peaks[size] = found.rank_memory().peak
    whole = preview_of(Small(640), world_size, global_batch=batch, micro_batch="auto", zero_stage=stage)
    for memory in (peaks[72], peaks[72] - 1, peaks[9] + 1):
        largest = max(size for size, peak in peaks.items() if peak <= memory)
        told = misfit(whole, usable(memory))
        assert told.startswith("This run does not fit: a rank takes ") and told.endswith(".")
        assert (
            f"write train.micro_batch={largest}, which fits, and of which {batch // largest // world_size} micro"
            in told
        )
        rows = {row[:2]: row[-1] for row in whole.alternatives(usable(memory))}
        keeping, of_any_size = rows[str(stage), "no"].split(" ")
        assert int(keeping) == largest <= int(of_any_size.strip("()"))
    assert misfit(whole, usable(whole.rank_memory().peak)) == ""
    row = next(row for row in whole.alternatives(usable(1000)) if row[0] == str(stage))
    assert row[-1] == "none" and "needs a device with more memory" in misfit(whole, usable(1000))


def test_what_else_makes_a_run_fit_is_told_where_it_does():
    def found(world_size=1, micro_batch="auto", **train):
        whole = preview_of(Small(640), world_size, global_batch=1000, micro_batch=micro_batch, **train)
        return replace(whole, costs=whole.costs | {True: step_cost(Small(64))})  # as if checkpointing spared that much

    checkpointed = found(gradient_checkpointing=True, zero_stage=0).rank_memory().peak
    told = misfit(found(zero_stage=0), usable(checkpointed))
    assert "write train.micro_batch=" in told
    assert told.endswith("of 1000, or train.gradient_checkpointing=true with the micro-batch as it is.")
    on_each = misfit(found(8, zero_stage=0), usable(found(8, zero_stage=0, micro_batch=25).rank_memory().peak))
    assert "write train.micro_batch=25, which fits, and of which 5 micro-batches on each rank make the same" in on_each


def test_an_objective_that_sees_its_batch_as_a_whole_is_told_of_ranks_and_not_of_micro_batches():
    class Whole(Small):
        accumulates = False

    whole = preview_of(Whole(640), 1, global_batch=1000, micro_batch="auto", zero_stage=0)
    whole = replace(whole, costs={False: whole.costs[False]})  # an encoder without checkpointing
    of_250 = preview_of(Whole(640), 4, global_batch=1000, micro_batch="auto", zero_stage=0).rank_memory().peak
    told = misfit(whole, usable(of_250))
    assert "train.micro_batch" not in told and "start it on 4 ranks, or write train.global_batch=" in told
    assert {row[-1].split()[0] for row in whole.alternatives(usable(of_250)) if row[0] == "0"} == {"none"}


def test_a_named_device_is_an_estimate_and_says_so():
    figures = devices.named("h100", "bf16")
    text = preview_of().expected_time(figures)
    assert "h100's data sheet (989 TFLOP/s in bf16)" in text and "not measured" in text
    with pytest.raises(UserError, match="h200"):
        devices.named("h1000", "bf16")
    with pytest.raises(UserError, match="fp16"):
        devices.named("t4", "bf16")


@pytest.mark.parametrize(
    "name, sheet",
    [
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_a_device_is_known_by_what_torch_calls_it(name, sheet, monkeypatch):
    properties = SimpleNamespace(name=name, total_memory=2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    figures = devices.here(torch.device("cuda", 0), "fp16")
    assert figures.source.partition("'s data sheet")[0] == (sheet or "this machine")
    assert (figures.peak is None) == (sheet is None)  # and is measured


def test_durations_have_the_unit_that_suits_them():
    assert [duration(90), duration(5400, 8640), duration(1e6)] == ["90 s", "1.5 to 2.4 h", "11.6 days"]


def test_what_is_said_of_memory_is_what_a_run_takes(monkeypatch):
    """On the CPU, by the allocator, at ZeRO 0 to 3, with every kind of optimizer; no accelerator is measured here."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as for a script that is started there
    spec = importlib.util.spec_from_file_location("memory_benchmark", ROOT / "benchmarks" / "memory.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    cases = [name for name in benchmark.CASES if name.startswith("tiny")]
    assert len(cases) >= 6
    for name, found in benchmark.compare(cases).items():
        assert found["predicted"] == pytest.approx(found["measured"], rel=0.15), name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_products_in_float32_are_watched_as_those_of_16_bits(precision, monkeypatch):
    """A CPU computes them faster; what they take and count is the same, and so are their types."""
    wide = step_cost(Small(), precision)
    monkeypatch.setattr(step_cost_module, "ProductsInFloat32", nullcontext)
    plain = step_cost(Small(), precision)
    for figure in ("flops", "held", "beside_gradients", "kept"):
        ours, theirs = getattr(wide, figure), getattr(plain, figure)
        assert ours.largest(5) == theirs.largest(5) and ours.largest(100) == theirs.largest(100), figure


def test_only_products_of_16_bits_are_widened_and_they_come_back_in_16():
    half = torch.randn(4, 4, dtype=torch.bfloat16)
    with ProductsInFloat32():
        found, double = torch.mm(half, half), torch.mm(half.double(), half.double())
    assert torch.equal(found, torch.mm(half.float(), half.float()).bfloat16()) and double.dtype == torch.float64
