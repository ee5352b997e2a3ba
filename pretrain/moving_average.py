"""Exponential moving averages of weights, moved on the device."""

import torch
from torch import Tensor


@torch.no_grad()
def move_towards(kept: list[Tensor], current: list[Tensor], share: Tensor) -> None:
    """kept <- (1 - share) * kept + share * current, in place.

    share: a scalar on the device, 1 - momentum; 0 where nothing is to move, as after a step that was refused. Written
    as a step towards `current`, whose rounding error shrinks with the step.
    """
    steps = torch._foreach_sub(current, kept)
    torch._foreach_mul_(steps, share)
    torch._foreach_add_(kept, steps)
