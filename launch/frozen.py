"""What the doors to frozen-feature evaluations share: the way from their arguments to results."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from prelude.data.errors import UserError
from prelude.data.remote_shards import keep_remote_shards
from prelude.data.select import Selection
from prelude.data.signed_urls import shown
from prelude.data.waiting import moves, wait_at_most
from prelude.data.whole_files import write_whole
from prelude.evaluators.features.pixels import is_pixels
from prelude.evaluators.judging import Evaluator, Judging, judge_all, labelled_shards
from prelude.evaluators.labelled import Labelled, selection
from prelude.evaluators.results import Result, print_table
from prelude.launch.arguments import chosen, select_section
from prelude.pretrain import attendance, distributed
from prelude.pretrain.environment import describe_code
from prelude.pretrain.files import reason
from prelude.pretrain.sameness import refuse_differences


def judge(
    args: argparse.Namespace, evaluators: Sequence[Evaluator], name: str, argv: Sequence[str] | None, **changes
) -> int:
    """Prints the table of what the evaluators found. `name`, with argv, is the command that a result records.

    changes: to how the labels are read, see `labelled_shards`.
    """
    settings = settings_of(args, name, argv)
    return judge_by(args, Judging(evaluators, labelled_of(args, **changes), **settings))


def judge_by(args: argparse.Namespace, judging: Judging, *more: Callable[[list[Result]], None]) -> int:
    """Prints the table of what was found, and then what `more` print of it."""
    if results := judge_all(args.sources, judging):
        for shown in (print_table, *more):
            shown(results)
    distributed.stop()
    return 0


def labelled_of(args: argparse.Namespace, **changes) -> Labelled:
    """Raises UserError for what a class or a part cannot be."""
    changes |= chosen_of(args)
    return labelled_shards(args.sources, args.train, args.test, args.label, value_range=args.range, **changes)


def chosen_of(args: argparse.Namespace) -> dict:
    found = chosen(args)
    return found | {name: selection(found[name]) for name in ("train_select", "test_select")}


def part_of(words: Sequence[str] | None, option: str = "--select") -> Selection | None:
    """What an option like `--select` takes of the shards. Raises UserError."""
    return selection(select_section(words, option))


def settings_of(args: argparse.Namespace, name: str, argv: Sequence[str] | None) -> dict:
    """Of `Judging`, those that doors of frozen features have in common. Joins the other ranks, if there are any.

    Raises UserError for kinds of feature where nothing but pixels is judged, which have one.
    """
    if args.features and all(map(is_pixels, args.sources)):
        raise UserError("--features has no effect on pixels, which are one kind of feature; leave it out.")
    return {"kinds": args.features, "bank": args.bank, **common(args, name, argv)}


def common(args: argparse.Namespace, name: str, argv: Sequence[str] | None) -> dict:
    """What every evaluation is told, under the names that it has there. Joins the other ranks, if there are any."""
    return {
        **reading(args, argv),
        "seed": args.seed,
        "num_seeds": args.seeds,
        "out": args.out,
        "command": shown(f"prelude {name} {given_words(argv)}"),
        "say": say,
    }


def reading(args: argparse.Namespace, argv: Sequence[str] | None) -> dict:
    """How images are read. Joins the other ranks, if there are any."""
    if args.timeout_seconds is not None:
        wait_at_most(args.timeout_seconds, "--timeout-seconds")
    keep_remote_shards(args.cache_dir, args.cache_gib)
    if distributed.launched_world_size() > 1:
        distributed.start()
        attendance.goes_by(moves)
        refuse_differences({"arguments": given_words(argv), "code": describe_code()})
    return {
        "batch_size": args.batch_size,
        "num_workers": distributed.cores_per_rank() if args.num_workers is None else args.num_workers,
    }


def given_words(argv: Sequence[str] | None) -> str:
    """The command line as a person would write it, without what a launcher adds."""
    return shlex.join(word for word in (sys.argv[1:] if argv is None else argv) if not word.startswith("--local_rank"))


def say(text: str) -> None:
    if distributed.is_main():
        print(text, file=sys.stderr, flush=True)


def write_result(place: str, content: str | bytes) -> None:
    """A file that was asked for by its name. Raises UserError where the disk refuses."""
    try:
        write_whole(Path(place), content)
    except OSError as error:
        raise UserError(f"{place} cannot be written ({reason(error)}); make room there, or name another.") from None
    print(f"written to {place}", file=sys.stderr)
