"""Runs from Python: `prelude.pretrain(...)`, and what can be asked of the run that it returns.

- Everything is done by the doors, each in a process of its own: a notebook's kernel holds no device, and imports torch
  only for an objective of the user's own, whose class says its settings. What a door keeps, writes and refuses is the
  same as from a command line.
- An interrupt (the stop button, Ctrl-C) asks the door to end: the step under way is finished and saved, then
  KeyboardInterrupt is raised. The same call goes on from there. So does a kernel that is gone.
- What a door refuses is a `RunError` with its sentence.
"""

import argparse
import importlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prelude.checkpoints.source_names import path_of
from prelude.data.errors import UserError
from prelude.data.signed_urls import shown
from prelude.launch.arguments import parse
from prelude.launch.children import Preempted, run_door
from prelude.launch.export import destination
from prelude.launch.progress_line import ProgressLine, is_live
from prelude.launch.python_settings import (
    as_count,
    as_path,
    keys_of,
    option_words,
    options_now,
    overrides_of,
    source_words,
)
from prelude.launch.python_words import of_options, of_settings
from prelude.pretrain.config_keys import Keys
from prelude.pretrain.files import read_lines
from prelude.pretrain.log_config import EVERY_STEP
from prelude.pretrain.recipes import load_config, read_recipe


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
    section as a mapping (`optimizer={"lr": 1e-3}`). In a run that is shorter than the recipe's warm-up or milestones,
    these keep their share of it unless they are set, and so do `freeze_encoder_steps` in any shorter run. Returns when
    the run has ended. Raises RunError, and KeyboardInterrupt once the run that was interrupted is saved.
    """
    keys = Keys()
    try:
        recipe, ranks = as_path(recipe, "recipe", "the name of a recipe, or its file"), as_count(ranks, "ranks")
        keys = keys_of(recipe, settings)
        overrides, followed = overrides_of(recipe, settings)
        config = load_config(recipe, [*overrides, *followed], options_now)
    except UserError as error:
        raise RunError(of_settings(str(error), keys)) from None
    if followed:
        written = of_settings(" and ".join(followed), keys)
        print(f"The recipe is for a longer run; in this one its schedule keeps its share: {written}.")
    _ask("pretrain", ["--config", str(recipe), *overrides, *followed], ranks, lambda told: of_settings(told, keys))
    return Run(Path(config.run_dir))


def open_run(folder: str | Path) -> "Run":
    """A run that is there, finished or not. Raises RunError where the folder holds none."""
    with _in_python():
        folder = as_path(folder, "folder", "the folder that a run was told as run_dir").expanduser()
    if not (folder / "config.yaml").is_file() and not (folder / "checkpoints").is_dir():
        raise RunError(f"{folder} holds no run; write the folder that a run was told as run_dir.")
    return Run(folder)


class Run:
    """A run's folder, and the doors that take it as their source."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()  # a notebook may go to another folder later

    def __repr__(self) -> str:
        records = self.metrics()
        last = f"step {records[-1]['step']}, loss {records[-1]['loss']:.4f}" if records else "nothing logged yet"
        return f"<Run {self.folder}: {last}>"

    @property
    def config(self) -> dict:
        """The settings that it was trained with, defaults included. Raises RunError where they are lost."""
        file = self.folder / "config.yaml"
        if not file.is_file():
            raise RunError(f"{file} is not there: the run has not begun yet, or somebody has removed it.")
        with _in_python():
            return read_recipe(file)

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
        return list({record["step"]: record for record in read_lines(self.folder / "metrics.jsonl")}.values())

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
        `to`. Returns where it was written (default: where the command would, such as `export` in the run's folder). As
        there, an earlier export is replaced and nothing else. Raises RunError."""
        parser = _parser_of("export")
        with _in_python(parser):
            words = option_words(options | {"to": None if to is None else as_path(to, "to")}, parser)
            told = parse(parser, [str(self.folder), *words])
            folder = destination(told)
        _ask("export", [str(self.folder), *words], told=lambda sentence: of_options(sentence, parser))
        return folder

    def _judged(
        self, command: str, others: Sequence[Any], ranks: int, options: dict[str, Any], door: str = ""
    ) -> list[dict]:
        parser = _parser_of(door or command, command)
        with _in_python(parser):
            sources, ranks = source_words(self.folder, others), as_count(ranks, "ranks")
            words = [*sources, *option_words(options, parser)]
            out = parse(parser, words).out
        folders = [Path(out)] if out else _evaluations_of(sources)
        before = _stamps(folders)
        _ask(door or command, words, ranks, lambda sentence: of_options(sentence, parser))
        written = [path for path, stamp in _stamps(folders).items() if before.get(path) != stamp]
        results = [json.loads(path.read_text()) for path in sorted(written)]
        asked = shown(f"prelude {command} {shlex.join(words)}")  # as it is recorded
        ours = [result for result in results if result.get("command") == asked]
        return sorted(ours, key=lambda result: sources.index(result["source"]))


def _evaluations_of(sources: Sequence[str]) -> list[Path]:
    """Where results may be written: with the run of each source, in which its checkpoint or export may lie."""
    places = [path_of(source).absolute() for source in sources]
    return [folder / "evaluations" for place in places for folder in (place, *place.parents[:2])]


def _stamps(folders: Sequence[Path]) -> dict[Path, tuple[int, int]]:
    """What tells a result that was written again from what was there, whatever the clocks say."""
    paths = {path for folder in folders for path in folder.glob("*.json")}
    return {path: ((found := path.stat()).st_ino, found.st_mtime_ns) for path in paths}


def _parser_of(door: str, command: str = "") -> argparse.ArgumentParser:
    """Of a door, which raises UserError for arguments that cannot be."""
    parser = importlib.import_module(f"prelude.launch.{door}").parser()
    parser.prog = f"prelude {command or door}"

    def refuse(mistake: str):
        raise UserError(f"{mistake.rstrip('.')}.")

    parser.error = refuse
    return parser


@contextmanager
def _in_python(parser: argparse.ArgumentParser | None = None) -> Iterator[None]:
    """What is refused inside is a RunError, which spells the options of a door as arguments."""
    try:
        yield
    except UserError as error:
        raise RunError(of_options(str(error), parser) if parser else str(error)) from None


def _ask(door: str, words: list[str], ranks: int = 1, told: Callable[[str], str] = str) -> None:
    """Has a door do it, and shows what it says as it says it. told: what a sentence of its is in Python. Raises
    RunError, or Interrupted."""
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
        raise RunError(told(problem))
