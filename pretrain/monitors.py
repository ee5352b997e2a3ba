"""What watches a run: the console, metrics.jsonl, TensorBoard and experiment trackers.

Monitors live on rank 0 and are handed to the engine; none of them can change what is computed: they are handed
records, pictures and copies of weights. What one of them finds out is passed on to all. Nor can one end a run because
it cannot write: that is told once, and whether the run can go on is for the next checkpoint to say.
"""

import io
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from PIL import Image
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn
from rich.progress import Progress as Bar
from rich.text import Text
from torch import Tensor

from prelude.data.whole_files import write_whole
from prelude.pretrain.event_file import EventFile
from prelude.pretrain.files import Lines, Tolerant, make_folder
from prelude.pretrain.log_config import EVERY_STEP
from prelude.pretrain.schedules import Progress
from prelude.pretrain.trackers.tracker import Tracker

_LEGIBLE_WIDTH = 480  # pixels
_SCALARS = (
    "loss",
    "lr",
    "weight_decay",
    "grad_norm",
    "images_per_second",
    "step_seconds",
    "data_wait",
    "mfu",
    "peak_memory",
    "epoch",
    "bad_samples",
)


@dataclass(frozen=True)
class StepRecord:
    """One logged step. `loss` is the mean over ranks; speeds are since the last record."""

    step: int  # optimizer steps done
    num_steps: int
    epoch: float
    loss: float
    parts: dict[str, float]
    lr: float
    weight_decay: float
    grad_norm: float  # before clipping
    images_per_second: float  # over all ranks
    data_wait: float  # share of time that rank 0 waited for its loader, 0..1
    eta_seconds: float
    skipped_steps: int  # steps not applied because something was not finite, since the process started
    bad_samples: int  # unreadable samples replaced, over all ranks, since the process started
    peak_memory: int  # bytes that the rank with most has held, since the process started; see `peak_memory`
    step_seconds: float = 0.0  # on average since the last record
    mfu: float | None = None  # share of the devices' peak FLOP/s that the method itself needs, 0..1; None: not known


@dataclass(frozen=True)
class Report:
    """What a monitor found out beside the logged steps: how good the encoder is, or that something is wrong."""

    step: int
    kind: Literal["evaluation", "validation", "collapse", "notice", "verdict"]  # verdict: on collapse, at the end
    text: str  # for a person
    numbers: dict[str, float] = field(default_factory=dict)
    cause: str = ""  # of a collapse; of a verdict, what it is
    stop: bool = False  # whether the run should end, with this text


class Monitor:
    """Each hook may be left out."""

    def recount(self, step: int, batch: int, batch_now: int) -> None:
        """Called before any `start` of a run that has done `step` steps of `batch` samples, and goes on in steps of
        `batch_now`, which may be as many."""

    def start(self, progress: Progress) -> None:
        """Called once before the first step of a start, when a resume has been accepted."""

    def wants_encoder(self, progress: Progress) -> bool:
        """Asked at the start and after each step: whether `encoder` is to be called now."""
        return False

    def encoder(self, step: int, weights: dict[str, Tensor]) -> None:
        """weights: of the exported encoder by timm's names, copies on the CPU that belong to the monitor."""

    def found(self) -> list[Report]:
        """Asked after each step: what was found out since it was last asked."""
        return []

    def report(self, report: Report) -> None:
        """Told of what any monitor found out."""

    def finish(self) -> None:
        """Called once when the run has come to its end: the last chance to wait for something. What was found is passed
        on at once, before those behind it in the list are called."""

    def record(self, record: StepRecord) -> None:
        """Told of each logged step."""

    def pictures(self, step: int, pictures: dict[str, Image.Image]) -> None:
        """Handed what the objective shows after `step`, by name."""

    def saving(self, step: int) -> None:
        """Called before a checkpoint is written, which must not be on the disk before what belongs to it."""

    def close(self) -> None:
        """Called once, however the start ends."""


class _Console(Console):
    """rich ends the process where nobody reads its output any more."""

    def on_broken_pipe(self) -> None:
        raise  # the error that is being handled


class ConsoleMonitor(Monitor):
    """A progress bar on a terminal; elsewhere a line for every twentieth of the run, or for every logged step where
    who started it draws the bar."""

    def __init__(self):
        self.console = _Console(file=sys.stderr)
        self.tolerant = Tolerant("the console")
        self.live: Live | None = None
        self.judged = ""
        self.lines = math.inf if EVERY_STEP in os.environ else 20

    def start(self, progress: Progress) -> None:
        if progress.step == progress.num_steps:
            self._print(f"finished at step {progress.step} of {progress.num_steps} before; nothing is left to train")
        elif progress.step:
            self._print(f"resumed at step {progress.step} of {progress.num_steps}")
        self.last_printed = progress.step
        if self.console.is_terminal:
            self.bar = Bar(BarColumn(bar_width=None), MofNCompleteColumn(), console=self.console, expand=True)
            self.task = self.bar.add_task("", total=progress.num_steps, completed=progress.step)
            self.live = Live(self._drawn("starting"), console=self.console)
            self.live.start()

    def record(self, record: StepRecord) -> None:
        text = (
            f"epoch {record.epoch:.2f}  loss {record.loss:.4f}  lr {record.lr:.2e}  "
            f"{record.images_per_second:.0f} images/s  {_step_time(record.step_seconds)} a step  "
            f"data wait {record.data_wait:.0%}  "
        )
        if record.mfu is not None:
            text += f"MFU {record.mfu:.0%}  "
        text += f"memory {record.peak_memory / 2**30:.1f} GiB  ETA {_time(record.eta_seconds)}"
        if record.skipped_steps:
            text += f"  skipped {record.skipped_steps}"
        if record.bad_samples:
            text += f"  bad samples {record.bad_samples}"
        text += self.judged
        last = record.step == record.num_steps
        if self.live:
            self.bar.update(self.task, completed=record.step)
            self.live.update(self._drawn(text))
        elif last or record.step - self.last_printed >= record.num_steps / self.lines:
            self.last_printed = record.step
            self._print(f"step {record.step}/{record.num_steps}  {text}")

    def report(self, report: Report) -> None:
        if report.kind == "evaluation":
            self.judged = f"  k-NN {report.numbers['knn']:.1f} %  linear {report.numbers['linear']:.1f} %"
        label = {"collapse": "[bold red]warning[/] ", "notice": "[yellow]note[/] "}.get(report.kind, "")
        self._print(f"step {report.step}  {label}{escape(report.text)}")

    def close(self) -> None:
        with self.tolerant:
            if self.live:
                self.live.stop()

    def _print(self, text: str) -> None:
        with self.tolerant:
            self.console.print(text, highlight=False, soft_wrap=True, emoji=False)

    def _drawn(self, text: str) -> Group:
        """The numbers above the bar, over as many lines as they need: beside it a narrow terminal would cut them."""
        lines: list[str] = []
        for part in text.split("  "):
            fits = lines and len(f"{lines[-1]}  {part}") <= self.console.width
            lines[-1:] = [f"{lines[-1]}  {part}"] if fits else [*lines[-1:], part]
        return Group(Text("\n".join(lines)), self.bar)


class LinesMonitor(Monitor):
    """A file of lines, which is there once there is one. A resumed run drops the lines after its checkpoint first."""

    def __init__(self, path: Path):
        self.lines = Lines(path)

    def recount(self, step: int, batch: int, batch_now: int) -> None:
        self.lines.recount(step, batch, batch_now)

    def start(self, progress: Progress) -> None:
        self.lines.start(progress.step)

    def saving(self, step: int) -> None:
        self.lines.sync()

    def close(self) -> None:
        self.lines.sync()


class JsonlMonitor(LinesMonitor):
    """metrics.jsonl: one line a logged step."""

    def record(self, record: StepRecord) -> None:
        self.lines.add(asdict(record))


class ReportsMonitor(LinesMonitor):
    """online.jsonl: one line a report."""

    def report(self, report: Report) -> None:
        self.lines.add(asdict(report))


class CurvesMonitor(Monitor):
    """Scalars and pictures, to TensorBoard and to the trackers that the config names; pictures are kept as PNG files
    too, for who has none of these at hand."""

    def __init__(self, run_dir: Path, trackers: Sequence[Tracker] = ()):
        self.run_dir, self.trackers, self.finished = run_dir, trackers, False
        self.tolerant = Tolerant(run_dir / "pictures")

    def start(self, progress: Progress) -> None:
        for tracker in self.trackers:
            tracker.start()
        self.keepers = [EventFile(self.run_dir / "tensorboard", purge_step=progress.step + 1), *self.trackers]

    def record(self, record: StepRecord) -> None:
        values = asdict(record)
        scalars = {f"parts/{name}": value for name, value in values.pop("parts").items()}
        scalars |= {f"train/{name}": values[name] for name in _SCALARS if values[name] is not None}
        for keeper in self.keepers:
            keeper.add_scalars(record.step, scalars)

    def report(self, report: Report) -> None:
        tag = {"evaluation": "online", "validation": "held_out"}.get(report.kind)
        for keeper in self.keepers:
            if tag:
                keeper.add_scalars(report.step, {f"{tag}/{name}": value for name, value in report.numbers.items()})
            else:
                keeper.add_text(report.step, report.kind, report.text)

    def pictures(self, step: int, pictures: dict[str, Image.Image]) -> None:
        folder = self.run_dir / "pictures"
        for name, picture in pictures.items():
            picture, png = _legible(picture), io.BytesIO()
            picture.save(png, "PNG")
            with self.tolerant:
                make_folder(folder)
                write_whole(folder / f"{name}-{step:08d}.png", png.getvalue())
            for keeper in self.keepers:
                keeper.add_picture(step, name, picture)

    def saving(self, step: int) -> None:
        for keeper in self.keepers:
            keeper.sync()

    def finish(self) -> None:
        self.finished = True

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.end(self.finished)
        for keeper in self.keepers:
            keeper.close()


def _legible(picture: Image.Image) -> Image.Image:
    """Small pictures enlarged by a whole factor, so that a person sees the pixels of a 32-pixel image."""
    factor = max(_LEGIBLE_WIDTH // picture.width, 1)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _step_time(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def _time(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
