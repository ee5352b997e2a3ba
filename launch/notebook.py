"""Runs from Python: `prelude.pretrain(...)`, and what can be asked of the run that it returns.

- Everything is done by the doors, each in a process of its own: a notebook's kernel imports no torch and holds no
  device, and what a door keeps, writes and refuses is the same as from a command line.
- An interrupt (the stop button, Ctrl-C) asks the door to end: the step under way is finished and saved, then
  KeyboardInterrupt is raised. The same call goes on from there. So does a kernel that is gone.
- What a door refuses is a `RunError` with its sentence.
"""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prelude.data.errors import UserError
from prelude.launch.children import Preempted, run_door
from prelude.launch.progress_line import ProgressLine, is_live
from prelude.launch.python_settings import option_words, overrides_of
from prelude.objectives import options_for
from prelude.pretrain import recipe_yaml
from prelude.pretrain.log_config import EVERY_STEP
from prelude.pretrain.recipes import load_config


class RunError(Exception):
    """What was asked cannot be done. The message says what is wrong, where, and what to write instead."""

    def _render_traceback_(self) -> list[str]:  # IPython's hook: our own frames would say nothing to a reader
        return [f"{type(self).__name__}: {self}"]


class Interrupted(KeyboardInterrupt):
    """The door has ended in its own way; what it has done so far is kept."""

    _render_traceback_ = RunError._render_traceback_


def pretrain(recipe: str | Path, *, ranks: int = 1, **settings: Any) -> "Run":
    """Trains an encoder, or goes on with a run that is there, as `prelude pretrain --config RECIPE key=value ...` does.

    recipe: a YAML file, or the name of a shipped recipe. ranks: processes, one for each device. settings: keys of the
    config, in full (`**{"optimizer.lr": 1e-3}`), by their last part where only one section has it (`epochs=5`), or a
    section as a mapping (`optimizer={"lr": 1e-3}`). Returns when the run has ended. Raises RunError, and
    KeyboardInterrupt once the run that was interrupted is saved.
    """
    try:
        overrides = overrides_of(recipe, settings)
        config = load_config(recipe, overrides, options_for)
    except UserError as error:
        raise RunError(str(error)) from None
    _ask("pretrain", ["--config", str(recipe), *overrides], ranks)
    return Run(Path(config.run_dir))


def open_run(folder: str | Path) -> "Run":
    """A run that is there, finished or not. Raises RunError where the folder holds none."""
    folder = Path(folder).expanduser()
    if not (folder / "config.yaml").is_file() and not (folder / "checkpoints").is_dir():
        raise RunError(f"{folder} holds no run; write the folder that a run was told as run_dir.")
    return Run(folder)


class Run:
    """A run's folder, and the doors that take it as their source."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __repr__(self) -> str:
        records = self.metrics()
        last = f"step {records[-1]['step']}, loss {records[-1]['loss']:.4f}" if records else "nothing logged yet"
        return f"<Run {self.folder}: {last}>"

    @property
    def config(self) -> dict:
        """The settings that it was trained with, defaults included."""
        return recipe_yaml.load((self.folder / "config.yaml").read_text())

    @property
    def untrained(self) -> str:
        """The same architecture with weights drawn at random, as a source to be judged beside the run."""
        return f"random:{self.folder}"

    @property
    def pictures(self) -> list[Path]:
        """What the objective has drawn while it trained, oldest first."""
        return sorted((self.folder / "pictures").glob("*.png"))

    def metrics(self) -> list[dict]:
        """One mapping for each logged step: `step`, `epoch`, `loss`, `parts`, `lr`, `images_per_second`, ..."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may still be being written
        return list({record["step"]: record for record in records}.values())

    def probe(self, *others: str, ranks: int = 1, **options: Any) -> list[dict]:
        """`prelude probe`: a linear probe of this run's encoder, and of other sources beside it.

        options: those of the command, with _ for - (`train="shards/train-*.tar"`, `features=["cls", "mean"]`). Returns
        the results as their JSON files hold them, in the order of the sources. Raises RunError.
        """
        return self._judged("probe", others, ranks, options, door="linear_probe")

    def knn(self, *others: str, ranks: int = 1, **options: Any) -> list[dict]:
        """`prelude knn`: k nearest neighbours; as `probe`."""
        return self._judged("knn", others, ranks, options)

    def fewshot(self, *others: str, ranks: int = 1, **options: Any) -> list[dict]:
        """`prelude fewshot`: accuracy with few labels; as `probe`."""
        return self._judged("fewshot", others, ranks, options)

    def multilabel(self, *others: str, ranks: int = 1, **options: Any) -> list[dict]:
        """`prelude multilabel`: several findings an image; as `probe`."""
        return self._judged("multilabel", others, ranks, options)

    def segment(self, *others: str, ranks: int = 1, **options: Any) -> list[dict]:
        """`prelude segment`: masks; as `probe`."""
        return self._judged("segment", others, ranks, options)

    def export(self, to: str | Path | None = None, **options: Any) -> Path:
        """`prelude export`: the encoder as plain timm, or in other formats (`format=["timm", "onnx"]`) in folders of
        `to`. Returns where it was written (default: `export` in the run's folder). Raises RunError."""
        to = Path(to) if to is not None else self.folder / "export"
        _ask("export", [str(self.folder), *option_words({"to": to, **options})])
        return to

    def _judged(
        self, command: str, others: Sequence[str], ranks: int, options: dict[str, Any], door: str = ""
    ) -> list[dict]:
        sources = [str(self.folder), *map(str, others)]
        words = [*sources, *option_words(options)]
        begun = time.time()
        _ask(door or command, words, ranks)
        out = Path(options.get("out") or self.folder / "evaluations")
        written = [path for path in out.glob("*.json") if path.stat().st_mtime >= begun - 1]
        results = [json.loads(path.read_text()) for path in sorted(written)]
        ours = [result for result in results if result.get("command") == f"prelude {command} {shlex.join(words)}"]
        return sorted(ours, key=lambda result: sources.index(result["source"]))


def _ask(door: str, words: list[str], ranks: int = 1) -> None:
    """Has a door do it, and shows what it says as it says it. Raises RunError, or Interrupted."""
    live = is_live()
    line = ProgressLine(sys.stdout, live)
    try:
        problem = run_door(
            door, words, num_ranks=ranks, name=door, show=line, environment={EVERY_STEP: "1"} if live else {}
        )
    except Preempted as stop:
        if stop.through_us:
            raise Interrupted(f"{door} was asked to end, and has; the same call goes on from there.") from None
        raise RunError(
            f"{door} was asked to end by somebody else, and has; the same call goes on from there."
        ) from None
    finally:
        line.end()
    if problem:
        raise RunError(problem)
