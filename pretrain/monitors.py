"""What watches a run: the console, metrics.jsonl and TensorBoard.

Monitors live on rank 0 and are handed to the engine; none of them can change what is computed: they are handed
records, pictures and copies of weights. What one of them finds out is passed on to all.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from torch import Tensor

from prelude.pretrain.schedules import Progress

_LEGIBLE_WIDTH = 480  # pixels
_SCALARS = ("loss", "lr", "weight_decay", "grad_norm", "images_per_second", "data_wait", "epoch", "bad_samples")


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


@dataclass(frozen=True)
class Report:
    """What a monitor found out beside the logged steps: how good the encoder is, or that something is wrong."""

    step: int
    kind: Literal["evaluation", "collapse", "notice", "verdict"]  # verdict: on collapse, at the run's end
    text: str  # for a person
    numbers: dict[str, float] = field(default_factory=dict)
    cause: str = ""  # of a collapse; of a verdict, what it is
    stop: bool = False  # whether the run should end, with this text


class Monitor:
    """Each hook may be left out."""

    def start(self, progress: Progress) -> None: ...

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
        """Called once when the run has come to its end: the last chance to wait for something."""

    def record(self, record: StepRecord) -> None: ...

    def pictures(self, step: int, pictures: dict[str, Image.Image]) -> None: ...

    def saved(self, step: int, path: Path) -> None: ...

    def close(self) -> None: ...


class ConsoleMonitor(Monitor):
    """A progress bar on a terminal; elsewhere a line for every twentieth of the run."""

    def __init__(self):
        self.console = Console(file=sys.stderr)
        self.bar = None
        self.judged = ""

    def start(self, progress: Progress) -> None:
        if progress.step:
            self.console.print(f"resumed at step {progress.step} of {progress.num_steps}", highlight=False)
        self.last_printed = progress.step
        if self.console.is_terminal:
            columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}")]
            self.bar = Bar(*columns, console=self.console)
            self.task = self.bar.add_task("starting", total=progress.num_steps, completed=progress.step)
            self.bar.start()

    def record(self, record: StepRecord) -> None:
        text = (
            f"epoch {record.epoch:.2f}  loss {record.loss:.4f}  lr {record.lr:.2e}  "
            f"{record.images_per_second:.0f} images/s  data wait {record.data_wait:.0%}  "
            f"ETA {_time(record.eta_seconds)}"
        )
        if record.skipped_steps:
            text += f"  skipped {record.skipped_steps}"
        if record.bad_samples:
            text += f"  bad samples {record.bad_samples}"
        text += self.judged
        last = record.step == record.num_steps
        if self.bar:
            self.bar.update(self.task, completed=record.step, description=text)
        elif last or record.step - self.last_printed >= record.num_steps / 20:
            self.last_printed = record.step
            self.console.print(f"step {record.step}/{record.num_steps}  {text}", highlight=False, soft_wrap=True)

    def report(self, report: Report) -> None:
        if report.kind == "evaluation":
            self.judged = f"  k-NN {report.numbers['knn']:.1f} %  linear {report.numbers['linear']:.1f} %"
        label = {"collapse": "[bold red]warning[/] ", "notice": "[yellow]note[/] "}.get(report.kind, "")
        self.console.print(f"step {report.step}  {label}{escape(report.text)}", highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


class JsonlMonitor(Monitor):
    """metrics.jsonl: one line a logged step. A resumed run drops the lines after its checkpoint first."""

    def __init__(self, path: Path):
        self.path = path

    def start(self, progress: Progress) -> None:
        _drop_lines_after(progress.step, self.path)
        self.file = open(self.path, "a", buffering=1)

    def record(self, record: StepRecord) -> None:
        self.file.write(json.dumps(asdict(record)) + "\n")

    def close(self) -> None:
        self.file.close()


class ReportsMonitor(Monitor):
    """online.jsonl: one line a report, in a file that is there once there is one; resumed like metrics.jsonl."""

    def __init__(self, path: Path):
        self.path = path

    def start(self, progress: Progress) -> None:
        if self.path.exists():
            _drop_lines_after(progress.step, self.path)

    def report(self, report: Report) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(asdict(report)) + "\n")


class TensorBoardMonitor(Monitor):
    """Scalars and pictures; pictures are kept as PNG files too, for who has no TensorBoard at hand."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir

    def start(self, progress: Progress) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(self.run_dir / "tensorboard", purge_step=progress.step + 1)

    def record(self, record: StepRecord) -> None:
        values = asdict(record)
        for name, value in values.pop("parts").items():
            self.writer.add_scalar(f"parts/{name}", value, record.step)
        for name in _SCALARS:
            self.writer.add_scalar(f"train/{name}", values[name], record.step)

    def report(self, report: Report) -> None:
        if report.kind == "evaluation":
            for name, value in report.numbers.items():
                self.writer.add_scalar(f"online/{name}", value, report.step)
        else:
            self.writer.add_text(report.kind, report.text, report.step)

    def pictures(self, step: int, pictures: dict[str, Image.Image]) -> None:
        folder = self.run_dir / "pictures"
        for name, picture in pictures.items():
            picture = _legible(picture)
            folder.mkdir(exist_ok=True)
            picture.save(folder / f"{name}-{step:08d}.png")
            self.writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


def _legible(picture: Image.Image) -> Image.Image:
    """Small pictures enlarged by a whole factor, so that a person sees the pixels of a 32-pixel image."""
    factor = max(_LEGIBLE_WIDTH // picture.width, 1)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _drop_lines_after(step: int, path: Path) -> None:
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if _step_of(line) is not None and _step_of(line) <= step]
    path.write_text("".join(line + "\n" for line in kept))


def _step_of(line: str) -> int | None:
    """The step of a metrics line; None for a line cut short by a crash."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return None


def _time(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
