"""Several encoders on the same labelled shards, by one or more evaluators.

- Features are taken once for an encoder, whatever the number of evaluators.
- A result is written as soon as it is there, so that a later source that fails loses nothing.
- A result goes to `out`; else into the evaluations/ of the run that its source belongs to; else (a floor:
  pixels, timm weights) into that of the first run among the sources.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from checkpoints.sources import OpenedEncoder, open_encoder
from data.errors import UserError
from data.shards import ShardIndex
from evaluators.features import Features, extract
from evaluators.pixels import is_pixels, open_pixels
from evaluators.results import Outcome, Result, versions, write
from pretrain import distributed
from pretrain.config import EvaluateConfig, read_recipe

Evaluator = Callable[..., Outcome]  # (train, test, *, seed, device), each of the first two Features by kind


@dataclass(frozen=True)
class Labelled:
    """The shards that encoders are judged on."""

    train: str | Sequence[str]
    test: str | Sequence[str]
    label: str  # extension of the member with the class number


def evaluate(
    sources: Sequence[str],
    evaluators: Sequence[Evaluator],
    labelled: Labelled,
    *,
    kinds: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int = 256,
    num_workers: int = 0,
    out: str | Path | None = None,
    command: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Every evaluator's result on every source, in that order, each written where it belongs.

    kinds: of feature; None for those that suit each encoder. seed: of held-out parts and of `random:` sources.
    say: is told what was done, a line at a time. Raises UserError for a source or shards that cannot be used.
    """
    device = distributed.device()
    indexes = [ShardIndex(shards, labelled.label) for shards in (labelled.train, labelled.test)]
    reading = {"batch_size": batch_size, "num_workers": num_workers, "device": device}
    results = []
    for source, encoder in _opened(sources, seed):
        started = time.monotonic()
        own_kinds = None if is_pixels(source) else kinds
        train, test = (extract(encoder, index, labelled.label, kinds=own_kinds, **reading) for index in indexes)
        data, warnings = _data(labelled, indexes, train, test)
        counts = [f"{data[part]['num_samples']:,} {part}" for part in ("train", "test")]
        say(f"{encoder.name}: features of {' and '.join(counts)} images in {time.monotonic() - started:.1f} s")
        for evaluator in evaluators:
            started = time.monotonic()
            outcome = evaluator(train, test, seed=seed, device=device)
            result = Result(
                source=source,
                encoder={"name": encoder.name, "fingerprint": encoder.fingerprint, "origin": encoder.origin},
                data=data,
                features=next(iter(train.values())).recipe,
                outcome=replace(outcome, warnings=[*warnings, *outcome.warnings]),
                command=command,
                seconds=round(time.monotonic() - started, 3),
                versions=versions(),
            )
            results.append(result)
            folder = _folder(source, sources, out)
            written = f", written to {write(result, folder)}" if folder else ""
            say(f"{encoder.name}: {outcome.evaluator} in {result.seconds:.1f} s{written}")
    return results


def labelled_shards(
    sources: Sequence[str],
    train: str | Sequence[str] | None = None,
    test: str | Sequence[str] | None = None,
    label: str | None = None,
) -> Labelled:
    """What is given, completed by the `evaluate` section of the first run among the sources that has one.

    Raises UserError where train or test shards remain unknown.
    """
    section = next(filter(None, map(_evaluate_section, filter(None, map(run_of, sources)))), None)
    train = train or (section and section.train_shards)
    test = test or (section and section.test_shards)
    missing = [f"--{name} SHARDS" for name, shards in (("train", train), ("test", test)) if not shards]
    if missing:
        raise UserError(
            f"There are no labelled shards to judge {', '.join(sources)} on; write {' and '.join(missing)}, or an "
            f"evaluate section in the run's config."
        )
    return Labelled(train, test, label or (section.label if section else "cls"))


def run_of(source: str) -> Path | None:
    """The folder of the run that a source belongs to: itself, or where its checkpoint or export lies."""
    if is_pixels(source) or source.startswith("timm:"):
        return None
    folder = Path(source.removeprefix("random:")).absolute()
    for candidate in (folder, *folder.parents[:2]):
        if (candidate / "config.yaml").is_file() and (candidate / "checkpoints").is_dir():
            return candidate
    return None


def _evaluate_section(run: Path) -> EvaluateConfig | None:
    section = read_recipe(run / "config.yaml").get("evaluate")
    return EvaluateConfig.model_validate(section) if section else None


def _opened(sources: Sequence[str], seed: int) -> Iterator[tuple[str, OpenedEncoder]]:
    """One encoder in memory at a time."""
    first = next((source for source in sources if not is_pixels(source)), None)
    for source in sources:
        if is_pixels(source):
            yield source, open_pixels(source, open_encoder(first, seed=seed) if first else None)
        else:
            yield source, open_encoder(source, seed=seed)


def _folder(source: str, sources: Sequence[str], out: str | Path | None) -> Path | None:
    if out:
        return Path(out)
    run = run_of(source) or next(filter(None, map(run_of, sources)), None)
    return run / "evaluations" if run else None


def _data(
    labelled: Labelled, indexes: list[ShardIndex], train: dict[str, Features], test: dict[str, Features]
) -> tuple[dict, list[str]]:
    """What the images were, for the record, and what to be told about them."""
    data, warnings = {"label": labelled.label}, []
    for name, index, features in zip(("train", "test"), indexes, (train, test), strict=True):
        one = next(iter(features.values()))
        unreadable = index.num_samples - len(one)
        if unreadable:
            warnings.append(f"{unreadable} of {index.num_samples} {name} images could not be read and are left out.")
        data[name] = {
            "shards": getattr(labelled, name),
            "fingerprint": one.data_fingerprint,
            "num_samples": len(one),
            "num_unreadable": unreadable,
        }
    if indexes[0].fingerprint == indexes[1].fingerprint:
        warnings.append("Train and test are the same shards, so this says nothing about new images.")
    return data, warnings
