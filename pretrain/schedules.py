"""Where a run stands, and the values that depend on nothing else.

Every scheduled value is a pure function of the optimizer step: nothing to save, nothing to drift on resume.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """`step` optimizer steps are done; the next one is number `step` (from 0)."""

    step: int
    num_steps: int
    steps_per_epoch: float

    @property
    def fraction(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return min(self.step / self.num_steps, 1.0)

    @property
    def epoch(self) -> float:
        """Passes over the data that are done."""
        return self.step / self.steps_per_epoch


def beginning(config, num_samples: int) -> Progress:
    """Of a run that sees `num_samples` an epoch, before its first step. A part of a step counts as one."""
    steps_per_epoch = num_samples / config.train.global_batch
    steps = round(config.train.epochs * steps_per_epoch, 6)  # in floating point 15 x (50,000 / 48) is above 15,625
    return Progress(0, max(math.ceil(steps), 1), steps_per_epoch)


def whole_intervals(epoch: float, every: float) -> int:
    """How many intervals of `every` epochs are over at `epoch`.

    An end that is reached counts although the quotient of floating point may lie below it: 15,625 steps of 50,000 / 96
    an epoch are 29.999999999999996 epochs. A step is a far larger part of any run than what is forgiven here.
    """
    return math.floor(epoch / every * (1 + 1e-12))


def cosine(start: float, end: float, fraction: float) -> float:
    """Half a cosine from `start` to `end`; flat outside [0, 1], so a run that goes on too long never climbs."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(fraction, 0.0), 1.0)))


def linear(start: float, end: float, fraction: float) -> float:
    return start + (end - start) * min(max(fraction, 0.0), 1.0)


def warmup_cosine(step: float, *, warmup: float, total: float, start: float, peak: float, end: float) -> float:
    """Linear from `start` to `peak` over `warmup` steps, then half a cosine to `end` at `total`.

    The first value is `start` itself: with start 0 the first update of a run changes nothing, as in the
    official MAE code.
    """
    if step < warmup:
        return linear(start, peak, step / warmup)
    return cosine(peak, end, (step - warmup) / max(total - warmup, 1))
