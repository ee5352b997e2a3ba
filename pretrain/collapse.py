"""Collapse: a loss that goes down, or stays, while the features come to say nothing. Watched for while a run trains.

Each sign of it is judged on what an objective logs (`pretrain.feature_health`) and on the features of online
evaluations:

| cause | sign |
|---|---|
| `same_features` | all images point the same way, or nothing varies at all |
| `few_dimensions` | features vary along one line or little more |
| `redundant_embedding` | the dimensions that Barlow Twins compares all say the same |
| `lost_teacher` | encoder and teacher no longer see an image alike |
| `trivial_loss` | the loss is what a model would have that ignores the image |

- Nothing is judged in the first `grace_steps`: joint-embedding methods start with nearly equal features.
- A sign must stand for `sustained_steps`, in every record, before it is told: once a cause, with what to change. The
  loss is judged by its running mean.
- From the first doubt on, the newest checkpoint from before it is kept; a doubt that passes lets it go again.
- The run goes on, unless `collapse.stop` asks for its end.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from prelude.pretrain.config import CollapseConfig
from prelude.pretrain.feature_health import TRIVIAL_LOSS
from prelude.pretrain.monitors import Monitor, Report, StepRecord

REMEDIES = {
    "same_features": "lower optimizer.lr, or lengthen optimizer.warmup_epochs",
    "few_dimensions": "lower optimizer.lr, or lower optimizer.weight_decay",
    "redundant_embedding": "raise objective.off_diagonal_weight",
    "lost_teacher": "lower objective.momentum, or lower optimizer.lr",
    "trivial_loss": "lower optimizer.lr, or lengthen optimizer.warmup_epochs",
}
_SMOOTHING = 0.1  # weight of the newest loss in its running mean: a batch's own luck is no sign
_FEWEST = {"step": 3, "evaluation": 2}  # observations in a row, however few steps lie between them


class Keeper(Protocol):
    """What the watch needs of a store."""

    def hold(self, step: int) -> Path | None: ...

    def release(self) -> None: ...


@dataclass(frozen=True)
class Sign:
    cause: str
    found: str  # what is seen, with its number


def signs(numbers: Mapping[str, float], config: CollapseConfig) -> list[Sign]:
    """What in these numbers speaks of collapse. A number that is not there is not judged."""
    found = []
    cosine, std = numbers.get("feature_cosine"), numbers.get("feature_std")
    if cosine is not None and cosine > config.max_cosine:
        found.append(Sign("same_features", f"two images' features have a cosine of {cosine:.5f} on average"))
    elif std is not None and std < config.min_std:
        found.append(Sign("same_features", f"features have a standard deviation of {std:.1e} over images"))
    else:
        # What does not vary has no directions to count.
        share = numbers.get("feature_rank_share")
        if share is not None and share < config.min_rank:
            rank = f"an effective rank of {numbers['feature_rank']:.2f}, " if "feature_rank" in numbers else ""
            found.append(Sign("few_dimensions", f"features have {rank}{share:.2%} of what is attainable"))
    share = numbers.get("embedding_rank_share")
    if share is not None and share < config.min_embedding_rank:
        found.append(Sign("redundant_embedding", f"the embedding has {share:.2%} of its attainable dimensions"))
    agreement = numbers.get("teacher_cosine")
    if agreement is not None and agreement < config.min_teacher_cosine:
        found.append(Sign("lost_teacher", f"features of encoder and teacher have a cosine of {agreement:.2f}"))
    loss, trivial = numbers.get("loss"), numbers.get(TRIVIAL_LOSS)
    if loss is not None and trivial is not None and abs(loss - trivial) < config.trivial_tolerance * trivial:
        found.append(Sign("trivial_loss", f"the loss is {loss:.4f}, and {trivial:.4f} for a model that sees nothing"))
    return found


class CollapseWatch(Monitor):
    """remedies: by cause, an objective's own advice; `REMEDIES` for the rest."""

    def __init__(self, config: CollapseConfig, store: Keeper, remedies: Mapping[str, str] | None = None):
        self.config, self.store, self.remedies = config, store, REMEDIES | dict(remedies or {})
        self.losses: dict[str, float] = {}  # running means of the loss and of its trivial value
        self.doubts: dict[tuple[str, str], _Doubt] = {}
        self.told: set[str] = set()
        self.healthy_step: int | None = None
        self.reports: list[Report] = []

    def record(self, record: StepRecord) -> None:
        numbers = {**record.parts, "loss": record.loss}
        for name in {"loss", TRIVIAL_LOSS} & numbers.keys():
            mean = self.losses.get(name, numbers[name])
            self.losses[name] = mean + _SMOOTHING * (numbers[name] - mean)
        self._observe("step", record.step, numbers | self.losses)

    def report(self, report: Report) -> None:
        if report.kind == "evaluation":
            self._observe("evaluation", report.step, report.numbers)

    def found(self) -> list[Report]:
        reports, self.reports = self.reports, []
        return reports

    def _observe(self, source: str, step: int, numbers: Mapping[str, float]) -> None:
        found = signs(numbers, self.config)
        if found and step <= self.config.grace_steps:
            return
        for sign in found:
            doubt = self.doubts.setdefault((source, sign.cause), _Doubt(step))
            doubt.count += 1
            stood = doubt.count >= _FEWEST[source] and step - doubt.since >= self.config.sustained_steps
            if stood and sign.cause not in self.told:
                self.told.add(sign.cause)
                self.reports.append(self._warning(step, sign, numbers, doubt.since))
        present = {(source, sign.cause) for sign in found}
        self.doubts = {key: doubt for key, doubt in self.doubts.items() if key in present or key[0] != source}
        self._keep_the_healthy(source, step)

    def _keep_the_healthy(self, source: str, step: int) -> None:
        if not self.doubts:
            if source == "step":
                self.healthy_step = step
            if not self.told:
                self.store.release()
        elif self.healthy_step is not None and not self.told:
            self.store.hold(self.healthy_step)

    def _warning(self, step: int, sign: Sign, numbers: Mapping[str, float], since: int) -> Report:
        kept = self.store.hold(self.healthy_step) if self.healthy_step is not None else None
        healthy = f"{kept}, the last healthy checkpoint, which is kept (by resume.checkpoint, in another run_dir)"
        where = healthy if kept else "the beginning, as none is older"
        text = (
            f"The run looks collapsed ({sign.cause}): since step {since} {sign.found}. To mend it, "
            f"{self.remedies[sign.cause]}, and start again from {where}."
        )
        return Report(step, "collapse", text, dict(numbers), cause=sign.cause, stop=self.config.stop)


@dataclass
class _Doubt:
    since: int  # step
    count: int = 0  # of observations in a row
