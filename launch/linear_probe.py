"""Linear probe of frozen encoders.

    prelude probe runs/mae random:runs/mae pixels --train 'train-{0..9}.tar' --test test-0.tar
    prelude probe runs/mae --norm batch none --features cls mean last4 --seeds 3

Several sources give one table; each result is also written as JSON. docs/evaluators.md says how it is measured.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `pretrain`

import argparse
from functools import partial

from evaluators.linear_probe import WEIGHT_DECAYS, linear_probe
from launch.exit_codes import door
from launch.frozen import door_parser, judge


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return judge(args, [partial(linear_probe, weight_decays=args.weight_decays, norms=args.norm)], "probe", argv)


def parser() -> argparse.ArgumentParser:
    parser = door_parser(__doc__)
    parser.add_argument(
        "--norm",
        nargs="+",
        choices=["batch", "none"],
        default=["batch"],
        help="heads on features of variance 1, as a BatchNorm without affine makes them, or on plain ones, or both",
    )
    parser.add_argument(
        "--weight-decays", nargs="+", type=float, default=list(WEIGHT_DECAYS), metavar="WD", help="(default: 12 values)"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
