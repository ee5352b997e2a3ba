"""A run from its config to its end: the parts are built, handed to each other, and told on the console."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prelude.checkpoints.store import Store
from prelude.data.errors import UserError
from prelude.data.loader import build_loader
from prelude.data.order import Shuffle
from prelude.data.shards import expand_shards
from prelude.evaluators import online
from prelude.launch.exit_codes import PREEMPTED
from prelude.objectives import check_objective, objective_class
from prelude.objectives.building import build_objective
from prelude.pretrain import deepspeed_config, distributed, precision
from prelude.pretrain.collapse import CollapseWatch
from prelude.pretrain.config import Config
from prelude.pretrain.engine import Engine
from prelude.pretrain.environment import describe_environment
from prelude.pretrain.monitors import ConsoleMonitor, JsonlMonitor, Monitor, ReportsMonitor, TensorBoardMonitor
from prelude.pretrain.preview import describe


def check(config: Config) -> None:
    """Refuses, before anything is built, what cannot work here. Raises UserError."""
    check_objective(config)
    config.batching(distributed.launched_world_size())
    expand_shards(config.data.shards)  # a shard that this node lacks is told before any rank waits for another
    if config.evaluate and config.evaluate.every_steps:
        online.check(config.evaluate)
    deepspeed_config.passed_through(config)


def train(config: Config) -> int:
    """The exit code of the run."""
    device = distributed.start()
    deepspeed_config.check(config)
    run_dir = prepare_run_dir(config)
    objective = build_objective(config)
    loader = loader_of(config, objective.views)
    store = Store(run_dir / "checkpoints", keep=config.checkpoint.keep)
    engine = Engine(config, objective, loader, store, monitors_of(config, run_dir, store))
    if distributed.is_main():
        introduce(config, engine, loader, device)
    outcome = engine.run()
    loader.close()
    distributed.stop()
    return 0 if outcome.reason == "finished" else PREEMPTED


def loader_of(config: Config, views):
    length = {"num_samples": config.data.num_samples, "max_bad_share": config.data.max_bad_share}
    return build_loader(config.data.shards, views, **loader_settings(config), **length)


def loader_settings(config: Config) -> dict[str, Any]:
    """What a loader is told of a run, whatever it reads."""
    workers = config.data.num_workers
    micro_batch, _ = config.batching(distributed.world_size())
    return {
        "seed": config.seed,
        "micro_batch": micro_batch,
        "rank": distributed.rank(),
        "world_size": distributed.world_size(),
        "num_workers": distributed.default_num_workers() if workers == "auto" else workers,
        "shuffle": Shuffle(**config.data.shuffle.model_dump()),
        "bad_samples_log": Path(config.run_dir) / "bad_samples.jsonl",
    }


def prepare_run_dir(config: Config) -> Path:
    run_dir = Path(config.run_dir)
    if distributed.is_main():
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "STOP").unlink(missing_ok=True)  # what stopped the last run must not stop this one
            (run_dir / "config.yaml").write_text(config.to_yaml())
            (run_dir / "environment.json").write_text(json.dumps(describe_environment(), indent=2))
        except OSError as error:
            raise UserError(f"run_dir={config.run_dir} cannot be written ({error.strerror}); choose another.") from None
        distributed.deepspeed_messages_to(run_dir / "deepspeed.log")
    distributed.barrier()
    return run_dir


def monitors_of(config: Config, run_dir: Path, store: Store) -> list[Monitor]:
    if not distributed.is_main():
        return []
    probes = [online.OnlineProbe(config)] if config.evaluate and config.evaluate.every_steps else []
    remedies = objective_class(config.objective["name"]).remedies
    watch = CollapseWatch(config.collapse, store, remedies)
    return [*probes, watch, ReportsMonitor(run_dir / "online.jsonl"), *logs_of(run_dir)]


def logs_of(run_dir: Path) -> list[Monitor]:
    if not distributed.is_main():
        return []
    return [ConsoleMonitor(), JsonlMonitor(run_dir / "metrics.jsonl"), TensorBoardMonitor(run_dir)]


def introduce(config: Config, engine: Engine, loader, device) -> None:
    """The values that were derived and not asked for."""
    print(
        f"{config.objective['name']} with {config.encoder.name} on {loader.num_samples} images, "
        f"{distributed.world_size()} x {device.type} in {precision.resolve(config, device)}: "
        f"{engine.progress.num_steps} steps of {config.train.global_batch} images "
        f"({engine.micro_batch} a rank x {engine.accumulation}), peak learning rate {config.peak_lr:.3g}, "
        f"{loader.num_workers} loader workers a rank; everything goes to {config.run_dir}",
        file=sys.stderr,
    )


def dry_run(config: Config) -> int:
    objective = build_objective(config)
    loader = loader_of(config, objective.views)
    table = Table(title=f"{config.objective['name']} with {config.encoder.name}", show_header=False)
    world_size = distributed.launched_world_size()
    for row in describe(config, objective, num_samples=loader.num_samples, world_size=world_size):
        table.add_row(*row)
    table.add_row("data", f"{loader.num_samples} samples in {loader.num_shards} shards")
    table.add_row("first samples", ", ".join(loader.preview(5)) or "whatever the stream brings")
    Console().print(table)
    return 0
