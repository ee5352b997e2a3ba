"""Train an encoder on unlabelled shards.

    deepspeed --num_gpus 8 launch/pretrain.py --config configs/mae_vit_base.yaml 'data.shards=/data/{000..099}.tar'

The same command, run again, goes on from the run's newest checkpoint, at any number of ranks. Exit codes:
0 finished, 2 a mistake in the command or config, 3 stopped itself, 75 pre-empted (run it again).
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prelude.checkpoints.starting import starting_point
from prelude.checkpoints.store import Store
from prelude.data.errors import UserError
from prelude.data.loader import build_loader
from prelude.data.order import Shuffle
from prelude.data.shards import expand_shards
from prelude.evaluators.online import OnlineProbe
from prelude.launch.arguments import documented_parser
from prelude.launch.exit_codes import PREEMPTED, door, leave
from prelude.objectives import build_objective, check_objective, objective_class, options_for
from prelude.pretrain import distributed, precision
from prelude.pretrain.collapse import CollapseWatch
from prelude.pretrain.config import Config, load_config
from prelude.pretrain.engine import Engine
from prelude.pretrain.environment import describe_environment
from prelude.pretrain.monitors import ConsoleMonitor, JsonlMonitor, Monitor, ReportsMonitor, TensorBoardMonitor
from prelude.pretrain.preview import describe


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    config = load_config(args.config, args.overrides, options_for)
    check_objective(config)
    config.batching(distributed.launched_world_size())
    expand_shards(config.data.shards)  # a shard that this node lacks is told before any rank waits for another
    if config.evaluate and config.evaluate.every_steps:
        expand_shards(config.evaluate.train_shards)
        expand_shards(config.evaluate.test_shards)
    if args.dry_run:
        return dry_run(config)

    device = distributed.start()
    store = Store(Path(config.run_dir) / "checkpoints", keep=config.checkpoint.keep)
    start = starting_point(config, store)
    config = start.config
    run_dir = prepare_run_dir(config)
    objective = build_objective(config, start.warm)
    loader = loader_of(config, objective.views)
    engine = Engine(config, objective, loader, store, monitors_of(config, run_dir, store))
    if distributed.is_main():
        introduce(config, engine, loader, device)
        if start.sentence:
            print(start.sentence, file=sys.stderr)
    outcome = engine.run()
    loader.close()
    distributed.stop()
    return 0 if outcome.reason == "finished" else PREEMPTED


def parser() -> argparse.ArgumentParser:
    parser = documented_parser(__doc__)
    parser.add_argument("--config", required=True, help="a YAML file, or the name of a recipe in configs/")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher adds it; the environment says more
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the config's")
    return parser


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
    online = [OnlineProbe(config)] if config.evaluate and config.evaluate.every_steps else []
    remedies = objective_class(config.objective["name"]).remedies
    watch = CollapseWatch(config.collapse, store, remedies)
    return [*online, watch, ReportsMonitor(run_dir / "online.jsonl"), *logs_of(run_dir)]


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
    start = starting_point(config)
    objective = build_objective(config, start.warm)
    loader = loader_of(config, objective.views)
    table = Table(title=f"{config.objective['name']} with {config.encoder.name}", show_header=False)
    world_size = distributed.launched_world_size()
    for row in describe(config, objective, num_samples=loader.num_samples, world_size=world_size):
        table.add_row(*row)
    if start.sentence:
        table.add_row("weights", start.sentence)
    table.add_row("data", f"{loader.num_samples} samples in {loader.num_shards} shards")
    table.add_row("first samples", ", ".join(loader.preview(5)) or "whatever the stream brings")
    Console().print(table)
    return 0


if __name__ == "__main__":
    leave(door(main))
