"""Fine-tuning from its task to its result: the parts are built, handed to each other, and told on the console."""

import functools
import sys
import time

from rich.console import Console
from rich.table import Table

from prelude.checkpoints.store import Store
from prelude.data.loader import Loader
from prelude.data.waiting import stop_when
from prelude.evaluators.finetuning import finetune
from prelude.evaluators.results import print_table, write
from prelude.launch.run_folder import run_folder
from prelude.launch.training import introduce, loader_settings, logs_of, tell_weights
from prelude.pretrain import distributed
from prelude.pretrain.engine import Engine
from prelude.pretrain.preview import describe
from prelude.pretrain.stopping import PREEMPTED


def run(task: finetune.Task, command: str) -> int:
    started, config = time.monotonic(), task.config
    device = distributed.start(config.train.rank_timeout_seconds)
    with run_folder(config) as folder:
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
        curve = finetune.TestCurve(test, task.options.test_every_epochs, folder.path / "test.jsonl")
        monitors = [*folder.monitors, *logs_of(folder.path), *([curve] if curve.every_epochs else [])]
        store = Store(folder.path / "checkpoints", keep=config.checkpoint.keep)
        engine = Engine(config, classifier, loader, store, monitors)
        stop_when(engine.stop_wanted)
        folder.note(precision=str(engine.precision))
        introduce(config, engine, loader, device)
        tell_weights(loaded[0])
        outcome = engine.run()
        loader.close()
        if outcome.reason != "finished":
            distributed.stop()
            return PREEMPTED
        counts = test()
        if distributed.is_main():
            seconds = time.monotonic() - started
            result = finetune.result_of(task, classifier, counts, curve.lines.read(), command, seconds)
            print_table([result])  # first: a full disk is no reason not to tell
            print(f"written to {write(result, folder.path / 'evaluations')}", file=sys.stderr)
        distributed.stop()
        return 0


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
