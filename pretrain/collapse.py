"""Collapse: a loss that goes down, or stays, while the features come to say nothing. Watched for while a run trains.

Each sign of it is judged on what an objective logs (`pretrain.feature_health`) and on the features of online
evaluations:

| cause | sign |
|---|---|
| `same_features` | all images point the same way, or nothing varies at all |
| `few_dimensions` | features vary along one line or little more |
| `redundant_embedding` | the dimensions by which views are compared all say the same |
| `lost_teacher` | encoder and teacher no longer see an image alike |
| `trivial_loss` | the loss is what a model would have that ignores the image |

- Shares of the run, not counts of steps, say when: nothing is judged in its first tenth (`grace`), as joint-embedding
  methods start with nearly equal features, nor in the first half of a run of less than 1,000 steps.
- What is judged is the median of each number over a window, the last twentieth of the run (`sustained`; a quarter of a
  short one), and over its newest third: the majority of the records decides, a single one neither accuses nor acquits,
  and what is passing already is not told. The loss is judged by its mean. A cause is told once, with what to change.
- A window of more than 300 records is judged by 300 of them, evenly spaced: a judgement costs the same however long
  the run is.
- Steps of volumes are judged apart from those of images, by numbers whose names begin with `volume_`: an encoder may
  see one kind and be blind to the other.
- A teacher that is an average over many steps lags behind, the more the faster the encoder learns. It is lost only if
  that lasts for several times as many steps.
- From the first doubt on, the newest checkpoint from before it is kept; once a window without any lets it go again.
- The run goes on, unless `collapse.stop` asks for its end, and then for that of every start that finds a sign standing.
  At its end a line says "healthy", "collapsed", or "too short to be judged". A resumed run remembers what was logged
  before: it takes in every record, and judges where it begins.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Protocol

from prelude.pretrain.collapse_config import CollapseConfig
from prelude.pretrain.feature_health import OF_VOLUMES, TRIVIAL_LOSS
from prelude.pretrain.files import read_lines
from prelude.pretrain.monitors import Monitor, Report, StepRecord
from prelude.pretrain.schedules import Progress

REMEDIES = {
    "same_features": "lower optimizer.lr, or lengthen optimizer.warmup_epochs",
    "few_dimensions": "lower optimizer.lr, or lower optimizer.weight_decay",
    "redundant_embedding": "raise objective.off_diagonal_weight",
    "lost_teacher": "lower objective.momentum, or lower optimizer.lr",
    "trivial_loss": "lower optimizer.lr, or lengthen optimizer.warmup_epochs",
}
WATCHED = (
    "feature_cosine", "feature_std", "feature_rank", "feature_rank_share", "embedding_rank_share", "teacher_cosine",
    "loss", TRIVIAL_LOSS,
)  # fmt: skip
SHORTEST = 50  # steps of a run that is judged
FEWEST = {"step": 3, "volumes": 3, "evaluation": 2}  # observations in a window, however few steps lie between them
_GRACE, _SUSTAINED = (0.5, 500), (0.25, 100)  # at least: this share of the run, or so many steps where that is fewer
_ON_VOLUMES = "on volumes, "
_FAMILY = {"few_dimensions": "same_features"}  # of which `signs` names one at a time
_MOST = 300  # records of a window that are looked at
_TEACHER_SPANS = 3  # how often the steps that a teacher averages over


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
    """remedies: by cause, an objective's own advice; `REMEDIES` for the rest. teacher_steps: that a momentum teacher
    averages over, 1 / (1 - momentum). run_dir: where an earlier part of the run has left its logs, if anywhere."""

    def __init__(
        self,
        config: CollapseConfig,
        store: Keeper,
        remedies: Mapping[str, str] | None = None,
        teacher_steps: float = 0.0,
        run_dir: Path | None = None,
    ):
        self.config, self.store, self.remedies = config, store, REMEDIES | dict(remedies or {})
        self.teacher_patience, self.run_dir = _TEACHER_SPANS * teacher_steps, run_dir
        self.num_steps = self.last_step = 0
        self.seen = {source: _Window(fewest) for source, fewest in FEWEST.items()}  # after the grace
        self.standing: dict[str, dict[str, Sign]] = {source: {} for source in FEWEST}  # by source, then cause
        self.told: dict[tuple[bool, str], int] = {}  # (of volumes, cause): the step at which it was told
        self.raised: set[tuple[bool, str]] = set()  # the same, of this start
        self.judged: set[str] = set()  # sources
        self.watched = False
        self.concluded = False  # a verdict on the finished run was given by an earlier start
        self.healthy_step: int | None = None
        self.reports: list[Report] = []

    def start(self, progress: Progress) -> None:
        self.num_steps, self.last_step = progress.num_steps, progress.step
        if not (self.run_dir and progress.step):
            return
        store, self.store = self.store, _Nobody()  # what was kept then is kept still
        logged = [
            (line["step"], *_of_step(line["parts"] | {"loss": line["loss"]}))
            for line in self._lines("metrics.jsonl", progress.step)
        ]
        for line in self._lines("online.jsonl", progress.step):
            if line["kind"] == "evaluation":
                logged.append((line["step"], "evaluation", line["numbers"]))
            elif line["kind"] == "collapse":
                self.told.setdefault((_ON_VOLUMES in line["text"], line["cause"]), line["step"])
            elif line["kind"] == "verdict":
                self.concluded = line["step"] == progress.step  # of one that was made longer, until it goes on
        for step, source, numbers in sorted(logged, key=lambda one: one[0]):
            self._take_in(source, step, numbers)
        for source, seen in self.seen.items():
            if seen:
                self._judge(source)
        self.store, self.reports, self.raised = store, [], set()

    def _lines(self, log: str, step: int) -> list[dict]:
        """Of an earlier part of the run, up to and with `step`; what cannot be read of it was told where it is kept."""
        try:
            return [line for line in read_lines(self.run_dir / log) if line["step"] <= step]
        except OSError:
            return []

    def record(self, record: StepRecord) -> None:
        self.concluded = False
        self.num_steps, self.last_step = record.num_steps or self.num_steps, record.step
        source, numbers = _of_step(record.parts | {"loss": record.loss})
        self._observe(source, record.step, numbers)

    def report(self, report: Report) -> None:
        if report.kind == "evaluation":
            self.concluded = False  # it may be another now
            self._observe("evaluation", report.step, report.numbers)

    def found(self) -> list[Report]:
        reports, self.reports = self.reports, []
        return reports

    def finish(self) -> None:
        if self.concluded:
            return
        standing = [sign for signs_of in self.standing.values() for sign in signs_of.values()]
        step = max((seen.newest.step for seen in self.seen.values() if seen), default=0)
        if standing:
            verdict, text = "collapsed", f"the run has ended collapsed: {'; '.join(sign.found for sign in standing)}"
        elif self.judged:
            verdict, text = "healthy", "the features are healthy: no sign of collapse stands at the end"
            text += "".join(f", though {cause} was told of at step {when}" for (_, cause), when in self.told.items())
            if self.seen["volumes"] and "volumes" not in self.judged:
                text += "; of volumes too few steps were logged to judge them"
        elif not self.watched:
            verdict, text = "not judged", "the objective logs nothing that could be judged for collapse"
        else:
            verdict = "too short"
            text = (
                f"the run is too short to be judged for collapse: that takes {SHORTEST} steps, and {FEWEST['step']} "
                f"logged ones after step {self._grace:.0f}"
            )
        self.reports.append(Report(max(step, self.last_step), "verdict", text, cause=verdict))

    @property
    def _grace(self) -> float:
        share, steps = _GRACE
        return max(self.config.grace * self.num_steps, min(share * self.num_steps, steps))

    @property
    def _sustained(self) -> float:
        share, steps = _SUSTAINED
        return max(self.config.sustained * self.num_steps, min(share * self.num_steps, steps))

    @property
    def _longest(self) -> float:
        return max(self._sustained, self.teacher_patience)

    def _observe(self, source: str, step: int, numbers: Mapping[str, float]) -> None:
        self._take_in(source, step, numbers)
        if step > self._grace:
            self._judge(source)
        self._keep_the_healthy()

    def _take_in(self, source: str, step: int, numbers: Mapping[str, float]) -> None:
        """All that an observation changes but for what is found by judging it."""
        numbers = {name: numbers[name] for name in WATCHED if name in numbers}
        self.watched |= bool(numbers.keys() - {"loss"})
        doubtful = bool(signs(numbers, self.config))
        if step > self._grace:
            self.seen[source].append(_Seen(step, numbers, doubtful), self._longest)
            if self._is_judged(source) and numbers.keys() - {"loss"}:
                self.judged.add(source)
        if source != "evaluation" and not doubtful and not self._doubted:
            self.healthy_step = step

    def _is_judged(self, source: str) -> bool:
        seen = self.seen[source]
        began = self._grace + self._sustained
        return self.num_steps >= SHORTEST and len(seen) >= FEWEST[source] and seen.newest.step >= began

    def _judge(self, source: str) -> None:
        """Takes the medians over the window, and tells of a sign that is new."""
        if not self._is_judged(source):
            return
        seen, step = self.seen[source], self.seen[source].newest.step
        recent = seen.since(step - self._sustained)
        found = {sign.cause: sign for sign in signs(_typical(recent), self.config)}
        newest = recent[-max(len(recent) // 3, FEWEST[source]) :]
        still = {_FAMILY.get(sign.cause, sign.cause) for sign in signs(_typical(newest), self.config)}
        found = {cause: sign for cause, sign in found.items() if _FAMILY.get(cause, cause) in still}
        if "lost_teacher" in found and self.teacher_patience > self._sustained:
            lagging = signs(_typical(seen.all()), self.config)
            if step - seen.reaches_to < self.teacher_patience or "lost_teacher" not in {sign.cause for sign in lagging}:
                del found["lost_teacher"]
        if source == "volumes":
            found = {cause: replace(sign, found=_ON_VOLUMES + sign.found) for cause, sign in found.items()}
        self.standing[source] = found
        for cause, sign in found.items():
            what = (source == "volumes", cause)
            # A run that is to stop must not go on because its stop was told to an earlier start.
            if what not in (self.raised if self.config.stop else self.told):
                self.raised.add(what)
                self.told.setdefault(what, step)
                since = next((each.step for each in recent if each.doubtful), step)
                self.reports.append(self._warning(step, sign, recent[-1].numbers, since))

    @property
    def _doubted(self) -> bool:
        return any(seen.num_doubtful for seen in self.seen.values())

    def _keep_the_healthy(self) -> None:
        if not self._doubted:
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


@dataclass(frozen=True)
class _Seen:
    """A logged step, or an evaluation."""

    step: int
    numbers: Mapping[str, float]
    doubtful: bool  # whether it shows a sign by itself


class _Window:
    """The observations of one source that can still decide something. Costs the same at any length."""

    def __init__(self, fewest: int):
        self.fewest = fewest
        self.num_doubtful = 0
        self._seen: list[_Seen] = []
        self._first = 0  # those before it are past, and dropped when they are the most
        self.reaches_to = 0  # the oldest step before the newest observation

    def __len__(self) -> int:
        return len(self._seen) - self._first

    @property
    def newest(self) -> _Seen:
        return self._seen[-1]

    def append(self, one: _Seen, longest: float) -> None:
        """longest: steps that the window goes back, and one observation further."""
        self._seen.append(one)
        self.num_doubtful += one.doubtful
        self.reaches_to = self._seen[self._first].step
        while len(self) > self.fewest and self._seen[self._first + 1].step <= one.step - longest:
            self.num_doubtful -= self._seen[self._first].doubtful
            self._first += 1
        if self._first > len(self):
            del self._seen[: self._first]
            self._first = 0

    def all(self) -> list[_Seen]:
        return self._seen[self._first :]

    def since(self, step: float) -> list[_Seen]:
        """After this step, or else the fewest."""
        begin = bisect_right(self._seen, step, lo=self._first, key=lambda each: each.step)
        return self._seen[min(begin, len(self._seen) - self.fewest) :]


class _Nobody:
    def hold(self, step: int) -> None:
        return None

    def release(self) -> None: ...


def _typical(seen: list[_Seen]) -> dict[str, float]:
    """Of each number the median over the observations that have it; of the loss the mean, as batches differ in luck.
    Of very many, over some."""
    if len(seen) > _MOST:
        seen = [seen[place * (len(seen) - 1) // (_MOST - 1)] for place in range(_MOST)]
    found = {}
    for name in dict.fromkeys(name for each in seen for name in each.numbers):
        of = mean if name in ("loss", TRIVIAL_LOSS) else median
        found[name] = of(each.numbers[name] for each in seen if name in each.numbers)
    return found


def _of_step(numbers: Mapping[str, float]) -> tuple[str, Mapping[str, float]]:
    """(source, numbers by their plain names) of a logged step."""
    if any(OF_VOLUMES + name in numbers for name in WATCHED):
        return "volumes", {name.removeprefix(OF_VOLUMES): value for name, value in numbers.items()}
    return "step", numbers
