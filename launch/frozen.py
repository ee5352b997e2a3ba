"""What the doors to frozen-feature evaluations share: their arguments, and the way through."""

import argparse
import shlex
import sys
from collections.abc import Sequence

from prelude.checkpoints.sources import SOURCES as ENCODERS
from prelude.data.errors import UserError
from prelude.evaluators.frozen import Evaluator, Labelled, evaluate, labelled_shards
from prelude.evaluators.results import Result, print_table
from prelude.launch.arguments import documented_parser
from prelude.pretrain import distributed

SOURCES = f"{ENCODERS}, random:SOURCE (the same architecture, untrained), or pixels, pixels:SIZE"
OUT = "where results are written (default: RUN/evaluations)"


def door_parser(doc: str, *, sources: str = SOURCES, out: str = OUT) -> argparse.ArgumentParser:
    """A parser whose help is a door's docstring, with the arguments that every evaluation takes.

    sources, out: the help of these two.
    """
    parser = documented_parser(doc)
    add_arguments(parser, sources, out)
    return parser


def add_arguments(parser: argparse.ArgumentParser, sources: str, out: str) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help=sources,
    )
    defaults = "(default: the run's evaluate section)"
    parser.add_argument("--train", metavar="SHARDS", help=f"labelled shards to learn from {defaults}")
    parser.add_argument("--test", metavar="SHARDS", help=f"labelled shards to report on {defaults}")
    parser.add_argument("--label", metavar="EXT", help="extension of the class number's member (default: cls)")
    parser.add_argument(
        "--features",
        nargs="+",
        metavar="KIND",
        help="cls, mean, last4 of a vision transformer; pool, stages, stage2, stage2x4 of others "
        "(default: those that suit each encoder)",
    )
    parser.add_argument("--bank", metavar="DIR", help="where features are kept (default: RUN/bank)")
    parser.add_argument("--out", metavar="DIR", help=out)
    parser.add_argument("--seed", type=int, default=0, help="of every random choice and of random: (default: 0)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="mean and spread over N seeds (default: 1)")
    parser.add_argument("--num-workers", type=int, default=distributed.cores_per_rank(), metavar="N")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="(default: 256)")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher adds it; the environment says more


def judge(
    args: argparse.Namespace, evaluators: Sequence[Evaluator], name: str, argv: Sequence[str] | None, **changes
) -> int:
    """Prints the table of what the evaluators found. `name`, with argv, is the command that a result records.

    changes: to how the labels are read, see `labelled_shards`.
    """
    results = results_of(args, evaluators, name, argv, labelled_of(args, **changes))
    if results:
        print_table(results)
    distributed.stop()
    return 0


def labelled_of(args: argparse.Namespace, **changes) -> Labelled:
    return labelled_shards(args.sources, args.train, args.test, args.label, **changes)


def results_of(
    args: argparse.Namespace,
    evaluators: Sequence[Evaluator],
    name: str,
    argv: Sequence[str] | None,
    labelled: Labelled,
) -> list[Result]:
    return evaluate(args.sources, evaluators, labelled, kinds=args.features, bank=args.bank, **common(args, name, argv))


def common(args: argparse.Namespace, name: str, argv: Sequence[str] | None) -> dict:
    """What every evaluation is told, under the names that it has there. Joins the other ranks, if there are any."""
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds} leaves nothing to do; write 1 or more.")
    if distributed.launched_world_size() > 1:
        distributed.start()
    given = [word for word in (sys.argv[1:] if argv is None else argv) if not word.startswith("--local_rank")]
    return {
        "seed": args.seed,
        "num_seeds": args.seeds,
        "batch_size": args.batch_size,
        "num_workers": args.num_workers,
        "out": args.out,
        "command": shlex.join(["prelude", name, *given]),
        "say": _say,
    }


def _say(text: str) -> None:
    if distributed.is_main():
        print(text, file=sys.stderr, flush=True)
