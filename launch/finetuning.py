"""Fine-tuning from its task to its result: the parts are built, handed to each other, and told on the console."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prelude.checkpoints.saved import open_tensors
from prelude.checkpoints.store import Store
from prelude.data.counting import counted
from prelude.data.errors import UserError, another_folder
from prelude.data.loader import Loader
from prelude.data.signed_urls import shown_in
from prelude.data.waiting import moves, stop_when
from prelude.evaluators.comparing.label_table import print_labels
from prelude.evaluators.finetuning import finetune
from prelude.evaluators.finetuning.classifier import Classifier
from prelude.evaluators.finetuning.early_stopping import HeldOutCurve
from prelude.evaluators.finetuning.samples import Part
from prelude.evaluators.finetuning.testing import TestCurve, Testing
from prelude.evaluators.results import print_table, write
from prelude.launch.outlook import print_with_outlook
from prelude.launch.planning import Asked, plan, tell_measured
from prelude.launch.run_folder import run_folder
from prelude.launch.training import introduce, loader_settings, logs_of, tell_weights
from prelude.pretrain import attendance, deepspeed_config, distributed
from prelude.pretrain.config import Config
from prelude.pretrain.devices import peak_flops
from prelude.pretrain.engine import Engine
from prelude.pretrain.files import Lines
from prelude.pretrain.monitors import Monitor
from prelude.pretrain.objective import Objective
from prelude.pretrain.resume import OtherSettings, is_own
from prelude.pretrain.stopping import PREEMPTED


def join(config: Config) -> None:
    """Joins the other ranks, if there are any, before shards are indexed: a meeting has a limit, and indexing none."""
    if distributed.launched_world_size() > 1:
        distributed.start(config.train.rank_timeout_seconds)
        attendance.goes_by(moves)
        attendance.reach("indexing shards")


def run(task: finetune.Task, command: str) -> int:
    started, config = time.monotonic(), task.config
    device = distributed.start(config.train.rank_timeout_seconds)
    distributed.gather()  # one may have had its shards to index
    deepspeed_config.check(config)
    with run_folder(config) as folder:
        store = Store(folder.path / "checkpoints", keep=config.checkpoint.keep)
        loaded: list[str] = []
        classifier = finetune.build(task, loaded.append)
        attendance.goes_by(moves)
        attendance.reach("indexing shards")
        loader = _loader_of(task, classifier, config)
        test = _testing(task, classifier, task.samples.test, loader.num_workers)
        curves = _curves(task, classifier, test, folder.path)
        monitors = [*folder.monitors, *curves, *logs_of(config, loader.num_workers)]
        engine = Engine(config, classifier, loader, store, monitors, peak_flops)
        if classifier.held_out is not None:  # now that the engine has copied the objective, to see what a step costs
            classifier.held_out.test = _testing(task, classifier, task.samples.held_out, loader.num_workers)
        stop_when(engine.stop_wanted)
        folder.note(precision=str(engine.precision), source=shown_in(task.source))
        introduce(config, engine, loader, device)
        tell_weights(loaded[0])
        with told_by_source(task):
            outcome = engine.run()
        loader.close()
        if outcome.reason != "finished":
            distributed.stop()
            return PREEMPTED
        found = test(intervals=True)
        if distributed.is_main():
            seconds = time.monotonic() - started
            read = {name: Lines(folder.path / file).read() for name, file in _FILES.items()}
            result = finetune.result_of(task, classifier, found, read, command, seconds)
            print_table([result])  # first: a full disk is no reason not to tell
            if task.samples.findings:
                print_labels([result])
            print(f"written to {write(result, folder.path / 'evaluations')}", file=sys.stderr)
        distributed.stop()
        return 0


_FILES = {"curve": "test.jsonl", "held_out_curve": "validation.jsonl"}


def dry_run(task: finetune.Task, asked: Asked) -> int:
    """Raises UserError, once all is told, where a start would be refused for what is in its run folder."""
    config, loaded, samples = task.config, [], task.samples
    classifier = finetune.build(task, loaded.append)
    planned = plan(config, classifier, samples.train.num_samples, asked)
    planned.add_row("weights", *loaded)
    what = counted(len(samples.classes), "finding" if samples.findings else "class")
    planned.add_row("labels", f"{counted(samples.train.num_samples, 'image')} of {what}")
    if samples.held_out:
        planned.add_row("held out", counted(samples.held_out.index.num_samples, "image"))
    planned.add_row("test", counted(samples.test.index.num_samples, "image"))
    loader = _loader_of(task, classifier, config, asked.world_size)
    with told_by_source(task):
        print_with_outlook(
            planned, config, loader, type(classifier.options), lambda checkpoint: _ended_early(classifier, checkpoint)
        )
    if asked.measure:
        classifier.held_out = None  # steps are measured, and no validation after them
        tell_measured(config, classifier, lambda config: _loader_of(task, classifier, config), planned)
    return 0


@contextmanager
def told_by_source(task: finetune.Task) -> Iterator[None]:
    """A folder that fine-tunes another encoder is refused by the names of the two, and not by their fingerprints. The
    folder is named after the recipe, so that a second run that is tuned by it comes to that of the first."""
    try:
        yield
    except OtherSettings as error:
        other = any(change.startswith("objective.weights: ") for change in error.changes)
        if not other or not is_own(error.checkpoint, task.config):
            raise
        run, source = task.config.run_dir, task.source
        held = recorded_source(Path(run)) or "another encoder"
        of_then = f"{source} with weights that it has no more" if held == shown_in(source) else held
        write = "run_dir=..." if another_folder() == "another run_dir" else another_folder()
        raise UserError(f"{run} holds the fine-tuning of {of_then}; write {write} for that of {source}.") from None


def recorded_source(run: Path) -> str | None:
    """What a fine-tuning run began from, as its user named it; None where neither it nor a result of it says so."""
    results = sorted((run / "evaluations").glob("fine_tune-*.json"), key=lambda path: path.stat().st_mtime)
    for path in (run / "environment.json", *reversed(results)):
        with suppress(OSError, ValueError, KeyError, TypeError):
            return json.loads(path.read_text())["source"]
    return None


def _ended_early(classifier: Classifier, checkpoint: Path) -> bool:
    """Whether the held-out images have ended the run that has left it."""
    held_out = classifier.held_out
    if held_out is None or held_out.patience is None:
        return False
    in_a_row = open_tensors(checkpoint).get("held_out.in_a_row")  # None: of a run that held nothing out
    return in_a_row is not None and in_a_row.item() >= held_out.patience


def _loader_of(task: finetune.Task, classifier: Objective, config: Config, world_size: int | None = None) -> Loader:
    """world_size: where it is not that of the ranks that are here."""
    samples = task.samples
    labels = {"label": samples.label, "findings": samples.findings}
    return Loader(samples.train, classifier.views, **labels, **loader_settings(config, world_size))


def _testing(task: finetune.Task, classifier: Classifier, part: Part, num_workers: int) -> Testing:
    micro_batch, _ = task.config.batching(distributed.world_size())
    labels = task.samples.label, task.samples.findings
    return Testing(classifier, part, *labels, max(micro_batch, 64), num_workers, task.config.seed)


def _curves(task: finetune.Task, classifier: Classifier, test: Testing, run_dir: Path) -> list[Monitor]:
    every = task.options.test_every_epochs
    curves = [TestCurve(test, every, run_dir / _FILES["curve"])] if every else []
    if classifier.held_out is not None and distributed.is_main():
        curves.append(HeldOutCurve(classifier.held_out, run_dir / _FILES["held_out_curve"]))
    return curves
