"""Accuracy of frozen encoders with few labels.

    prelude fewshot runs/mae random:runs/mae pixels \\
        --train 'train-{0..9}.tar' --test test-0.tar
    prelude fewshot runs/mae --per-class 1 2 5 --share 1 --draws 10

Several sources give one table; each result is also written as JSON.
docs/evaluators.md says how it is measured.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse
from functools import partial

from prelude.evaluators.defaults import DRAWS, PER_CLASS, SHARES
from prelude.launch.arguments import door_parser, parse_present, percent, whole
from prelude.launch.exit_codes import door


def main(argv: list[str] | None = None) -> int:
    args = parse_present(parser(), argv)
    from prelude.evaluators.frozen.fewshot import fewshot
    from prelude.launch.frozen import judge

    chosen = args.per_class is not None or args.share is not None
    amounts = {
        "per_class": (args.per_class or []) if chosen else PER_CLASS,
        "shares": (args.share or []) if chosen else SHARES,
    }
    return judge(args, [partial(fewshot, **amounts, draws=args.draws)], "fewshot", argv)


def parser() -> argparse.ArgumentParser:
    parser = door_parser(__doc__)
    parser.add_argument("--per-class", nargs="+", type=whole(1), metavar="N", help="labelled images a class (1 5 10)")
    parser.add_argument("--share", nargs="+", type=percent, metavar="P", help="labelled percent of each class (1 10)")
    parser.add_argument("--draws", type=whole(1), default=DRAWS, metavar="N", help=f"(default: {DRAWS})")
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
