"""One shape for what an evaluation found: numbers with their uncertainty, and what is needed to redo them.

- A result file holds the encoder's weight fingerprint, the data fingerprints, the whole recipe, what was chosen
  and on what, versions and the command.
- It is written atomically: a reader finds the old file or the new one, never half of one.
- The same evaluation overwrites its own file; a different one (other weights, data, recipe) gets its own.
"""

import base64
import hashlib
import json
import math
import os
import platform
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from prelude.data.errors import UserError
from prelude.data.signed_urls import shown, shown_in
from prelude.data.whole_files import write_whole
from prelude.evaluators.table_text import folded, print_plain, print_whole
from prelude.pretrain.files import reason

TOP5_FROM = 10  # classes; below, five guesses say little
TITLES = {
    "top1": "top-1 %",
    "top5": "top-5 %",
    "balanced": "mean of classes %",
    "auc": "macro AUC %",
    "map": "mAP %",
    "auroc": "AUROC %",
    "r_precision": "R-precision %",
    "incremental": "incremental %",
    "fpr95": "FPR at 95 %",
    "pixel_auroc": "pixel AUROC %",
    "image_auroc": "image AUROC %",
    "miou": "mIoU %",
    "pixel_accuracy": "pixel accuracy %",
}


@dataclass(frozen=True)
class Percent:
    """What is not known of a number is None, and left out of a result file."""

    value: float  # percent; over several seeds or draws, their mean
    se: float | None  # standard error that the test sample gives it, in points: binomial, or by bootstrap
    spread: float | None = None  # standard deviation over seeds or draws, in points
    interval: tuple[float, float] | None = None  # 95 % confidence interval, where it is not value +- 1.96 se


@dataclass(frozen=True)
class Outcome:
    """What an evaluator returns; it knows neither files nor commands."""

    evaluator: str
    numbers: dict[str, Percent]  # the headline: top1, and top5 where there are ten classes or more; or others
    chosen: dict  # what was chosen on the held-out part of train
    recipe: dict  # what was fixed beforehand
    details: dict  # everything else that was computed
    warnings: list[str] = field(default_factory=list)
    by_kind: dict[str, dict[str, Percent]] = field(default_factory=dict)  # the headline of each kind of feature
    # (N,) bool of each draw or seed: which test images the chosen setting's first guess is right for, for paired tests
    right: Sequence[Tensor] = field(default=(), compare=False)


@dataclass(frozen=True)
class Result:
    """An outcome and where it came from, with URLs as they may be shown."""

    source: str  # as it was named on the command line
    encoder: dict  # name, fingerprint
    data: dict  # label, and for train and test: shards, fingerprint, num_samples
    features: dict  # view, normalisation, precision
    outcome: Outcome
    command: str
    seconds: float  # this evaluator's own time, without the features
    versions: dict

    def __post_init__(self):
        for name, clean in (("command", shown), ("data", shown_in)):
            object.__setattr__(self, name, clean(getattr(self, name)))

    def to_json(self) -> dict:
        """A flat dictionary, the outcome's fields first."""
        right = [packed(each) for each in self.outcome.right]
        rest = asdict(replace(self, outcome=replace(self.outcome, right=())), dict_factory=without_none)
        return {**rest.pop("outcome"), "right": right, **rest}

    @property
    def file_name(self) -> str:
        """The same for the same evaluation of the same weights on the same data; another one for any other."""
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
    """The share of a count, with its standard error, by which a few images that are all right, or all wrong, would be
    certain: there it is the one of two right and two wrong ones more (Agresti and Coull, 1998)."""
    right, count = (correct + 2, total + 4) if correct in (0, total) else (correct, total)
    return Percent(100 * correct / total, 100 * math.sqrt(right / count * (1 - right / count) / count))


def hits(scores: Tensor, labels: Tensor) -> dict[str, int]:
    """How many samples have their class among the first one and the first five.

    scores: (N, C), -inf for a class that was not guessed at all. labels: (N,), -1 for a class that is none of
    the C. Equal scores rank in the order of the classes. `top5` is there from ten classes on.
    """
    counts = {"top1": int(among_first(1, scores, labels).sum())}
    if scores.shape[1] >= TOP5_FROM:
        counts["top5"] = int(among_first(5, scores, labels).sum())
    return counts


def among_first(count: int, scores: Tensor, labels: Tensor) -> Tensor:
    """(N,) bool: which samples have their class among the first `count`, as `hits` ranks them."""
    place = labels.clamp(min=0)[:, None]
    own = scores.gather(1, place)  # (N, 1)
    before = torch.arange(scores.shape[1], device=scores.device) < place
    rank = ((scores > own) | (before & (scores == own))).sum(1)
    return (labels >= 0) & own[:, 0].isfinite() & (rank < count)


def packed(right: Tensor) -> str:
    """(N,) bool as text: a bit an image, in base64."""
    return base64.b64encode(np.packbits(right.cpu().numpy()).tobytes()).decode()


def unpacked(text: str, count: int) -> np.ndarray:
    """(N,) bool of `packed`."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=count).astype(bool)


def over_seeds(outcomes: list[Outcome], seeds: list[int]) -> Outcome:
    """One outcome of several that differ in their seed: mean and standard deviation of each number.

    The standard error of the mean stays that of one test sample, which all seeds share. The details are the first
    seed's, beside `by_seed`: what each seed chose and found.
    """
    if len(outcomes) == 1:
        return outcomes[0]
    first = outcomes[0]
    numbers = _mean_numbers([outcome.numbers for outcome in outcomes])
    by_seed = {seed: {"chosen": o.chosen, "numbers": o.numbers} for seed, o in zip(seeds, outcomes, strict=True)}
    same = {key: value for key, value in first.chosen.items() if all(o.chosen.get(key) == value for o in outcomes)}
    if "features" in first.chosen and "features" not in same:
        same["features"] = by_frequency(kind for o in outcomes for kind in o.chosen["features"].split(", "))
    return Outcome(
        evaluator=first.evaluator,
        numbers=numbers,
        chosen=same,
        recipe={**{key: value for key, value in first.recipe.items() if key != "seed"}, "seeds": list(seeds)},
        details={**first.details, "by_seed": by_seed},
        warnings=list(dict.fromkeys(warning for outcome in outcomes for warning in outcome.warnings)),
        by_kind={kind: _mean_numbers([outcome.by_kind[kind] for outcome in outcomes]) for kind in first.by_kind},
        right=[each for outcome in outcomes for each in outcome.right],
    )


def by_frequency(kinds: Iterable[str]) -> str:
    """Kinds of feature that were chosen in several draws or seeds, the one chosen most often first."""
    return ", ".join(kind for kind, _ in Counter(kinds).most_common())


def mean_and_spread(numbers: list[Percent]) -> Percent:
    """All of the same test images, so that the mean's standard error and interval are no narrower than one's."""
    values, errors = [number.value for number in numbers], [number.se for number in numbers]
    intervals = [number.interval for number in numbers]
    return Percent(
        statistics.mean(values),
        None if None in errors else statistics.mean(errors),
        statistics.stdev(values) if len(values) > 1 else None,
        None if None in intervals else tuple(statistics.mean(ends) for ends in zip(*intervals, strict=True)),
    )


def _mean_numbers(found: Sequence[dict[str, Percent]]) -> dict[str, Percent]:
    return {name: mean_and_spread([numbers[name] for numbers in found]) for name in found[0]}


def write(result: Result, folder: str | Path) -> Path:
    """Writes the result's JSON into `folder` and returns its path. Raises UserError where the disk does not take it."""
    folder = Path(folder)
    path = folder / result.file_name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result.to_json(), indent=1) + "\n"
        write_whole(path, text, draft=path.with_name(f".{path.name}.{os.getpid()}"))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({reason(error)}); make room there, or write --out DIR.") from None
    return path


def print_table(results: list[Result], console: Console | None = None) -> None:
    """One row a result. After a number comes its standard error, or, over several seeds or draws, their deviation."""
    evaluators = {result.outcome.evaluator.replace("_", " ") for result in results}
    alone = evaluators.pop() if len(evaluators) == 1 else None  # then it is the title: several numbers need the width
    columns = list(dict.fromkeys(name for result in results for name in result.outcome.numbers))
    found = [result.outcome.numbers for result in results]
    cells = [[with_doubt(each[name]) if name in each else "" for name in columns] for each in found]
    titles = [TITLES.get(name, name) for name in columns]
    names = [[result.encoder["name"], result.outcome.evaluator.replace("_", " "),
              result.outcome.chosen.get("features", "")] for result in results]  # fmt: skip

    def build(width: int) -> Table:
        table = Table(box=box.SIMPLE, title=alone, pad_edge=False, collapse_padding=True)
        for name in ("encoder", "features") if alone else ("encoder", "evaluator", "features"):
            table.add_column(name, no_wrap=True)
        for title, column in zip(titles, zip(*cells, strict=True), strict=True):
            table.add_column(folded(title, max(map(len, column))), justify="right", no_wrap=True)
        for (encoder, evaluator, features), row in zip(names, cells, strict=True):
            middle = [] if alone else [folded(evaluator, width)]
            table.add_row(Text(folded(encoder, width)), *middle, folded(features, width), *row)
        return table

    console = console or Console()
    print_whole(console, build, [name for row in names for name in row])
    told = [f"{result.encoder['name']}: {warning}" for result in results for warning in result.outcome.warnings]
    for text in dict.fromkeys(told):  # several evaluators say the same of their images
        print_plain(console, text)


def with_doubt(number: Percent) -> str:
    """63.1 ± 0.7, or 63.1 [61.7, 64.4]; a deviation over seeds or draws goes before what a test sample leaves open."""
    if number.spread is None and number.interval:
        return f"{number.value:.1f} [{number.interval[0]:.1f}, {number.interval[1]:.1f}]"
    doubt = number.se if number.spread is None else number.spread
    return f"{number.value:.1f}" if doubt is None else f"{number.value:.1f} ± {doubt:.1f}"


def without_none(pairs: list[tuple]) -> dict:
    return {key: value for key, value in pairs if value is not None}
