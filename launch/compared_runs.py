"""What a comparison trains first: recipes into runs, and encoders on by labels. Each through its own door, as a child.

- A run that is finished is not repeated, one that is half done goes on, and one with other settings is refused.
- What fails is told in a sentence and keeps nothing else from being done.
"""

import argparse
import hashlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch

from prelude.data.data_sets import index_of, index_of_volumes
from prelude.data.errors import UserError
from prelude.data.shards import ShardIndex
from prelude.evaluators.comparing.comparison import Entry
from prelude.evaluators.comparing.gathering import Named
from prelude.evaluators.comparing.run_record import is_finished
from prelude.evaluators.features.pixels import is_pixels
from prelude.evaluators.finetuning.recipe import NAME as FINE_TUNE
from prelude.evaluators.judging import Labelled, is_recipe
from prelude.launch.children import IN_OUT, run_door
from prelude.launch.combinations import LONGEST_NAME
from prelude.launch.training import data_of, seen_as, volumes_of
from prelude.objectives import options_for
from prelude.pretrain.budget import within
from prelude.pretrain.config import Config
from prelude.pretrain.recipe_yaml import written
from prelude.pretrain.recipes import find_recipe, load_config, objective_named, read_recipe

# What a recipe says of images that it is not given here; what is known of those that it is given comes behind.
_OF_OTHER_IMAGES = ("data.num_samples=null", "data.mix={}", "data.select=null")
_OF_OTHER_IMAGES += tuple(f"evaluate.{key}=null" for key in ("train_select", "test_select", "image"))
_OF_OTHER_IMAGES += (
    "evaluate.classes=[]",
    "evaluate.label_names=[]",
    'evaluate.label_field=""',
    'evaluate.label_group=""',
)


def recipe_of(source: str) -> Path | None:
    """The file of a source that is a recipe, None for any other. A file that is missing is no recipe either, so that it
    is told as a source that cannot be had."""
    if Path(source).is_dir() or ":" in source or source == "pixels":
        return None
    if Path(source).is_file() and not is_recipe(source):
        return None
    try:
        return find_recipe(source)
    except UserError:
        return None


def named_runs(args: argparse.Namespace, source: str, recipe: Path | None, labelled: Labelled) -> list[Named]:
    """The source itself, or the runs that a recipe has become, one for each seed of pretraining."""
    if recipe is None:
        return [Named(source)]
    objective = objective_named(read_recipe(recipe))
    named = []
    for number in range(args.pretraining_seeds):
        run_dir, problem = Path(args.out) / "runs" / recipe.stem, None
        try:
            seed = seed_of(args, recipe) + number
            run_dir = run_dir.with_name(f"{recipe.stem}-seed{seed}") if number else run_dir
            problem = pretrained(args, recipe, run_dir, labelled, seed)
        except UserError as error:
            problem = str(error)
        named.append(Named(str(run_dir), run_dir.name, problem and f"Pretraining failed: {problem}", objective))
    return named


def seed_of(args: argparse.Namespace, recipe: Path) -> int:
    """Of a recipe's first pretraining; the others count on from it."""
    seed = read_recipe(recipe, args.set, options_for).get("seed", 0)
    return seed if isinstance(seed, int) else 0  # another kind is refused with the rest of the config


def pretrained(args: argparse.Namespace, recipe: Path, run_dir: Path, labelled: Labelled, seed: int) -> str | None:
    """Pretrains into `run_dir`, or goes on with it, or finds it finished. Returns why it failed."""
    overrides = [f"run_dir={run_dir}", f"data.shards={written(args.shards or labelled.train)}"]
    own = [*_OF_OTHER_IMAGES]
    own += [f"data.image={labelled.image}"] if labelled.image and not args.shards else []
    seeds = [f"seed={seed}"] if args.pretraining_seeds > 1 else []
    overrides = last_of_each([*overrides, *own, *shared_settings(labelled), *reading_settings(args), *args.set, *seeds])
    config = load_config(recipe, overrides, options_for)
    indexes = learned_from(config)
    if args.images:
        num_samples = sum(index.num_samples for index in indexes)
        overrides = last_of_each([*overrides, *within(config, args.images, num_samples)])
        config = load_config(recipe, overrides, options_for)
    known_by = [
        [index.fingerprint for index in indexes],
        [index.as_written().fingerprint for index in indexes],
        [index.layout_fingerprint() for index in indexes],
    ]
    if is_finished(config, options_for(config.objective["name"]), list(map("_".join, known_by))):
        print(f"{run_dir} is finished", file=sys.stderr)
        return None
    arguments = ["--config", str(recipe), *overrides]
    return run_door("pretrain", arguments, num_ranks=num_ranks(args), name=run_dir.name, environment=IN_OUT)


def learned_from(config: Config) -> list[ShardIndex]:
    """What a run's epoch consists of: images, and volumes where it takes them. Raises UserError."""
    indexes = [index_of(data_of(config.data), channels=config.data.channels, **seen_as(config.data))]
    if of := config.data.volumes:
        seen = {"value_range": of.range, "max_pixels": config.data.max_pixels}
        indexes.append(index_of_volumes(volumes_of(config.data), **seen))
    return indexes


def last_of_each(overrides: list[str]) -> list[str]:
    """A key written twice is a mistake at a door; here what is said later replaces what was said before, of a section
    with all that is below it."""
    found: dict[str, str] = {}
    for override in overrides:
        key = override.partition("=")[0]
        found = {each: said for each, said in found.items() if each != key and not each.startswith(f"{key}.")}
        found[key] = override
    return list(found.values())


def shared_settings(labelled: Labelled) -> list[str]:
    """So that later evaluations of a run find the same shards, and images look alike everywhere."""
    values = {"train_shards": labelled.train, "test_shards": labelled.test, "label": labelled.label}
    if labelled.vectors:
        form = labelled.vectors
        values |= {"label_names": list(form.names), "label_field": form.field, "label_group": form.group_field}
    elif labelled.label_group:
        values["label_group"] = labelled.label_group
    selects = {"train_select": labelled.train_select, "test_select": labelled.test_select}
    for key, select in selects.items():  # key by key: what a recipe says of another part goes
        values |= {key: None} | {f"{key}.{name}": one for name, one in select.said().items()} if select else {}
    values |= {key: given for key, given in (("classes", labelled.classes), ("image", labelled.image)) if given}
    looks = [f"data.range={written(labelled.value_range)}"] if labelled.value_range else []
    return [*(f"evaluate.{key}={written(value)}" for key, value in values.items()), *looks]


def reading_settings(args: argparse.Namespace) -> list[str]:
    """What this process was told of remote shards and of waiting, for those that it starts."""
    told = {key: getattr(args, key) for key in ("cache_dir", "cache_gib", "timeout_seconds")}
    return [f"data.{key}={written(value)}" for key, value in told.items() if value is not None]


def with_fine_tuning(
    args: argparse.Namespace, entries: list[Entry], labelled: Labelled
) -> tuple[list[Entry], list[str]]:
    """The entries with what fine-tuning made of each pretrained and untrained one, and what failed."""
    found, warnings = [], []
    for entry in entries:
        if args.finetune and entry.kind != "floor" and not entry.problem:
            result, problem = fine_tuned(args, entry, labelled)
            warnings += [f"{entry.name} was not fine-tuned: {problem}"] if problem else []
            entry = replace(entry, results=entry.results | ({FINE_TUNE: result} if result else {}))
        elif args.finetune and not (entry.problem or is_pixels(entry.source)):
            print(
                f"{entry.name} is not fine-tuned: it is a mark to compare with, see docs/evaluators.md", file=sys.stderr
            )
        found.append(entry)
    return found, warnings


def fine_tuned(args: argparse.Namespace, entry: Entry, labelled: Labelled) -> tuple[dict | None, str | None]:
    """What the first recipe that suits an encoder made of it, or why none did."""
    problem = None
    for recipe, *overrides in args.finetune:
        run_dir = Path(args.out) / "finetune" / f"{slug(entry.name)}-{Path(recipe).stem}"
        shared = [*shared_settings(labelled), *reading_settings(args)]
        settings = last_of_each([f"run_dir={run_dir}", *shared, *overrides])
        arguments = [entry.source, "--config", recipe, *settings]
        name = f"fine-tuning {entry.name}"
        problem = run_door("finetune", arguments, num_ranks=num_ranks(args), name=name, environment=IN_OUT)
        if problem is None:
            newest = max((run_dir / "evaluations").glob("*.json"), key=lambda path: path.stat().st_mtime)
            return json.loads(newest.read_text()), None
    return None, problem


def slug(name: str) -> str:
    """A folder's name; of other letters than English ones with a digest, so that a folder can be told from its like."""
    plain = re.sub(r"[^\w.-]+", "_", name).strip("_")
    if plain and name.isascii():
        return plain
    return f"{plain[:LONGEST_NAME]}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"


def num_ranks(args: argparse.Namespace) -> int:
    return args.ranks or max(torch.cuda.device_count(), 1)
