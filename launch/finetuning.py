"""Fine-tuning from its task to its result: the parts are built, handed to each other, and told on the console."""

import functools
import sys
import time

from rich.console import Console
from rich.table import Table

from prelude.checkpoints.store import Store
from prelude.data.loader import Loader
from prelude.evaluators import finetune
from prelude.evaluators.results import print_table, write
from prelude.launch.exit_codes import PREEMPTED
from prelude.launch.training import introduce, loader_settings, logs_of, prepare_run_dir
from prelude.pretrain import distributed
from prelude.pretrain.engine import Engine
from prelude.pretrain.preview import describe


def run(task: finetune.Task, command: str) -> int:
    started, config = time.monotonic(), task.config
    device = distributed.start()
    run_dir = prepare_run_dir(config)
    classifier = finetune.build(task)
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


def dry_run(task: finetune.Task) -> int:
    config, classifier = task.config, finetune.build(task)
    table = Table(title=f"fine-tuning of {task.opened.name}", show_header=False)
    world_size = distributed.launched_world_size()
    for row in describe(config, classifier, num_samples=task.train.num_samples, world_size=world_size):
        table.add_row(*row)
    table.add_row("labels", f"{task.train.num_samples} images of {len(task.classes)} classes")
    table.add_row("test", f"{task.test.num_samples} images")
    Console().print(table)
    return 0
