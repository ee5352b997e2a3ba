"""A teacher whose weights are an exponential moving average of a student's.

- A submodule of the objective: moved, saved and restored with it, by name.
- Its weights are frozen float32 and follow after every optimizer step that was applied, from weights that are
  already equal on all ranks; no rank has to ask another. That holds where every rank holds whole weights, so at
  ZeRO stages 0 to 2.
- It never drops a path or a token, whatever mode the objective is put into.
"""

import copy

import torch
from torch import nn


def momentum_teacher(student: nn.Module) -> nn.Module:
    """A frozen copy of `student` as it is now; call it after the student's weights have been drawn."""
    return copy.deepcopy(student).requires_grad_(False).eval()


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, for every weight; buffers are copied.

    Written as a step towards the student, whose rounding error shrinks with the step: at momentum 1 nothing moves.
    """
    teachers, students = list(teacher.parameters()), list(student.parameters())
    torch._foreach_lerp_(teachers, students, 1.0 - momentum)
    for kept, current in zip(teacher.buffers(), student.buffers(), strict=True):
        kept.copy_(current)
