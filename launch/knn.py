"""k-nearest-neighbour accuracy of frozen encoders.

    prelude knn runs/mae random:runs/mae pixels \\
        --train 'train-{0..9}.tar' --test test-0.tar
    prelude knn runs/mae --k 5 10 20 50 --temperature 0.03 0.07 0.2

Several neighbours or temperatures are chosen from on a held-out tenth of train.
Several sources give one table; each result is also written as JSON.
docs/evaluators.md says how it is measured.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse
from functools import partial

from prelude.evaluators.defaults import TEMPERATURE, K
from prelude.launch.arguments import above_zero, door_parser, parse_present, whole
from prelude.launch.exit_codes import door


def main(argv: list[str] | None = None) -> int:
    args = parse_present(parser(), argv)
    from prelude.evaluators.frozen.knn import knn
    from prelude.launch.frozen import judge

    return judge(args, [partial(knn, ks=args.k, temperatures=args.temperature)], "knn", argv)


def parser() -> argparse.ArgumentParser:
    parser = door_parser(__doc__)
    parser.add_argument("--k", nargs="+", type=whole(1), default=[K], metavar="K", help=f"neighbours (default: {K})")
    parser.add_argument(
        "--temperature",
        nargs="+",
        type=above_zero,
        default=[TEMPERATURE],
        metavar="T",
        help=f"(default: {TEMPERATURE})",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
