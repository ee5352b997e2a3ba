"""A teacher whose weights are an exponential moving average of a student's.

- A submodule of the objective: moved, saved and restored with it, by name.
- Its weights are frozen float32 and follow after every optimizer step that was applied, from weights that are
  already equal on all ranks; no rank has to ask another. That holds where every rank holds whole weights, so at
  ZeRO stages 0 to 2.
- It never drops a path or a token, whatever mode the objective is put into.
- Its batch norms compute with the student's running statistics; or, by `train_norms` and `follow_weights`, with those
  of the batch, as in BYOL, and keep running ones of their own.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prelude.pretrain.moving_average import move_towards


def momentum_teacher(student: nn.Module) -> nn.Module:
    """A frozen copy of `student` as it is now; call it after the student's weights have been drawn."""
    return copy.deepcopy(student).requires_grad_(False).eval()


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, share: Tensor) -> None:
    """teacher <- (1 - share) * teacher + share * student, for every weight; buffers are copied.

    share: a scalar on the device, 1 - momentum; 0 after a step that was refused.
    """
    follow_weights(teacher, student, share)
    for kept, current in zip(teacher.buffers(), student.buffers(), strict=True):
        kept.copy_(current)


def follow_weights(teacher: nn.Module, student: nn.Module, share: Tensor) -> None:
    """The same for weights alone."""
    move_towards(list(teacher.parameters()), list(student.parameters()), share)


def train_norms(teacher: nn.Module, mode: bool) -> None:
    """Puts batch norms, and nothing else, into training mode or out of it."""
    for module in teacher.modules():
        if isinstance(module, _BatchNorm):
            module.train(mode)
