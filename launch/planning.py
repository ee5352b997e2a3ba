"""What doors that train say under `--dry-run`: the plan of a run at a number of ranks, and how long it would take.

Only the first rank speaks. The others end at once, unless steps are measured, in which they take part.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from prelude.data.counting import counted
from prelude.data.errors import Stopped
from prelude.launch.plain_tables import columns, pairs, paragraph
from prelude.pretrain import compiling, deepspeed_config, devices, distributed, optimizers, precision
from prelude.pretrain.config import Config, LogConfig, ResumeConfig
from prelude.pretrain.engine import Engine
from prelude.pretrain.fitting import misfit
from prelude.pretrain.monitors import Monitor, StepRecord
from prelude.pretrain.objective import Objective
from prelude.pretrain.preview import Preview, duration, preview
from prelude.pretrain.schedules import beginning

_STEPS, _LOGGED_EVERY = 9, 3  # of a measurement; what comes before the first log line warms up
_IMAGES_ON_CPU = 16  # of a micro-batch that is measured: there time grows with the images


@dataclass(frozen=True)
class Asked:
    """Of a dry run, on the command line."""

    world_size: int
    device: str | None
    measure: bool


def dry_run(args: argparse.Namespace, config: Config, door: Callable[[Config, Asked], int]) -> int:
    """Asks the door for its dry run, on ranks that have a part in it."""
    asked = Asked(args.ranks or distributed.launched_world_size(), args.device, args.measure)
    return door(config, asked) if args.measure or distributed.launched_rank() == 0 else 0


@dataclass
class Planned:
    """A table that is printed once it is whole, and what it was made of."""

    preview: Preview
    figures: devices.Figures
    rows: list[tuple[str, str]] = field(default_factory=list)

    def add_row(self, what: str, how_much: str) -> None:
        self.rows.append((what, how_much))

    def print(self) -> None:
        if distributed.launched_rank() == 0:
            config = self.preview.config
            print(pairs(f"{config.objective['name']} with {config.encoder.name}", self.rows))
            print(f"\n{_alternatives(self.preview, self.figures)}")
            if sentence := misfit(self.preview, self.figures):
                print(f"\n{paragraph(sentence)}")


def plan(config: Config, objective: Objective, num_samples: int, asked: Asked) -> Planned:
    """Raises UserError for a device that is not known, a run that would never train its encoder, and what DeepSpeed
    would refuse."""
    start = beginning(config, num_samples)
    optimizers.refuse_never_moving(config, start.num_steps)
    optimizers.refuse_no_rate(config, start)
    with distributed.nothing_printed():
        deepspeed_config.check(config)
    if asked.device:
        chosen = config.train.precision
        chosen = devices.precision_of(asked.device) if chosen == "auto" else chosen
        figures, said = devices.named(asked.device, chosen), f"{chosen}, on {asked.device}"
    else:
        device = distributed.device()
        resolved, _ = precision.resolve(config, device, {})
        chosen, said = resolved.name, f"{resolved}, on {device.type}"
        figures = devices.here(device, chosen)
    found = preview(config, objective, num_samples=num_samples, world_size=asked.world_size, precision=chosen)
    planned = Planned(found, figures, [*found.rows(), ("precision", said)])
    if config.train.compile:
        planned.add_row("train.compile", compiling.advice(distributed.device()))
    if figures.peak:
        planned.add_row("time", found.expected_time(figures))
    return planned


def _alternatives(found: Preview, figures: devices.Figures) -> str:
    title = (
        f"memory a rank, of {figures.memory / 2**30:.1f} GiB usable by {figures.source}; the largest micro-batch is "
        "the one that makes the global batch in whole steps of accumulation, with that of any size in brackets"
    )
    titles = ("ZeRO", "checkpointing", "weights", "optimizer", "activations", "peak", "largest\nmicro-batch")
    return columns(title, titles, found.alternatives(figures))


def tell_measured(
    config: Config, objective: Objective, loader_of: Callable[[Config], object], planned: Planned
) -> None:
    """Joins the other ranks, takes a few steps from the run's own data into nowhere, and tells the time of a run.

    loader_of: what reads as a given config says. Collective.
    """
    device = distributed.start(config.train.rank_timeout_seconds)
    (micro_batch, accumulation), world = planned.preview.batching, distributed.world_size()
    at_once = min(micro_batch, _IMAGES_ON_CPU) if device.type == "cpu" else micro_batch
    with _passing_folder() as folder:
        short = _short(config, at_once, world, planned.preview.num_samples, folder)
        records = _records_of(short, objective, loader_of)
    if distributed.is_main():
        seconds = median(record.step_seconds for record in records[1:]) * accumulation * micro_batch / at_once
        wait = median(record.data_wait for record in records[1:])
        steps = planned.preview.num_samples / config.train.global_batch
        planned_for = planned.preview.world_size
        ranks = counted(world, "rank") if world == planned_for else f"{world} of {counted(planned_for, 'rank')}"
        scaled = f", from {counted(at_once, 'image')} at once" if at_once < micro_batch else ""
        rows = [
            ("a step", f"{duration(seconds)}, measured with {ranks} on {device.type}{scaled}"),
            ("of it", f"{wait:.0%} waiting for data"),
            ("an epoch", duration(seconds * steps)),
            ("the run", f"{duration(seconds * steps * config.train.epochs)} without saving and evaluation"),
            ("not measured", "more ranks than these, what they say to each other, and any other device"),
        ]
        print(f"\n{pairs('', rows)}", flush=True)
    distributed.stop()


@contextmanager
def _passing_folder() -> Iterator[str]:
    """For what a run writes beside its store, of one name on all ranks: they compare their configs."""
    folder = distributed.from_main(tempfile.mkdtemp() if distributed.is_main() else None)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _records_of(config: Config, objective: Objective, loader_of) -> list[StepRecord]:
    loader, kept = loader_of(config), Kept()
    outcome = Engine(config, objective, loader, Nowhere(), [kept]).run()
    loader.close()
    if outcome.reason == "preempted":
        raise Stopped("while steps were measured")
    return kept.records


def _short(config: Config, micro_batch: int, world_size: int, num_samples: int, run_dir: str) -> Config:
    """A few steps of it, beginning anew and kept nowhere."""
    batch = micro_batch * world_size
    train = {"global_batch": batch, "micro_batch": micro_batch, "epochs": (_STEPS - 0.5) * batch / num_samples}
    changes = {
        "run_dir": run_dir,
        "train": config.train.model_copy(update=train | {"profile_steps": 0, "freeze_encoder_steps": 0}),
        "log": LogConfig(every_steps=_LOGGED_EVERY, pictures_every_steps=0),
        "resume": ResumeConfig(),
    }
    return config.model_copy(update=changes)


class Kept(Monitor):
    def __init__(self):
        self.records: list[StepRecord] = []

    def record(self, record: StepRecord) -> None:
        self.records.append(record)


class Nowhere:
    """A store that keeps nothing."""

    def newest_for_all(self) -> None: ...

    def newest(self) -> None: ...

    def save(self, step, engine, meta) -> None: ...

    def has_ended(self) -> bool:
        return False

    def finish(self) -> None: ...

    def wait(self) -> None: ...
