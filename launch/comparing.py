"""A comparison from its sources to its page: what has to be trained is trained, all are judged, all is written."""

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path

from prelude.checkpoints.sources import describe
from prelude.data.absent import told_as
from prelude.data.counting import counted, listed
from prelude.data.errors import UserError
from prelude.data.shards import ShardIndex
from prelude.data.signed_urls import shown_in
from prelude.data.whole_files import write_whole
from prelude.evaluators.comparing import gathering
from prelude.evaluators.comparing.comparison import Comparison, Entry
from prelude.evaluators.comparing.gathering import Contestant
from prelude.evaluators.comparing.repeats import as_one
from prelude.evaluators.comparing.report.page import page
from prelude.evaluators.comparing.table import markdown, print_comparison, to_json
from prelude.evaluators.defaults import COMPARED
from prelude.evaluators.features.pixels import is_pixels
from prelude.evaluators.finetuning.recipe import check_recipe
from prelude.evaluators.frozen.anomaly import anomaly
from prelude.evaluators.frozen.fewshot import fewshot
from prelude.evaluators.frozen.knn import knn
from prelude.evaluators.frozen.linear_probe import linear_probe
from prelude.evaluators.frozen.multilabel import multilabel
from prelude.evaluators.frozen.ncm import ncm
from prelude.evaluators.judging import Evaluator, Judging, Labelled, first_section, labelled_shards, vector_format
from prelude.evaluators.results import versions
from prelude.launch.children import Preempted
from prelude.launch.compared_runs import last_of_each, named_runs, recipe_of, with_fine_tuning
from prelude.launch.exit_codes import INCOMPLETE, PREEMPTED
from prelude.launch.frozen import chosen_of, common
from prelude.pretrain import distributed
from prelude.pretrain.files import reason, refuse_unwritable, remedy
from prelude.pretrain.recipes import nearest_recipe

# 10 % of the labels would take longer than all the rest; `prelude fewshot` has it.
FEW_LABELS = partial(fewshot, shares=(1.0,))
NOTHING_KEPT = (
    "--keep asks what runs have lost of the weights that they started from, and none of these started from any."
)
EVALUATORS = {"probe": linear_probe, "knn": knn, "ncm": ncm, "fewshot": FEW_LABELS, "anomaly": anomaly}


def compare(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """The exit code of the comparison. argv: for the command that it records."""
    started, settings = time.monotonic(), common(args, "compare", argv)
    recipes = {source: path for source in args.sources if (path := recipe_of(source))}
    if recipes and distributed.world_size() > 1:
        raise UserError(
            f"{next(iter(recipes))} is to be pretrained first, which ranks of one launcher cannot; start "
            f"`prelude compare` without one, and write --ranks {distributed.world_size()}."
        )
    refuse_without_effect(args, recipes)
    if distributed.is_main():
        refuse_unwritable(Path(args.out))
    labelled, evaluators = task_of(args, [str(recipes.get(source, source)) for source in args.sources])
    kinds, settings["out"] = gathering.kinds_of(args.features), None
    judging = Judging(evaluators, labelled, kinds=kinds, bank=args.bank, keep_fits=True, **settings)
    judging.check()
    keeping = keeping_of(args, judging)
    if recipes:
        _look_at_unlabelled(args, labelled)
    given = [source for source in distinct(args.sources) if source not in recipes]
    if distributed.is_main():
        tell_unopened([(source, source, None) for source in given])
    try:
        runs = [named_runs(args, each, recipes.get(each), labelled) for each in distinct(args.sources)]
        contestants = gathering.line_up(sum(runs, []), floors=not args.no_floors, starts=keeping is not None)
        if keeping and not recipes:
            refuse_nothing_kept(contestants)
        if distributed.is_main():
            rest = [
                each for each in contestants if each.source not in given and (each.kind == "untouched" or each.problem)
            ]
            tell_unopened([(each.name, each.source, each.problem) for each in rest])
        if distributed.world_size() > 1:
            prepare(contestants, [judging, *([keeping] if keeping else [])])
            if not distributed.is_main():
                distributed.stop()
                return 0
            distributed.stop()  # all is in the bank; nobody waits for what one rank does with it
        entries = [gathering.gather(contestant, judging, keeping) for contestant in contestants]
        entries, warnings = with_fine_tuning(args, entries, labelled)
        entries, failed = as_one(entries, [[each.source for each in named] for named in runs])
        warnings += failed
        if keeping and not any(entry.started for entry in entries):
            warnings.append(NOTHING_KEPT)
    except Preempted:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return PREEMPTED
    comparison = compared(args, entries, labelled, settings["command"], started, warnings, bool(recipes))
    write(comparison, Path(args.out))
    return INCOMPLETE if warnings or any(entry.problem for entry in entries) else 0


# ---- what is asked for


def distinct(sources: Sequence[str]) -> list[str]:
    """Each once."""
    return list(dict.fromkeys(sources))


def refuse_without_effect(args: argparse.Namespace, recipes: dict) -> None:
    given = [f"--{name}" for name in ("images", "shards", "set", "ranks") if getattr(args, name)]
    given += ["--pretraining-seeds"] if args.pretraining_seeds > 1 else []
    if args.finetune:
        given = [name for name in given if name != "--ranks"]
    if given and not recipes:
        raise UserError(f"{' and '.join(given)} has no effect without a recipe among the sources; leave it out.")
    stems = [path.stem for path in {path.resolve(): path for path in recipes.values()}.values()]
    if double := [stem for stem in stems if stems.count(stem) > 1]:
        raise UserError(f"Two recipes are named {double[0]} and would train into one folder; rename one of them.")
    for given, words in (("--set", args.set), *((f"--finetune {recipe}", words) for recipe, *words in args.finetune)):
        if any(word.partition("=")[0].strip() == "run_dir" for word in words):
            raise UserError(
                f"{given} run_dir=... is each run's own in a comparison; write --out DIR for the folder of all."
            )
    for recipe, *words in args.finetune:
        check_recipe(recipe, last_of_each(["run_dir=of-the-comparison", *words]))


def task_of(args: argparse.Namespace, sources: Sequence[str]) -> tuple[Labelled, list[Evaluator]]:
    section = first_section(sources)
    if not (args.names or args.field or args.group or (section and section.label_names)):
        names = list(dict.fromkeys(args.evaluators or COMPARED))
        labelled = labelled_shards(sources, args.train, args.test, args.label, None, args.range, **chosen_of(args))
        return labelled, [EVALUATORS[name] for name in names]
    if args.evaluators and not args.keep:
        raise UserError(
            "--evaluators is for class numbers; with several findings an image the evaluator is multilabel, so leave "
            "it out."
        )
    form = vector_format(sources, args.names, args.field, args.group)
    labelled = labelled_shards(sources, args.train, args.test, args.label, form, args.range, **chosen_of(args))
    return labelled, [partial(multilabel, names=form.names)]


def _look_at_unlabelled(args: argparse.Namespace, labelled: Labelled) -> None:
    """At what recipes are pretrained on, before anything begins. Raises UserError."""
    images = [word.removeprefix("data.image=") for word in args.set if word.startswith("data.image=")]
    of_shards = ("--shards ", "", "--set data.image=")
    with told_as(*(of_shards if args.shards else labelled.named_as("train"))):
        of_labelled = "" if args.shards else labelled.image
        ShardIndex(args.shards or labelled.train, image=images[-1] if images else of_labelled)


def keeping_of(args: argparse.Namespace, judging: Judging) -> Judging | None:
    """The same judging on the old images of --keep. Raises UserError for shards that cannot be used."""
    if not args.keep:
        return None
    if behind := [source for source in args.sources if Path(source).suffix == ".tar"]:
        raise UserError(
            f"--keep takes two words, TRAIN and TEST, and {behind[0]} stands among the sources; put each pattern in "
            "quotes, as in --keep 'old/train-*.tar' 'old/test-*.tar'."
        )
    asked = judging.labelled
    label, evaluators = asked.label, judging.evaluators
    if asked.vectors:  # the old images have class numbers all the same
        label, evaluators = "cls", [EVALUATORS[name] for name in dict.fromkeys(args.evaluators or COMPARED)]
    seen_as = {key: getattr(asked, key) for key in ("value_range", "max_pixels", "image", "channels")}
    old = Labelled(*args.keep, label, **seen_as, named=("", ""))
    plain = replace(old, image="")  # of the new images one of several is meant, of the old there may be one alone
    if not _opens(old) and _opens(plain):
        old = plain
    keeping = replace(judging, evaluators=evaluators, labelled=old)
    try:
        keeping.check()
    except UserError as error:
        raise UserError(f"--keep {' '.join(args.keep)} cannot be used: {error}") from None
    for given, old, new in zip(args.keep, keeping.indexes, judging.indexes, strict=True):
        if old.fingerprint == new.fingerprint:
            raise UserError(f"--keep {given} holds the new images themselves; write labelled shards of the old ones.")
    return keeping


def _opens(labelled: Labelled) -> bool:
    try:
        labelled.opened()
    except UserError:
        return False
    return True


def refuse_nothing_kept(contestants: Sequence[Contestant]) -> None:
    if not any(contestant.started or contestant.problem for contestant in contestants):
        raise UserError(f"{NOTHING_KEPT} Leave it out, or name a run with encoder.weights.")


def tell_unopened(named: Iterable[tuple[str, str, str | None]]) -> None:
    """Before the hours that pretraining and judging the others may take. The comparison names them too. named: names,
    sources, and what is wrong with them where that is known."""
    for name, source, problem in named:
        try:
            if not problem and not is_pixels(source):
                describe(source).read()
        except UserError as error:
            near = f"Did you mean the recipe {near}? " if (near := nearest_recipe(source)) else ""
            problem = f"{near}{error}"
        if problem:
            print(f"{name} will not be judged: {problem}", file=sys.stderr, flush=True)


# ---- judging


def prepare(contestants: Sequence[Contestant], judgings: Sequence[Judging]) -> None:
    for contestant, judging in product(contestants, judgings):
        try:
            if not contestant.problem:
                judging.prepare(contestant.source, contestant.beside)
        except UserError:
            continue  # it is told when its turn comes to be judged


# ---- what comes out


def compared(
    args: argparse.Namespace,
    entries: list[Entry],
    labelled: Labelled,
    command: str,
    started: float,
    warnings: list[str],
    any_recipe: bool,
) -> Comparison:
    measured = [result for entry in entries for result in entry.results.values()]
    objectives = list(dict.fromkeys(entry.objective or entry.name for entry in entries if entry.kind == "pretrained"))
    old = [result for entry in entries for result in entry.kept.values()]
    sides = {"train": {"shards": labelled.train}, "test": {"shards": labelled.test}}
    unknown = {"label": labelled.label, **shown_in(sides)}
    shards = shown_in(args.shards or labelled.train)
    budget = f"{counted(f'{args.images:,}', 'image')} each" if args.images else "each recipe's own number of images"
    budget += f" with {args.pretraining_seeds} seeds" if args.pretraining_seeds > 1 else ""
    what = "without labels" if args.shards else "the labelled train shards, without their labels"
    return Comparison(
        title=listed(objectives) or "Floors",
        entries=entries,
        evaluators=list(dict.fromkeys(result["evaluator"] for result in measured)),
        data=measured[0]["data"] if measured else unknown,
        command=command,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.monotonic() - started,
        budget=f"{budget}, from {shards} ({what})" if any_recipe else None,
        versions=versions(),
        old_data=old[0]["data"] if old else {},
        warnings=warnings,
    )


def write(comparison: Comparison, out: Path) -> None:
    contents = {"comparison.json": to_json, "table.md": markdown, "report.html": page}  # the numbers first
    if not comparison.evaluators and (out / "comparison.json").exists():
        print_comparison(comparison)
        print(f"none was judged, so the earlier comparison in {out} is kept", file=sys.stderr)
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content_of in contents.items():
            write_whole(out / name, content_of(comparison))
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written ({reason(error)}); {remedy(error, 'choose another folder')}."
        ) from None
    print_comparison(comparison)
    print(f"written to {', '.join(str(out / name) for name in contents)}", file=sys.stderr)
