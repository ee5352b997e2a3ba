"""Fine-tune an encoder on labelled shards, and test it.

    prelude finetune runs/mae --config finetune_vit_cifar10 --train 'train-*.tar' --test 'test-*.tar'
    deepspeed --num_gpus 8 launch/finetune.py runs/mae --config configs/finetune_vit_base.yaml run_dir=runs/tuned
    deepspeed --num_gpus 8 launch/finetune.py runs/mae --config configs/finetune_vit_base.yaml --from-scratch

The same command, run again, goes on from the run's newest checkpoint. Exit codes as those of pretraining.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse
import functools
import shlex
import sys
import time

from rich.console import Console
from rich.table import Table

from prelude.checkpoints.sources import SOURCES
from prelude.checkpoints.store import Store
from prelude.data.loader import Loader
from prelude.evaluators import finetune
from prelude.evaluators.results import print_table, write
from prelude.launch.arguments import documented_parser
from prelude.launch.exit_codes import PREEMPTED, door, leave
from prelude.launch.pretrain import introduce, loader_settings, logs_of, prepare_run_dir
from prelude.pretrain import distributed
from prelude.pretrain.engine import Engine
from prelude.pretrain.preview import describe


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_intermixed_args(argv)
    task = finetune.prepare(
        args.source,
        args.config,
        args.overrides,
        train=args.train,
        test=args.test,
        label=args.label,
        from_scratch=args.from_scratch,
    )
    finetune.check(task, distributed.launched_world_size())
    if args.dry_run:
        return dry_run(task)
    command = shlex.join(["prelude", "finetune", *(sys.argv[1:] if argv is None else argv)])
    return run(task, command)


def run(task: finetune.Task, command: str) -> int:
    started, config = time.monotonic(), task.config
    device = distributed.start()
    run_dir = prepare_run_dir(config)
    loaded: list[str] = []
    classifier = finetune.build(task, loaded.append)
    loader = Loader(task.train, classifier.views, label=config.evaluate.label, **loader_settings(config))
    micro_batch, _ = config.batching(distributed.world_size())
    test = functools.partial(
        finetune.tested,
        classifier,
        task.test,
        config.evaluate.label,
        batch_size=max(micro_batch, 64),
        num_workers=loader.num_workers,
    )
    monitors, curve = logs_of(run_dir), run_dir / "test.jsonl"
    if task.options.test_every_epochs:
        monitors.append(finetune.TestCurve(test, task.options.test_every_epochs, curve))
    engine = Engine(config, classifier, loader, Store(run_dir / "checkpoints", keep=config.checkpoint.keep), monitors)
    if distributed.is_main():
        introduce(config, engine, loader, device)
        print(*loaded, sep="\n", file=sys.stderr)
    outcome = engine.run()
    loader.close()
    if outcome.reason != "finished":
        distributed.stop()
        return PREEMPTED
    counts = test()
    if distributed.is_main():
        seconds = time.monotonic() - started
        result = finetune.result_of(task, classifier, counts, finetune.read_curve(curve), command, seconds)
        path = write(result, run_dir / "evaluations")
        print_table([result])
        print(f"written to {path}", file=sys.stderr)
    distributed.stop()
    return 0


def parser() -> argparse.ArgumentParser:
    parser = documented_parser(__doc__)
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help=f"{SOURCES}, random:SOURCE",
    )
    parser.add_argument("--config", required=True, help="a YAML file, or the name of a recipe in configs/")
    parser.add_argument("--train", metavar="SHARDS", help="labelled shards to learn from (default: the recipe's or the "
                        "run's evaluate section)")  # fmt: skip
    parser.add_argument("--test", metavar="SHARDS", help="labelled shards to report on (default: the same)")
    parser.add_argument("--label", metavar="EXT", help="extension of the class number's member (default: cls)")
    parser.add_argument(
        "--from-scratch",
        action="store_true",
        help="the same recipe on the same architecture untrained, in RUN_DIR_from_scratch",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher adds it; the environment says more
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the config's")
    return parser


def dry_run(task: finetune.Task) -> int:
    config, loaded = task.config, []
    classifier = finetune.build(task, loaded.append)
    table = Table(title=f"fine-tuning of {task.opened.name}", show_header=False)
    world_size = distributed.launched_world_size()
    for row in describe(config, classifier, num_samples=task.train.num_samples, world_size=world_size):
        table.add_row(*row)
    table.add_row("weights", *loaded)
    table.add_row("labels", f"{task.train.num_samples} images of {len(task.classes)} classes")
    table.add_row("test", f"{task.test.num_samples} images")
    Console().print(table)
    return 0


if __name__ == "__main__":
    leave(door(main))
