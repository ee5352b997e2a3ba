"""One shape for what an evaluation found: numbers with their uncertainty, and what is needed to redo them.

- A result file holds the encoder's weight fingerprint, the data fingerprints, the whole recipe, what was chosen
  and on what, versions and the command.
- It is written atomically: a reader finds the old file or the new one, never half of one.
- The same evaluation overwrites its own file; a different one (other weights, data, recipe) gets its own.
"""

import hashlib
import json
import math
import os
import platform
import re
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

TOP5_FROM = 10  # classes; below, five guesses say little


@dataclass(frozen=True)
class Percent:
    value: float  # percent
    se: float  # binomial standard error, in points


@dataclass(frozen=True)
class Outcome:
    """What an evaluator returns; it knows neither files nor commands."""

    evaluator: str
    numbers: dict[str, Percent]  # the headline: top1, and top5 where there are ten classes or more
    chosen: dict  # what was chosen on the held-out part of train
    recipe: dict  # what was fixed beforehand
    details: dict  # everything else that was computed
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """An outcome and where it came from."""

    source: str  # as it was named on the command line
    encoder: dict  # name, fingerprint
    data: dict  # label, and for train and test: shards, fingerprint, num_samples
    features: dict  # view, normalisation, precision
    outcome: Outcome
    command: str
    seconds: float  # this evaluator's own time, without the features
    versions: dict

    def to_json(self) -> dict:
        """A flat dictionary, the outcome's fields first."""
        rest = asdict(self)
        return {**rest.pop("outcome"), **rest}

    @property
    def file_name(self) -> str:
        identity = [self.outcome.evaluator, self.encoder, self.data, self.features, self.outcome.recipe]
        digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=4).hexdigest()
        slug = re.sub(r"[^A-Za-z0-9.-]+", "_", self.encoder["name"]).strip("_.")[-60:]
        return f"{self.outcome.evaluator}-{slug}-{digest}.json"


def versions() -> dict[str, str]:
    """Of what decides a number, beside the weights and the data."""
    found = {"python": platform.python_version()}
    for package in ("prelude-ssl", "torch", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # run from a checkout that was not installed
    return found


def percent(correct: int, total: int) -> Percent:
    share = correct / total
    return Percent(100 * share, 100 * math.sqrt(share * (1 - share) / total))


def hits(scores: Tensor, labels: Tensor) -> dict[str, int]:
    """How many samples have their class among the first one and the first five.

    scores: (N, C), -inf for a class that was not guessed at all. labels: (N,), -1 for a class that is none of
    the C. Equal scores rank in the order of the classes. `top5` is there from ten classes on.
    """
    known = labels >= 0
    place = labels.clamp(min=0)[:, None]
    own = scores.gather(1, place)  # (N, 1)
    before = torch.arange(scores.shape[1], device=scores.device) < place
    rank = ((scores > own) | (before & (scores == own))).sum(1)
    guessed = known & own[:, 0].isfinite()
    counts = {"top1": int((guessed & (rank < 1)).sum())}
    if scores.shape[1] >= TOP5_FROM:
        counts["top5"] = int((guessed & (rank < 5)).sum())
    return counts


def write(result: Result, folder: str | Path) -> Path:
    """Writes the result's JSON into `folder` and returns its path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / result.file_name
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with open(unfinished, "w") as file:
        json.dump(result.to_json(), file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    return path


def print_table(results: list[Result], console: Console | None = None) -> None:
    """One row a result; uncertainties are one standard error of the test sample."""
    table = Table(box=box.SIMPLE)
    table.add_column("encoder", overflow="fold")
    for name in ("evaluator", "features"):
        table.add_column(name, no_wrap=True)
    for name in ("top-1 %", "top-5 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        outcome = result.outcome
        row = [escape(result.encoder["name"]), outcome.evaluator.replace("_", " "), outcome.chosen["features"]]
        for number in (outcome.numbers["top1"], outcome.numbers.get("top5")):
            row.append(f"{number.value:.1f} ± {number.se:.1f}" if number else "")
        table.add_row(*row)
    console = console or Console()
    console.print(table)
    for result in results:
        for warning in result.outcome.warnings:
            console.print(f"{result.encoder['name']}: {warning}", highlight=False, markup=False)
