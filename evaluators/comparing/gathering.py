"""Who takes part in a comparison, and what is gathered about each.

- Every pretrained encoder stands beside its own architecture untrained, and all beside raw pixels. Encoders with the
  same architecture and view share one untrained baseline, and those with the same view one entry of pixels.
- Where it is asked what runs have kept, what each started from stands beside it: once for all that started alike, and
  not again where somebody named it.
- A source that cannot be used stays in the comparison, with the reason, and keeps nobody else from being judged.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from prelude.checkpoints import sources
from prelude.checkpoints.source_names import RANDOM, START, bare, has_folder, path_of
from prelude.data.errors import UserError
from prelude.evaluators.comparing.comparison import Entry, Picture
from prelude.evaluators.comparing.report.pictures import pictures_of
from prelude.evaluators.comparing.run_record import cost_of, curves_of, pictures_of_run, recipe_of
from prelude.evaluators.features.extraction import fair_kinds, kinds_among
from prelude.evaluators.features.pixels import is_pixels, pixel_size
from prelude.evaluators.judging import Judging, is_random, open_source, run_of
from prelude.pretrain.config import EncoderConfig


@dataclass(frozen=True)
class Contestant:
    """An encoder that takes part, before anything of it is measured."""

    name: str  # unique
    source: str
    kind: str  # as of an Entry
    objective: str | None = None
    architecture: str = ""
    beside: tuple[str, ...] = ()  # sources whose view and folders a floor borrows
    untrained: str | None = None  # name of another contestant
    started: str | None = None  # name of the one whose weights it started from
    step: int | None = None  # of pretraining
    problem: str | None = None


@dataclass(frozen=True)
class Named:
    """A source as it was asked for. `problem`: why it cannot be had, where that is known already."""

    source: str
    name: str | None = None
    problem: str | None = None
    objective: str | None = None


def line_up(named: Sequence[Named], floors: bool = True, starts: bool = False) -> list[Contestant]:
    """Those that were named, in this order, with `starts` what each of them started from, then what they are to be
    compared with, unless `floors` is false."""
    taken: set[str] = set()
    known = [_contestant(each, taken) for each in named]
    if starts:
        known = _with_starts(known, taken)
    found, architectures, views, untrained = [contestant for contestant, _ in known], {}, {}, {}
    for contestant, described in known:
        if described is not None:
            architecture = _key(described)
            if contestant.kind == "untrained":
                untrained.setdefault(architecture, contestant.name)
            elif contestant.kind in ("pretrained", "untouched"):
                architectures[contestant.name] = (architecture, described.config)
            views.setdefault((*pixel_size(described.config.size), described.mean, described.std), contestant)
    has_pixels = any(is_pixels(each.source) for each in named)
    for i, contestant in enumerate(found):
        if contestant.name not in architectures:
            continue
        architecture, config = architectures[contestant.name]
        if floors and architecture not in untrained:
            name = untrained[architecture] = _unique(f"random:{contestant.name}", taken)
            source = f"{RANDOM}{contestant.source}"
            found.append(Contestant(name, source, "untrained", architecture=in_words(config), beside=(source,)))
        found[i] = replace(contestant, untrained=untrained.get(architecture))
    if floors and not has_pixels:
        for (height, width, *_), contestant in views.items():
            name, beside = _unique(f"pixels {height}x{width}", taken), (contestant.source,)
            found.append(Contestant(name, "pixels", "floor", architecture="raw pixels", beside=beside))
    everyone = tuple(each.source for each in found if not (each.problem or is_pixels(each.source)))
    return [replace(each, beside=(*each.beside, *everyone)) for each in found]


def gather(contestant: Contestant, judging: Judging, keeping: Judging | None = None) -> Entry:
    """Judges one of those that take part, and collects what its run left. Never raises UserError.

    keeping: on the old images, where it is asked what is kept.
    """
    entry = Entry(
        name=contestant.name,
        source=contestant.source,
        kind=contestant.kind,
        objective=contestant.objective,
        encoder=contestant.architecture,
        num_parameters=None,
        results={},
        untrained=contestant.untrained,
        started=contestant.started,
        problem=contestant.problem,
    )
    run = run_of(contestant.source) if contestant.kind == "pretrained" else None
    try:
        if run:
            told = {"pictures": pictures_of_run(run), "recipe": recipe_of(run)}
            entry = replace(entry, **_taken_by(run, contestant.step), **told)
        if entry.problem:
            return entry
        opened = open_source(contestant.source, contestant.beside, judging.seed)
        measured = _measured(contestant, judging)
        kept = _measured(contestant, keeping) if keeping else {}
        judged = next((each["encoder"]["origin"].get("step") for each in measured.values()), None)
        if run and judged != contestant.step:  # it has trained on since it was lined up
            entry = replace(entry, **_taken_by(run, judged))
        pictures = entry.pictures
        if contestant.kind == "pretrained":
            pictures = [*pictures, *_drawn(contestant, judging, opened, measured)]
    except UserError as error:
        return replace(entry, problem=str(error))
    num_parameters = sum(parameter.numel() for parameter in opened.model.parameters())
    return replace(entry, num_parameters=num_parameters, results=measured, kept=kept, pictures=pictures)


def _taken_by(run: Path, step: int | None) -> dict:
    return {"cost": cost_of(run, step), "curves": curves_of(run, step)}


def _measured(contestant: Contestant, judging: Judging) -> dict[str, dict]:
    results = judging.results(contestant.source, contestant.beside)
    return {result.outcome.evaluator: result.to_json() for result in results}


def _drawn(
    contestant: Contestant, judging: Judging, opened: sources.OpenedEncoder, measured: dict[str, dict]
) -> list[Picture]:
    """By the features that k-NN chose, if it was among the evaluators: they decide what is near."""
    train, test = judging.features(contestant.source, contestant.beside, opened)
    kind = measured.get("knn", {}).get("chosen", {}).get("features", next(iter(train))).split(", ")[0]
    return pictures_of(opened, tuple(judging.indexes), train[kind], test[kind], seed=judging.seed)


def kinds_of(wanted: Sequence[str] | None):
    """Which kinds of feature an encoder is judged on: those of `wanted` that it has; by default `fair_kinds`."""

    def choose(encoder) -> tuple[str, ...] | None:
        if is_pixels(encoder.config.name):
            return None
        return kinds_among(encoder.model, wanted, encoder.name) if wanted else fair_kinds(encoder.model)

    return choose


def in_words(config: EncoderConfig) -> str:
    height, width = config.size
    changes = [f"patch {config.patch_size}"] if config.patch_size else []
    for key, value in config.kwargs.items():
        changes.append(f"{key} {'-'.join(map(str, value)) if isinstance(value, list | tuple) else value}")
    size = f"{height}" if height == width else f"{height} x {width}"
    return f"{config.name} at {size} px{' (' if changes else ''}{', '.join(changes)}{')' if changes else ''}"


Known = tuple[Contestant, sources.Description | None]


def _with_starts(known: Sequence[Known], taken: set[str]) -> list[Known]:
    """Each that started from weights with the name of what it started from, which is added behind all of them unless
    one of them is that encoder: the same weights in the same architecture."""
    starts = {
        contestant.name: (_key(described), described.origin["weights_fingerprint"])
        for contestant, described in known
        if contestant.kind == "pretrained" and described and described.origin.get("weights_fingerprint")
    }
    architectures = {architecture for architecture, _ in starts.values()}
    holders: dict[tuple[str, str | None], Known] = {}
    for contestant, described in known:
        if described and contestant.kind != "untrained" and _key(described) in architectures:
            holders.setdefault((_key(described), _fingerprint(contestant, described)), (contestant, described))
    found = []
    for contestant, described in known:
        if start := starts.get(contestant.name):
            if start not in holders:
                name = f"untouched {_name(described.origin['weights'])}"
                holders[start] = _contestant(Named(f"{START}{contestant.source}", name), taken)
            contestant = replace(contestant, started=holders[start][0].name)
        found.append((contestant, described))
    named = {contestant.name for contestant, _ in found}
    return [*found, *(each for each in holders.values() if each[0].name not in named)]


def _fingerprint(contestant: Contestant, described: sources.Description) -> str | None:
    """As a run records it. None for weights that cannot be read, which is told when their turn comes."""
    if contestant.kind == "untouched":
        return described.origin["weights_fingerprint"]
    try:
        return described.read().fingerprint
    except UserError:
        return None


def _contestant(named: Named, taken: set[str]) -> Known:
    source = named.source
    kind = "untrained" if is_random(source) else "untouched" if source.startswith(START) else "pretrained"
    if is_pixels(source) or (kind == "pretrained" and not has_folder(source)):
        kind = "floor"
    name = _unique(named.name or _name(source), taken)
    if named.problem or is_pixels(source):
        words = "raw pixels" if is_pixels(source) else ""
        return Contestant(name, source, kind, named.objective, words, problem=named.problem), None
    try:
        described = sources.describe(source.removeprefix(RANDOM))
    except UserError as error:
        return Contestant(name, source, kind, named.objective, problem=str(error)), None
    origin = described.origin if kind == "pretrained" else {}
    objective = origin.get("objective") or named.objective
    place = {"objective": objective, "beside": (source,), "step": origin.get("step")}
    return Contestant(name, source, kind, architecture=in_words(described.config), **place), described


def _name(source: str) -> str:
    """`mae` of runs/mae, `mae/step-00001000` of a checkpoint, `mae/export` of an export in its run."""
    path = bare(source)
    prefix = source.removesuffix(path)
    if is_pixels(path) or not has_folder(path):
        return source
    folder = path_of(path)
    run = run_of(path)
    if run and folder.absolute() != run:
        return f"{prefix}{run.name}/{folder.name}"
    return f"{prefix}{folder.absolute().name}"


def _unique(name: str, taken: set[str]) -> str:
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name} ({number})"
    taken.add(candidate)
    return candidate


def _key(described: sources.Description) -> str:
    """The same for encoders that are the same but for their weights."""
    return json.dumps([described.config.model_dump(mode="json"), described.mean, described.std], sort_keys=True)
