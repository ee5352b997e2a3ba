"""Nearest-class-mean accuracy of frozen encoders.

    prelude ncm runs/mae random:runs/mae pixels \\
        --train 'train-{0..9}.tar' --test test-0.tar
    prelude ncm runs/mae --tasks 5

Several sources give one table; each result is also written as JSON.
docs/evaluators.md says how it is measured.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse
from functools import partial

from prelude.launch.arguments import door_parser, parse_present, whole
from prelude.launch.exit_codes import door


def main(argv: list[str] | None = None) -> int:
    args = parse_present(parser(), argv)
    from prelude.evaluators.frozen.ncm import ncm
    from prelude.launch.frozen import judge

    return judge(args, [partial(ncm, num_tasks=args.tasks)], "ncm", argv)


def parser() -> argparse.ArgumentParser:
    parser = door_parser(__doc__)
    parser.add_argument(
        "--tasks",
        type=whole(1),
        default=1,
        metavar="N",
        help="that the classes come in (default: 1)",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
