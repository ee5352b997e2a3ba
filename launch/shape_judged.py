"""The work of `prelude shape` for one source: images, features, a result where it belongs."""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.data.loader import one_pass
from prelude.data.progress import progress_bar
from prelude.data.shards import ShardIndex
from prelude.evaluators.dense.global_shape import TILES, global_shape
from prelude.evaluators.dense.samples import all_over
from prelude.evaluators.embedding.embed import index_as_seen
from prelude.evaluators.features.dense import dense_plan
from prelude.evaluators.features.extraction import Extractor, autocast, evaluation_plan, pool
from prelude.evaluators.judging import described, first_section, keep, open_source
from prelude.evaluators.labelled import selection
from prelude.evaluators.results import Result, versions
from prelude.launch.frozen import part_of
from prelude.pretrain import distributed
from prelude.pretrain.images import images as device_images

BATCH, NUM_IMAGES = 64, 500
TEST_SELECT = "--test-select"


def judge_shape(
    source: str, shown: tuple[ShardIndex, dict], args: argparse.Namespace, *, command: str, say: Callable[[str], None]
) -> Result:
    """shown: of `images_of`. Raises UserError for a source or shards that cannot be used."""
    encoder, (index, data) = open_source(source, args.sources, args.seed), shown
    plan, started = dense_plan(evaluation_plan(encoder)), time.monotonic()
    extractor = Extractor(encoder, args.features, distributed.device(), plan)
    size = encoder.config.size
    tiles = args.tiles or [n for n in TILES if not any(side % n or side // n < 2 for side in size)]
    if not tiles:
        raise UserError(f"No grid of {TILES} cuts images of {size[0]}x{size[1]} pixels evenly; write --tiles K.")
    samples = all_over(index, args.num_images or NUM_IMAGES)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        with progress_bar("disrupting images", len(samples)) as advance:
            for batch in one_pass(index, plan, batch_size=BATCH, samples=samples):
                (pixels,) = device_images(batch.to(extractor.device), plan)
                yield pixels, batch.sample_ids.to(extractor.device)
                advance(len(batch))

    def features(images: Tensor) -> dict[str, Tensor]:
        with autocast(extractor.device):
            return pool(extractor.model, images, extractor.kinds)

    with torch.no_grad():
        outcome = global_shape(batches(), features, tiles=tiles, shards=index.named)
    read, warnings = outcome.details["num_images"], []
    if read < len(samples):
        warnings.append(f"{len(samples) - read} of {counted(len(samples), 'image')} left out, unreadable.")
    if args.num_images and args.num_images > index.num_samples:
        warnings.append(
            f"The shards hold {counted(index.num_samples, 'image')}, fewer than --num-images {args.num_images}."
        )
    outcome = replace(outcome, warnings=warnings + outcome.warnings)
    data = {"test": {**data, "fingerprint": index.fingerprint, "num_samples": read}}
    seconds = round(time.monotonic() - started, 3)
    result = Result(source, described(encoder), data, extractor.recipe, outcome, command, seconds, versions())
    keep(result, args.sources, args.out, say)
    return result


def images_of(args: argparse.Namespace) -> tuple[ShardIndex, dict]:
    """What all sources look at, and what is recorded of it: as given, or as the run's evaluate section has it."""
    section = first_section(args.sources)
    shards = args.test or (section and section.test_shards)
    if not shards:
        raise UserError(f"There are no images to judge {', '.join(args.sources)} on; write --test SHARDS.")
    of_section = None if args.test or not section else selection(section.test_select)
    part = part_of(args.test_select, TEST_SELECT) or of_section
    image = args.image or (section and section.image) or ""
    named = "--test " if args.test else "evaluate.test_shards="
    index = index_as_seen(args.sources, shards, "", args.range, image, part, TEST_SELECT, named)
    chosen = {"select": part.said()} if part else {}
    chosen |= {"image": image} if image else {}
    return index, {"shards": shards, **chosen, **({"range": index.value_range} if index.value_range else {})}
