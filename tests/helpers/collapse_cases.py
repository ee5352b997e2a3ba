"""Logged steps and evaluations as a watch for collapse sees them, and a store that only remembers what it holds."""

from pathlib import Path

from prelude.pretrain.collapse import CollapseWatch
from prelude.pretrain.collapse_config import CollapseConfig
from prelude.pretrain.monitors import Report, StepRecord

HEALTHY = {"feature_cosine": 0.9, "feature_std": 0.3, "feature_rank": 20.0, "feature_rank_share": 0.15}


class RememberingStore:
    held: int | None = None

    def hold(self, step: int) -> Path | None:
        self.held = step
        return Path(f"checkpoints/step-{step:08d}")

    def release(self) -> None:
        self.held = None


def a_watch(remedies=None, teacher_steps=0.0, run_dir=None, **settings) -> CollapseWatch:
    return CollapseWatch(CollapseConfig(**settings), RememberingStore(), remedies, teacher_steps, run_dir)


def a_record(step: int, loss: float = 0.5, num_steps: int = 2000, **parts: float) -> StepRecord:
    zeros = dict.fromkeys(StepRecord.__dataclass_fields__, 0)
    return StepRecord(**zeros | {"step": step, "num_steps": num_steps, "loss": loss, "parts": HEALTHY | parts})


def an_evaluation(step: int, **numbers: float) -> Report:
    return Report(step, "evaluation", "", HEALTHY | numbers)
