"""Fine-tuning from its task to its result: the parts are built, handed to each other, and told on the console."""

import functools
import sys
import time

from prelude.checkpoints.store import Store
from prelude.data.loader import Loader
from prelude.data.waiting import stop_when
from prelude.evaluators.finetuning import finetune
from prelude.evaluators.results import print_table, write
from prelude.launch.planning import Asked, plan, tell_measured
from prelude.launch.run_folder import run_folder
from prelude.launch.training import introduce, loader_settings, logs_of, tell_weights
from prelude.pretrain import distributed
from prelude.pretrain.config import Config
from prelude.pretrain.devices import peak_flops
from prelude.pretrain.engine import Engine
from prelude.pretrain.objective import Objective
from prelude.pretrain.stopping import PREEMPTED


def run(task: finetune.Task, command: str) -> int:
    started, config = time.monotonic(), task.config
    device = distributed.start(config.train.rank_timeout_seconds)
    with run_folder(config) as folder:
        loaded: list[str] = []
        classifier = finetune.build(task, loaded.append)
        loader = _loader_of(task, classifier, config)
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
        monitors = [
            *folder.monitors,
            *logs_of(config, loader.num_workers),
            *([curve] if curve.every_epochs else []),
        ]
        store = Store(folder.path / "checkpoints", keep=config.checkpoint.keep)
        engine = Engine(config, classifier, loader, store, monitors, peak_flops)
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


def dry_run(task: finetune.Task, asked: Asked) -> int:
    config, loaded = task.config, []
    classifier = finetune.build(task, loaded.append)
    planned = plan(config, classifier, task.train.num_samples, asked)
    planned.add_row("weights", *loaded)
    planned.add_row("labels", f"{task.train.num_samples} images of {len(task.classes)} classes")
    planned.add_row("test", f"{task.test.num_samples} images")
    planned.print()
    if asked.measure:
        tell_measured(config, classifier, lambda config: _loader_of(task, classifier, config), planned)
    return 0


def _loader_of(task: finetune.Task, classifier: Objective, config: Config) -> Loader:
    return Loader(task.train, classifier.views, label=config.evaluate.label, **loader_settings(config))
