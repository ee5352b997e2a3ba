"""Anomaly detection by frozen encoders: one class is normal, the others are not.

    prelude anomaly runs/mae random:runs/mae \\
        --train 'train-{0..9}.tar' --test test-0.tar
    prelude anomaly runs/mae --normal 3 --features stages

Several sources give one table; each result is also written as JSON.
docs/evaluators.md says how it is measured.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse
from functools import partial

from prelude.launch.arguments import door_parser, parse_present
from prelude.launch.exit_codes import door


def main(argv: list[str] | None = None) -> int:
    args = parse_present(parser(), argv)
    from prelude.evaluators.frozen.anomaly import anomaly
    from prelude.launch.frozen import judge

    return judge(args, [partial(anomaly, normal=args.normal)], "anomaly", argv)


def parser() -> argparse.ArgumentParser:
    parser = door_parser(__doc__)
    parser.add_argument(
        "--normal", nargs="+", type=int, metavar="CLASS", help="class numbers (default: each class in turn)"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
