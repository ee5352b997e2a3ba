"""What a run would be, without running it: size, cost and length, for `--dry-run`."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from prelude.data.batch import Batch, ViewPlan
from prelude.pretrain.config import Config
from prelude.pretrain.objective import Objective
from prelude.pretrain.schedules import Progress

_MIB = 2**20


def describe(config: Config, objective: Objective, *, num_samples: int, world_size: int) -> list[tuple[str, str]]:
    """(what, how much) rows. Runs one forward and backward of two blank images on the CPU to count."""
    micro_batch, accumulation = config.batching(world_size)
    flops, activations = step_cost(objective)
    trainable = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    encoder = sum(p.numel() for p in objective.encoder.parameters())
    shared_by = world_size if config.train.zero_stage else 1
    state = trainable * (4 + 4 + 8 / shared_by)  # weights and gradients whole, AdamW's two moments
    steps_per_epoch = num_samples / config.train.global_batch
    return [
        ("parameters", f"{_count(trainable)} trained, {_count(encoder)} of them in the encoder"),
        ("cost of an image", f"{_count(flops)}FLOPs forward and backward"),
        ("batch", f"{config.train.global_batch} = {world_size} ranks x {micro_batch} images x {accumulation}"),
        ("length", f"{steps_per_epoch:.1f} steps an epoch, {-int(-config.train.epochs * steps_per_epoch // 1)} in all"),
        ("peak learning rate", f"{config.peak_lr:.3g}"),
        (
            "memory a rank",
            f"about {state / _MIB:.0f} MiB of weights, gradients and optimizer state, and "
            f"{activations * micro_batch / _MIB:.0f} MiB of activations in float32",
        ),
    ]


def step_cost(objective: Objective) -> tuple[float, float]:
    """(FLOPs forward and backward, bytes kept for the backward) of one image."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = blank_batch(objective.views, size=2)
    parameters = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = objective(batch, Progress(0, 1, 1.0))
        loss.total.backward()
    objective.zero_grad(set_to_none=True)
    activations = sum(size for pointer, size in kept.items() if pointer not in parameters)
    return counter.get_total_flops() / len(batch), activations / len(batch)


def blank_batch(plan: ViewPlan, size: int) -> Batch:
    return Batch(
        views=tuple(torch.zeros(size, plan.channels, *view.size, dtype=torch.uint8) for view in plan.views),
        boxes=torch.zeros(size, len(plan.views), 4, dtype=torch.int32),
        flips=torch.zeros(size, len(plan.views), dtype=torch.bool),
        seeds=torch.arange(size),
        sample_ids=torch.arange(size),
        positions=torch.arange(size),
        labels=torch.zeros(size, dtype=torch.int64),
    )


def _count(number: float) -> str:
    """1234567 as `1.23 M`."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number:.0f} "
