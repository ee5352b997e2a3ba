"""How good a classifier is on labelled samples: each is scored once, whatever the number of ranks.

- One class an image: shares of right answers, and with weighted classes also the mean of the classes' shares.
- Several findings: macro AUC and mAP by `frozen.multilabel`, from the scores of all ranks, ranked together.
"""

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from prelude.data.batch import Batch
from prelude.data.errors import Stopped
from prelude.data.findings import UNCERTAIN, VectorFormat
from prelude.data.loader import one_pass
from prelude.evaluators.features.extraction import NothingReadable
from prelude.evaluators.finetuning.classifier import Classifier
from prelude.evaluators.finetuning.samples import Part
from prelude.evaluators.frozen.multilabel import judge, macro
from prelude.evaluators.frozen.ranking import group_warnings
from prelude.evaluators.results import TOP5_FROM, Percent, hits, percent
from prelude.pretrain import distributed
from prelude.pretrain.files import Lines
from prelude.pretrain.monitors import Monitor, StepRecord
from prelude.pretrain.schedules import Progress, whole_intervals

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """On all ranks alike."""

    numbers: dict[str, Percent]
    total: int  # samples that were scored
    unreadable: int
    by_label: dict[str, dict] = field(default_factory=dict)  # of findings, see `frozen.multilabel.judge`
    warnings: Sequence[str] = ()

    @property
    def values(self) -> dict[str, float]:
        return {name: number.value for name, number in self.numbers.items()}


@dataclass(frozen=True)
class Testing:
    """A classifier and the samples that it is judged on. A call scores them; collective."""

    __test__ = False  # no test of pytest's

    classifier: Classifier
    part: Part
    label: str
    findings: VectorFormat | None
    batch_size: int
    num_workers: int
    seed: int = 0  # of the bootstrap

    def __call__(self, *, current: bool = False, intervals: bool = False) -> Found:
        """current: the weights as they are now, and not those that were chosen. intervals: of findings, which take a
        while.

        Raises Stopped on all ranks when one of them is asked to stop while its images do not come, and NothingReadable
        where none of the samples could be scored.
        """
        scored, stopped = [], ""
        training = self.classifier.training
        self.classifier.eval()
        try:
            for batch in self._batches():
                scored.append(self._scored(batch.to(distributed.device()), current))
        except Stopped as stop:
            stopped = str(stop)
        finally:
            self.classifier.train(training)
        if why := next(filter(None, distributed.of_all(stopped)), ""):
            raise Stopped(why)
        return self._of_findings(scored, intervals) if self.findings else self._of_classes(scored)

    def _batches(self):
        return one_pass(
            self.part.index,
            self.classifier.test_views,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            label=self.label,
            findings=self.findings,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )

    def _scored(self, batch: Batch, current: bool) -> tuple | Tensor:
        with torch.autocast("cuda", torch.bfloat16) if distributed.device().type == "cuda" else nullcontext():
            scores = self.classifier.scores(batch, current=current)
        if self.findings:
            return scores.cpu(), batch.labels.cpu(), batch.sample_ids.cpu()
        places = _places(self.classifier.classes, batch.labels)
        return _counts(scores, places)

    def _of_classes(self, scored: list[Tensor]) -> Found:
        num_classes = len(self.classifier.classes)
        counts = sum(scored) if scored else torch.zeros(3 + 2 * num_classes)  # a rank may have had nothing to score
        total, top1, top5, *by_class = map(int, distributed.total(*counts.tolist()))
        if not total:
            raise NothingReadable(self.part.index.named)
        numbers = {"top1": percent(top1, total)}
        if num_classes >= TOP5_FROM:
            numbers["top5"] = percent(top5, total)
        if self.classifier.weights is not None:
            right, there = by_class[:num_classes], by_class[num_classes:]
            numbers["balanced"] = mean_of_classes(right, there, self.part.num_lacking)
        return Found(numbers, total, self._unreadable(total))

    def _of_findings(self, scored: list[tuple], intervals: bool) -> Found:
        width = len(self.findings.names)
        empty = torch.zeros(0, width), torch.zeros(0, width), torch.zeros(0, dtype=torch.int64)
        own = [torch.cat(column).numpy() for column in zip(empty, *scored, strict=True)]
        of_ranks = zip(*distributed.of_all(own), strict=True)
        scores, answers, ids = (torch.cat([torch.from_numpy(part) for part in column]) for column in of_ranks)
        if not len(ids):
            raise NothingReadable(self.part.index.named)
        answers[answers == UNCERTAIN] = torch.nan
        groups = None if self.part.groups is None else self.part.groups[ids]
        rest = {"total": len(ids), "unreadable": self._unreadable(len(ids))}
        if not intervals:
            return Found({name: Percent(value, None) for name, value in macro(scores, answers, groups).items()}, **rest)
        numbers, by_label = judge(scores, answers, self.findings.names, self.seed, groups)
        return Found(numbers, **rest, by_label=by_label, warnings=group_warnings(groups))

    def _unreadable(self, total: int) -> int:
        return self.part.index.num_samples - self.part.num_unlabelled - total


class TestCurve(Monitor):
    """test.jsonl: how good the classifier is every so many epochs, at the next logged step. On every rank."""

    __test__ = False  # no test of pytest's

    def __init__(self, test: Testing, every_epochs: float, path: Path):
        self.test, self.every_epochs, self.lines = test, every_epochs, Lines(path)

    def recount(self, step: int, batch: int, batch_now: int) -> None:
        if distributed.is_main():
            self.lines.recount(step, batch, batch_now)

    def start(self, progress: Progress) -> None:
        tested = [0.0]  # epochs; a test that was due when the run ended is made up for
        if distributed.is_main():
            self.lines.start(progress.step)
            tested += [record["epoch"] for record in self.lines.read()]
        self.done = whole_intervals(distributed.from_main(tested[-1]), self.every_epochs)

    def record(self, record: StepRecord) -> None:
        due = whole_intervals(record.epoch, self.every_epochs)
        if due <= self.done:
            return
        self.done = due
        try:
            found = self.test(current=True)
        except Stopped as stop:
            log.warning("the test of step %d is left out: the run is stopped %s", record.step, stop)
            return  # the engine ends the run at its next step, and saves
        if distributed.is_main():
            self.lines.add({"step": record.step, "epoch": record.epoch, **found.values})

    def saving(self, step: int) -> None:
        if distributed.is_main():
            self.lines.sync()


def mean_of_classes(right: list[int], there: list[int], lacking: int = 0) -> Percent:
    """Of the shares of right answers of those classes that are there. Raises no error where there is none: 0.

    lacking: how many classes more are there that cannot be answered, each with a share of 0.
    """
    shares = [(hit / count, count) for hit, count in zip(right, there, strict=True) if count]
    num = max(len(shares) + lacking, 1)
    variances = [share * (1 - share) / count for share, count in shares]
    return Percent(100 * sum(share for share, _ in shares) / num, 100 * math.sqrt(sum(variances)) / num)


def _counts(scores: Tensor, places: Tensor) -> Tensor:
    """(3 + 2 C,) float64: samples, hits among the first one and the first five, hits and samples of each class."""
    found, num_classes = hits(scores, places), scores.shape[1]
    right = places[(places >= 0) & (scores.argmax(1) == places)]
    by_class = [torch.bincount(of[of >= 0], minlength=num_classes) for of in (right, places)]
    head = torch.tensor([len(scores), found["top1"], found.get("top5", 0)])
    return torch.cat([head, *(count.cpu() for count in by_class)]).double()


def _places(classes: Tensor, labels: Tensor) -> Tensor:
    """(B,) the place of each label among the classes, -1 for a class that was not trained on."""
    place = torch.searchsorted(classes, labels).clamp(max=len(classes) - 1)
    return torch.where(classes[place] == labels, place, -1)
