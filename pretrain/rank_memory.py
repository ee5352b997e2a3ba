"""What a rank holds at its peak, by ZeRO stage, optimizer, precision and micro-batch.

W ranks, P bytes of trained weights in float32, s moments a weight (AdamW and LAMB 2, SGD and LARS 1):

- Stage 0: P (1 + s) always, and the step, whose gradients take P; to reduce them over ranks as much again at its end,
  and so does a copy of weights and moments, for an optimizer that cannot refuse a step itself.
- Stages 1 and 2: P + P (1 + s) / W, the step, and a bucket of gradients on their way, all of which stay until the
  optimizer's step at stage 1, and a share of P / W at stage 2.
- Stage 3: P (3 + s) / W and two buckets, of which one is filled while the other is reduced; the step without its
  gradients, and P for the weights as they are gathered.

Frozen weights, momentum teachers among them, and buffers come on top. The step is watched, see `step_cost`.
"""

from dataclasses import dataclass

from prelude.pretrain.config import Config
from prelude.pretrain.objective import Objective
from prelude.pretrain.step_cost import StepCost

_FLOAT = 4  # bytes
_LARGEST = 2**20  # micro-batch that is looked for
_GATHERED_AT_MOST = 1_000_000_000 * _FLOAT  # DeepSpeed's stage3_max_live_parameters
_REDUCED_AT_ONCE = 500_000_000 * _FLOAT


@dataclass(frozen=True)
class RankMemory:
    """Bytes. Gradients come while activations go, so that the peak is less than the sum."""

    weights: float  # trained, and under ZeRO the optimizer's own copy of them
    optimizer: float  # its moments
    frozen: float  # weights that are not trained, such as a momentum teacher's, and buffers
    gradients: float
    activations: float  # that the forward keeps for the backward
    peak: float


@dataclass(frozen=True)
class Held:
    """What an objective and its optimizer hold at any ZeRO stage, in bytes."""

    trained: float
    frozen: float
    buffers: float
    moments: int  # a trained weight
    refuses_itself: bool  # the optimizer leaves weights as they are where it is told to
    accumulates: bool  # gradients are there before a micro-batch
    bucket: float

    def rank_memory(self, cost: StepCost, micro_batch: int, stage: int, world_size: int) -> RankMemory:
        p, s, w = self.trained, self.moments, world_size
        held, beside = cost.held.largest(micro_batch), cost.beside_gradients.largest(micro_batch)
        undo = 0.0 if self.refuses_itself else p * (1 + s)
        frozen = self.frozen + self.buffers
        if stage == 0:
            weights, optimizer, gradients = p, p * s, p
            step = max(
                beside + p if self.accumulates else held, p + (min(p, _REDUCED_AT_ONCE) if w > 1 else 0), p + undo
            )
        elif stage < 3:
            weights, optimizer, gradients = p + p / w, p * s / w, p if stage == 1 else p / w
            step = held if stage == 1 and not self.accumulates else beside + gradients
            step = max(step + self.bucket, gradients + p / w + undo / w)
        else:
            weights, optimizer, gradients = 2 * p / w, p * s / w, p / w
            frozen = self.frozen / w + self.buffers
            gathered = min(p + self.frozen, _GATHERED_AT_MOST) if w > 1 else 0.0
            step = max(beside + gathered, undo / w) + gradients + self.bucket * min(w, 2)
        kept = cost.kept.largest(micro_batch)
        return RankMemory(weights, optimizer, frozen, gradients, kept, weights + optimizer + frozen + step)

    def largest_micro_batch(self, cost: StepCost, memory: float, stage: int, world_size: int) -> int:
        """That fits into `memory` bytes; 0 where none does."""
        fitting, beyond = 0, 1
        while beyond <= _LARGEST and self.rank_memory(cost, beyond, stage, world_size).peak <= memory:
            fitting, beyond = beyond, 2 * beyond
        if fitting == _LARGEST:
            return fitting
        while beyond - fitting > 1:
            middle = (fitting + beyond) // 2
            fits = self.rank_memory(cost, middle, stage, world_size).peak <= memory
            fitting, beyond = (middle, beyond) if fits else (fitting, middle)
        return fitting


def held_by(config: Config, objective: Objective, accumulation: int, bucket: float) -> Held:
    sizes = {True: 0, False: 0}
    for parameter in objective.parameters():
        sizes[parameter.requires_grad] += parameter.numel() * parameter.element_size()
    o = config.optimizer
    return Held(
        trained=sizes[True],
        frozen=sizes[False],
        buffers=sum(buffer.numel() * buffer.element_size() for buffer in objective.buffers()),
        moments={"adamw": 2, "lamb": 2}.get(o.name, 1 if o.momentum else 0),
        refuses_itself=o.name == "adamw",
        accumulates=accumulation > 1,
        bucket=bucket,
    )


def zero_stages(config: Config, objective: Objective) -> list[int]:
    """That this run could be given."""
    whole = config.optimizer.name in ("lars", "lamb") or config.train.precision == "fp16"
    return [0] if whole else list(range(objective.max_zero_stage + 1))
