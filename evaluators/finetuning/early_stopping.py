"""Training watched on what is held out of the training images: a curve, and with `patience` an early end.

- A validation is due whenever another `validate_every_epochs` are done, and after the last step.
- What was found so far, and with `patience` the best weights, are tensors of the module, hence in every checkpoint: a
  run that goes on decides as one that was never interrupted. A validation that a stop cut short is made up for before
  the next step.
- What is compared is macro AUC for findings; else the share of right answers, or the mean of the classes' shares where
  classes are weighted. Of equal values the earlier one is kept.
"""

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from prelude.evaluators.finetuning.recipe import FineTuneOptions
from prelude.evaluators.results import TITLES
from prelude.pretrain import attendance, distributed
from prelude.pretrain.monitors import LinesMonitor, Report
from prelude.pretrain.schedules import Progress, whole_intervals

_PREFERENCE = ("auc", "balanced", "top1")


class HeldOut(nn.Module):
    """What the held-out images have said so far. `test` scores the current weights on them; the door sets it."""

    test: Callable

    def __init__(self, options: FineTuneOptions, trained: nn.ModuleDict):
        super().__init__()
        self.every_epochs, self.patience = options.validate_every_epochs, options.patience
        self.register_buffer("validated", torch.zeros((), dtype=torch.int64))  # the step of the last validation
        self.register_buffer("best", torch.full((), -math.inf, dtype=torch.float64))
        self.register_buffer("best_step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("in_a_row", torch.zeros((), dtype=torch.int64))  # validations that were not better
        self.kept = copy.deepcopy(trained).requires_grad_(False) if self.patience else None
        self.ended: bool | None = None  # None at the start; between validations the device is not waited for
        self.news: list[dict] = []  # of validations that nobody has been told of

    @property
    def chosen(self) -> nn.ModuleDict | None:
        """The best weights so far; None before there are any, when `kept` is but a copy of those of the start."""
        return self.kept if self.best.isfinite() else None

    def has_ended(self, progress: Progress, current: Callable[[], Mapping[str, nn.Module]]) -> bool:
        """Validates where that is due; `current` gives what is then scored. Collective there; raises Stopped on all
        ranks."""
        due = self.is_due(progress)
        if due and self.validated.item() != progress.step:
            attendance.reach("validating", progress.step)
            self._take(progress, self.test(current=True).values, current())
        if (
            due or self.ended is None and self.validated.item() == progress.step
        ):  # made here when it was due a step later
            self.ended = self.patience is not None and self.in_a_row.item() >= self.patience
        return bool(self.ended)

    def is_due(self, progress: Progress) -> bool:
        epochs = (step / progress.steps_per_epoch for step in (progress.step, progress.step - 1))
        done, before = (whole_intervals(epoch, self.every_epochs) for epoch in epochs)
        return progress.step > 0 and (done > before or progress.step == progress.num_steps)

    def told(self) -> dict:
        """For a result: what was chosen, and on what; nothing without `patience`."""
        if self.patience is None:
            return {}
        chosen_by = "early stopping on the held-out images"
        return {"held_out": self.best.item(), "step": self.best_step.item(), "chosen_by": chosen_by}

    @torch.no_grad()
    def _take(self, progress: Progress, values: dict[str, float], current: Mapping[str, nn.Module]) -> None:
        name = next(name for name in _PREFERENCE if name in values)
        value = distributed.from_main(values[name])
        better = value > self.best.item()
        if better:
            self.best.fill_(value)
            self.best_step.fill_(progress.step)
            if self.kept is not None:
                kept, now = self.kept.state_dict(), nn.ModuleDict(current).state_dict()
                for key, tensor in kept.items():
                    tensor.copy_(now[key])
        self.in_a_row.fill_(0 if better else self.in_a_row.item() + 1)
        self.validated.fill_(progress.step)
        ends = self.patience is not None and self.in_a_row.item() >= self.patience
        self.news.append(
            {"step": progress.step, "epoch": progress.epoch, "by": name, "best": better, "ends": ends, "values": values}
        )


class HeldOutCurve(LinesMonitor):
    """validation.jsonl, the console and TensorBoard: what was found on the held-out images. On rank 0."""

    def __init__(self, held_out: HeldOut, path: Path):
        super().__init__(path)
        self.held_out = held_out

    def start(self, progress: Progress) -> None:
        super().start(progress)
        self.num_steps = progress.num_steps

    def found(self) -> list[Report]:
        news, self.held_out.news = self.held_out.news, []
        return [self._report(one) for one in news]

    def _report(self, one: dict) -> Report:
        self.lines.add({"step": one["step"], "epoch": one["epoch"], **one["values"], "best": one["best"]})
        shown = ", ".join(f"{TITLES.get(name, name)} {value:.1f}" for name, value in one["values"].items())
        best = self.held_out.best_step.item()
        text = f"held-out images: {shown}" + (", the best so far" if one["best"] else f"; the best was step {best}'s")
        if one["ends"] and one["step"] < self.num_steps:
            text += (
                f"\nstopped early, at step {one['step']} of {self.num_steps}: {self.held_out.patience} validations in "
                f"a row were not better; the weights of step {best} are the result"
            )
        return Report(one["step"], "validation", text, one["values"])
