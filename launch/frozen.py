"""What the doors to frozen-feature evaluations share: their arguments, and the way through."""

import argparse
import shlex
import sys
from collections.abc import Sequence

from evaluators.frozen import Evaluator, evaluate, labelled_shards
from evaluators.results import Result
from pretrain import distributed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a run folder (its newest checkpoint), a checkpoint or export folder, timm:NAME, "
        "random:SOURCE (the same architecture, untrained), or pixels, pixels:SIZE",
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
    parser.add_argument("--out", metavar="DIR", help="where results are written (default: RUN/evaluations)")
    parser.add_argument("--seed", type=int, default=0, help="of the held-out part and of random: (default: 0)")
    parser.add_argument("--num-workers", type=int, default=distributed.cores_per_rank(), metavar="N")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="(default: 256)")


def results_of(
    args: argparse.Namespace, evaluators: Sequence[Evaluator], name: str, argv: Sequence[str] | None
) -> list[Result]:
    """What the evaluators found. `name`, with argv, is the command that a result records."""
    given = sys.argv[1:] if argv is None else argv
    return evaluate(
        args.sources,
        evaluators,
        labelled_shards(args.sources, args.train, args.test, args.label),
        kinds=args.features,
        seed=args.seed,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        out=args.out,
        command=shlex.join(["prelude", name, *given]),
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
