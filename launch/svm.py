"""Linear support vector machines on frozen encoders.

    prelude svm runs/mae random:runs/mae pixels \\
        --train 'train-{0..9}.tar' --test test-0.tar
    prelude svm runs/mae --crops 10 --c 0.1 1 10
    prelude svm runs/cxr --names Viral Bacterial --field labels

Several sources give one table; each result is also written as JSON.
docs/evaluators.md says how it is measured.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse
from functools import partial

from prelude.launch.arguments import above_zero, door_parser, parse_present, whole
from prelude.launch.exit_codes import door


def main(argv: list[str] | None = None) -> int:
    args = parse_present(parser(), argv)
    from prelude.evaluators.frozen.svm import CS, svm
    from prelude.evaluators.judging import Judging, vector_format
    from prelude.launch.frozen import judge_by, labelled_of, settings_of

    form = vector_format(args.sources, args.names, args.field) if args.names or args.field else None
    settings, judged = settings_of(args, "svm", argv), partial(svm, cs=args.c or CS)
    return judge_by(args, Judging([judged], labelled_of(args, vectors=form), crops=args.crops, **settings))


def parser() -> argparse.ArgumentParser:
    parser = door_parser(__doc__)
    parser.add_argument(
        "--c", nargs="+", type=above_zero, metavar="C", help="of the slack, to choose from (default: 0.01 to 1000)"
    )
    parser.add_argument(
        "--crops", type=whole(1, 64), default=1, metavar="N", help="of an image, their features averaged (default: 1)"
    )
    parser.add_argument("--names", nargs="+", metavar="NAME", help="of findings, where an image may have several")
    parser.add_argument("--field", metavar="KEY", help="of the JSON object that holds the findings")
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
