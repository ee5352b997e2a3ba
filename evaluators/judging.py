"""Several encoders on the same labelled shards, by one or more evaluators.

- Features are taken once for an encoder, whatever the number of evaluators and of seeds, and kept in a bank.
- A result is written as soon as it is there, so that a later source that fails loses nothing.
- A result goes to `out`; else into the evaluations/ of the run that its source belongs to; else (a floor:
  pixels, timm weights) into that of the first run among the sources.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from prelude.checkpoints.source_names import RANDOM
from prelude.checkpoints.sources import OpenedEncoder, describe, open_encoder
from prelude.data.decode import MAX_PIXELS, ValueRange
from prelude.data.errors import UserError
from prelude.data.shards import ShardIndex
from prelude.data.value_range import tell_if_dark
from prelude.evaluators.features.bank import Bank
from prelude.evaluators.features.extraction import Features, crops_plan
from prelude.evaluators.features.joining import joined
from prelude.evaluators.features.labels import Labels, VectorFormat, class_numbers, grouped, label_group, label_vectors
from prelude.evaluators.features.pixels import is_pixels, open_pixels
from prelude.evaluators.kept_fits import KeptFits, content_of, key_of
from prelude.evaluators.labelled import Labelled, describe_data, named_by_section, selection, with_overlap
from prelude.evaluators.recorded_sections import READ, first_section, is_recipe, run_of, sections_of
from prelude.evaluators.results import Outcome, Result, over_seeds, versions, write
from prelude.pretrain import distributed

Evaluator = Callable[..., Outcome]  # (train, test, *, seed, device), each of the first two Features by kind
BANK = "bank"  # folder of a run's features


@dataclass(frozen=True)
class Judging:
    """What is the same for every encoder that is judged."""

    evaluators: Sequence[Evaluator]
    labelled: Labelled
    _: KW_ONLY
    kinds: Sequence[str] | Callable[[OpenedEncoder], Sequence[str]] | None = None  # of feature; None: what suits each
    seed: int = 0  # of held-out parts and of `random:` sources; the first of `num_seeds`
    num_seeds: int = 1
    batch_size: int = 256
    num_workers: int = 0
    crops: int = 1  # of an image whose features are averaged
    bank: str | Path | None = None  # the folder of features; None: that of the source's run
    keep_fits: bool = False  # with the features, so that none is made twice
    out: str | Path | None = None  # folder of results
    command: str = ""
    say: Callable[[str], None] = lambda text: None  # is told what was done, a line at a time

    @cached_property
    def indexes(self) -> list[ShardIndex]:
        """Of train and test."""
        return self.labelled.indexes()

    @cached_property
    def labels(self) -> list[Labels]:
        found = [labels_of(index, self.labelled) for index in self.indexes]
        if self.labelled.group:
            found = grouped(found, self.indexes, self.labelled.group)
        return with_overlap(found, self.indexes)

    def check(self) -> None:
        """Raises UserError for shards that cannot be used, before any work is done."""
        _ = self.labels
        if distributed.is_main():
            tell_if_dark(self.indexes[0])

    @property
    def seeds(self) -> list[int]:
        return list(range(self.seed, self.seed + self.num_seeds))

    def opened(self, source: str, sources: Sequence[str], seed: int) -> OpenedEncoder:
        return open_source(source, sources, seed)

    def prepare(self, source: str, sources: Sequence[str]) -> None:
        """Puts the features of a source into the bank, by all ranks together. sources: see `results`."""
        for _, encoder in by_seed(source, sources, self.seeds, self.opened):
            self._taken(source, sources, encoder)

    def features(self, source: str, sources: Sequence[str], encoder: OpenedEncoder) -> list[dict[str, Features]]:
        """Of train and test, by kind; out of the bank, if they are there."""
        kept = Bank(self.bank or bank_folder(source, sources))
        kinds = self.kinds(encoder) if callable(self.kinds) else None if is_pixels(source) else self.kinds
        reading = {"batch_size": self.batch_size, "num_workers": self.num_workers, "device": distributed.device()}
        plan = crops_plan(encoder, self.crops)
        rows = [kept.rows(encoder, index, kinds, plan=plan, **reading) for index in self.indexes]
        return [joined(*part) for part in zip(rows, self.labels, self.indexes, strict=True)]

    def results(self, source: str, sources: Sequence[str]) -> list[Result]:
        """What each evaluator found out about a source, written where it belongs; one process' work.

        sources: all that are judged together, for a floor among them that borrows its view or its folder.
        Raises UserError for a source that cannot be used.
        """
        outcomes, seconds = [[] for _ in self.evaluators], [0.0] * len(self.evaluators)
        train = test = judged = None
        for seed, encoder in by_seed(source, sources, self.seeds, self.opened):
            if train is None or is_random(source):
                train, test = self._taken(source, sources, encoder)
            judged = judged or encoder
            fitted = self._fitted(source, sources, train, test, seed)
            for i, (outcome, taken) in enumerate(fitted):
                outcomes[i].append(outcome)
                seconds[i] += taken
        results = self.told(source, judged, train, test, outcomes, seconds)
        for result in results:
            keep(result, sources, self.out, self.say)
        return results

    def _fitted(
        self, source: str, sources: Sequence[str], train: dict[str, Features], test: dict[str, Features], seed: int
    ) -> Iterator[tuple[Outcome, float]]:
        """What each evaluator found, and the seconds that it took; out of the bank, where fits are kept there."""
        fits = KeptFits(Bank(self.bank or bank_folder(source, sources)).folder) if self.keep_fits else None
        content = content_of(train, test) if fits else ""
        for evaluator in self.evaluators:
            key = key_of(evaluator, content, seed, distributed.device())
            if fits and (found := fits.found(key)):
                yield found
                continue
            started = time.monotonic()
            outcome = evaluator(train, test, seed=seed, device=distributed.device())
            taken = time.monotonic() - started
            yield (fits.keep(key, outcome, taken) if fits else outcome), taken

    def told(
        self,
        source: str,
        encoder: OpenedEncoder,
        train: dict[str, Features],
        test: dict[str, Features],
        outcomes: Sequence[Sequence[Outcome]],
        seconds: Sequence[float],
    ) -> list[Result]:
        """A result of each evaluator, out of its outcomes by seed and the time that it took."""
        data, warnings = self.described_data(train, test)
        merged = [over_seeds(found, self.seeds) for found in outcomes]
        return [
            Result(
                source=source,
                encoder=described(encoder),
                data=data,
                features=next(iter(train.values())).recipe,
                outcome=replace(outcome, warnings=[*warnings, *outcome.warnings]),
                command=self.command,
                seconds=round(taken, 3),
                versions=versions(),
            )
            for outcome, taken in zip(merged, seconds, strict=True)
        ]

    def described_data(self, train: dict[str, Features], test: dict[str, Features]) -> tuple[dict, list[str]]:
        """What the images were, for the record, and what to be told about them."""
        return describe_data(self.labelled, self.indexes, self.labels, train, test)

    def _taken(self, source: str, sources: Sequence[str], encoder: OpenedEncoder) -> list[dict[str, Features]]:
        """The features, and a word on what they took."""
        started = time.monotonic()
        if encoder.loaded:
            self.say(encoder.loaded)
        found = self.features(source, sources, encoder)
        counts = " and ".join(
            f"{len(next(iter(part.values()))):,} {name}" for part, name in zip(found, ("train", "test"), strict=True)
        )
        folder = Bank(self.bank or bank_folder(source, sources)).folder
        self.say(f"{encoder.name}: features of {counts} images in {time.monotonic() - started:.1f} s, kept in {folder}")
        return found


def evaluate(sources: Sequence[str], evaluators: Sequence[Evaluator], labelled: Labelled, **settings) -> list[Result]:
    """Every evaluator's result on every source, in that order, each written where it belongs.

    settings: of `Judging`. Errors and ranks as in `judge_all`.
    """
    return judge_all(sources, Judging(evaluators, labelled, **settings))


def judge_all(sources: Sequence[str], judging: Judging) -> list[Result]:
    """All ranks compute features; the first one alone evaluates and gets the results, others get none.

    Raises UserError for a source or shards that cannot be used, before any work as far as a look at them tells.
    """
    refuse_unknown(sources)
    judging.check()
    if distributed.world_size() > 1:
        for source in sources:
            judging.prepare(source, sources)
        if not distributed.is_main():
            return []
        # The work of several ranks is done, and all is in the bank; nobody waits for what one rank does with it.
        distributed.stop()
    return [result for source in sources for result in judging.results(source, sources)]


def refuse_unknown(sources: Sequence[str]) -> None:
    """Looks at each of several sources, so that none is judged for nothing. Raises UserError for one that is none."""
    if len(sources) < 2:
        return  # it is opened at once
    for source in dict.fromkeys(sources):
        if not is_pixels(source):
            describe(source.removeprefix(RANDOM))
        elif ":" in source:
            open_pixels(source)


def keep(result: Result, sources: Sequence[str], out: str | Path | None, say: Callable[[str], None]) -> None:
    """Writes a result where it belongs, and says so. Raises UserError, the numbers told, where the disk refuses."""
    folder = _folder(result.source, sources, out)
    done = f"{result.encoder['name']}: {result.outcome.evaluator} in {result.seconds:.1f} s"
    try:
        written = f", written to {write(result, folder)}" if folder else ""
    except UserError:
        say(f"{done}: " + ", ".join(f"{name} {number.value:.2f} %" for name, number in result.outcome.numbers.items()))
        raise
    say(done + written)


def labelled_shards(
    sources: Sequence[str],
    train: str | Sequence[str] | None = None,
    test: str | Sequence[str] | None = None,
    label: str | None = None,
    vectors: VectorFormat | None = None,
    value_range: ValueRange | Literal["auto"] | None = None,
    group: str = "",
    one_set: bool = False,
    **given,
) -> Labelled:
    """What is given, completed by the `evaluate` section of the first run among the sources that has one, and by the
    first `data.range` and `data.max_pixels`.

    vectors: where labels are findings instead of class numbers. group, one_set: as `Labelled` has them. given: `image`,
    `classes`, `train_select` and `test_select` of `Labelled`; the section's parts are those of its own shards.

    Raises UserError where train or test shards remain unknown, and where runs read pixels by different ranges.
    """
    section = first_section(sources)
    more = {"image": given.get("image") or (section and section.image), "classes": given.get("classes")}
    if section and label in (None, "", section.label):  # another label has other classes
        more["classes"] = more["classes"] or section.classes
    for name, shards in (("train_select", train), ("test_select", test)):
        of_section = selection(getattr(section, name)) if section and not shards else None
        more[name] = given.get(name) or of_section
    if one_set:
        more["train_select"] = more["test_select"]
    named = named_by_section(train=not train, test=not test)
    if section and not train:
        more["label_group"] = label_group(section.label, section.label_group)
    test = test or (section and section.test_shards)
    train = test if one_set else train or (section and section.train_shards)
    missing = [f"--{name} SHARDS" for name, shards in (("train", train), ("test", test)) if not shards]
    missing = missing[-1:] if one_set else missing
    if missing:
        raise UserError(
            f"There are no labelled shards to judge {', '.join(sources)} on; write {' and '.join(missing)}, or an "
            f"evaluate section in the run's config."
        )
    default = "json" if vectors else "cls"
    alike = section and bool(section.label_names) == bool(vectors)  # else it speaks of other members
    label = label or (section.label if alike else default)
    more |= {"image": more["image"] or "", "classes": tuple(more["classes"] or ())}
    more |= {"group": group, "one_set": one_set, "named": named}
    value_range, max_pixels, channels = read_as(sources, value_range)
    return Labelled(train, test, label, vectors, value_range, max_pixels, channels=channels, **more)


def vector_format(
    sources: Sequence[str],
    names: Sequence[str] | None = None,
    field: str | None = None,
    group: str | None = None,
) -> VectorFormat:
    """Where the findings of an image are written: what is given, completed as in `labelled_shards`.

    Raises UserError where the names remain unknown.
    """
    section = first_section(sources)
    names = names or (section.label_names if section else ())
    if not names:
        raise UserError(
            f"The findings that {', '.join(sources)} are to be judged on have no names; write --names NAME ..., or "
            f"evaluate.label_names in the run's config, or leave out what is of findings (--field, --group)."
        )
    field = section.label_field if section and field is None else field or ""
    of_section = section.label_group if section else ""
    return VectorFormat(tuple(names), field, of_section if group is None else group, group_asked=group is not None)


def read_as(
    sources: Sequence[str], value_range: ValueRange | Literal["auto"] | None
) -> tuple[ValueRange | Literal["auto"] | None, int, int | None]:
    """The range of values, where none is given that of the sources' runs, the largest image, and the number of
    channels, where a run says it or `auto` needs it.

    Raises UserError where runs differ in their range: all are shown the same images.
    """
    sections = list(sections_of(sources, "data"))
    ranges, limits, channels = ([section[key] for section in sections if section.get(key)] for key in READ)
    ranges = [each for each in ranges if each != "auto"] or ranges  # what was found for one does for a recipe beside it
    unlike = [each for each in ranges if each != ranges[0]]
    if unlike and value_range is None:
        raise UserError(
            f"The runs of {', '.join(sources)} differ in data.range ({ranges[0]} and {unlike[0]}), and all are shown "
            f"the same images; write --range LOW,HIGH, or judge them one by one."
        )
    value_range = value_range or (ranges or [None])[0]
    if value_range == "auto" and not channels:  # which pages of a TIFF are channels then depends on the encoder alone
        encoders = [source for source in sources if not (is_pixels(source) or is_recipe(source))]
        channels = [describe(source.removeprefix(RANDOM)).config.in_chans for source in encoders[:1]] or [3]
    return value_range, (limits or [MAX_PIXELS])[0], (channels or [None])[0]


def is_random(source: str) -> bool:
    """Whether another seed gives another encoder."""
    return source.startswith(RANDOM)


def by_seed(
    source: str, sources: Sequence[str], seeds: Sequence[int], opened: Callable[..., OpenedEncoder] | None = None
) -> Iterator[tuple[int, OpenedEncoder]]:
    """The encoder for each seed: one in memory at a time, opened again only where the seed decides its weights.

    opened: how, by default as `open_source`.
    """
    opened = opened or open_source
    encoder = None
    for seed in seeds:
        if encoder is None or is_random(source):
            encoder = opened(source, sources, seed)
        yield seed, encoder


def open_source(source: str, sources: Sequence[str], seed: int) -> OpenedEncoder:
    """`pixels` looks at images as the first encoder among the sources does."""
    if not is_pixels(source):
        return open_encoder(source, seed=seed)
    first = next((other for other in sources if not is_pixels(other)), None)
    return open_pixels(source, open_encoder(first, seed=seed) if first else None)


def labels_of(index: ShardIndex, labelled: Labelled) -> Labels:
    return label_vectors(index, labelled.vectors) if labelled.vectors else class_numbers(index)


def bank_folder(source: str, sources: Sequence[str]) -> Path | None:
    run = _run_for(source, sources)
    return run / BANK if run else None


def _folder(source: str, sources: Sequence[str], out: str | Path | None) -> Path | None:
    if out:
        return Path(out)
    run = _run_for(source, sources)
    return run / "evaluations" if run else None


def _run_for(source: str, sources: Sequence[str]) -> Path | None:
    return run_of(source) or next(filter(None, map(run_of, sources)), None)


def described(encoder: OpenedEncoder) -> dict:
    """For the record. computation: what tells apart two that have the same weights."""
    told = {"name": encoder.name, "fingerprint": encoder.fingerprint, "computation": encoder.computation}
    return {**told, "origin": encoder.origin}
