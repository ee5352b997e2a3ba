"""Batches without shards: what an engine or an objective is handed where only the computation is looked at.

- Sample n is the same image wherever it comes up; a position has its own seed, flips and views, as in a run.
- Rank r of W takes positions r, r + W, ... of each global batch, by the loader's rule.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from prelude.data.batch import Batch, ViewPlan, VolumePlan
from prelude.pretrain import distributed


class MemoryLoader:
    """Stands in for a loader of shards."""

    bad = SimpleNamespace(num_bad=0, num_read=0)

    def __init__(self, micro_batch: int, num_samples: int, batch_at: Callable[[Tensor], Batch]):
        self.micro_batch, self.num_samples, self.batch_at, self.consumed = micro_batch, num_samples, batch_at, 0

    def __iter__(self):
        world = distributed.world_size()
        while True:
            positions = self.consumed + torch.arange(self.micro_batch) * world + distributed.rank()
            self.consumed += self.micro_batch * world
            yield self.batch_at(positions)

    def state_dict(self):
        return {"consumed": self.consumed}

    def load_state_dict(self, state, allow_changed_data):
        self.consumed = state["consumed"]


def made_up_batch(positions: Tensor, plan: ViewPlan, num_samples: int, salt: int = 0) -> Batch:
    """The samples at `positions` of the endless order: coarse colours with noise, so that there is something to learn.

    salt: other pixels for the same samples.
    """
    ids, num_views = positions % num_samples, len(plan.views)
    views = tuple(
        torch.stack([_pixels(int(sample), (len(plan.mean), *view.size), 1000 * salt + number) for sample in ids])
        for number, view in enumerate(plan.views)
    )
    boxes = torch.tensor([[[0, 0, *view.size] for view in plan.views]], dtype=torch.int32)
    return Batch(
        views=views,
        boxes=boxes.repeat(len(ids), 1, 1),
        flips=(positions[:, None] + torch.arange(num_views)) % 3 == 0,
        seeds=positions * 0x9E3779B97F4A7C1 + 1,  # apart, as those of a run are
        sample_ids=ids,
        positions=positions,
    )


def made_up_volumes(positions: Tensor, plan: VolumePlan, num_samples: int, salt: int = 0) -> Batch:
    """The same of volumes."""
    ids = positions % num_samples
    shape = (plan.channels, *plan.size)
    return Batch(
        views=(torch.stack([_pixels(int(sample), shape, 1000 * salt) for sample in ids]),),
        boxes=torch.zeros(len(ids), 1, 4, dtype=torch.int32),
        flips=torch.zeros(len(ids), 1, dtype=torch.bool),
        seeds=positions * 0x9E3779B97F4A7C1 + 3,
        sample_ids=ids,
        positions=positions,
    )


def _pixels(sample: int, shape: tuple[int, ...], number: int) -> Tensor:
    """(C, H, W) or (C, H, W, Z) uint8."""
    generator = torch.Generator().manual_seed(sample * 7919 + number // 1000)
    coarse = torch.rand(1, shape[0], *(4 for _ in shape[1:]), generator=generator)
    image = torch.nn.functional.interpolate(coarse, shape[1:], mode="bilinear" if len(shape) == 3 else "trilinear")[0]
    generator = torch.Generator().manual_seed(sample * 7919 + number + 1)
    return (255 * (0.8 * image + 0.2 * torch.rand(shape, generator=generator))).to(torch.uint8)
