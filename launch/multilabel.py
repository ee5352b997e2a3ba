"""Several findings in one image, by yes-or-no heads on frozen encoders.

    prelude multilabel runs/cxr random:runs/cxr \\
        --train train-0.tar --test test-0.tar \\
        --field labels --names Viral COVID-19 Bacterial --group patient

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
    from prelude.evaluators.comparing.label_table import print_labels
    from prelude.evaluators.frozen.multilabel import multilabel
    from prelude.evaluators.judging import Judging, vector_format
    from prelude.launch.frozen import judge_by, labelled_of, settings_of

    form = vector_format(args.sources, args.names, args.field, args.group)
    judged = partial(multilabel, names=form.names, norms=args.norm)
    judging = Judging([judged], labelled_of(args, vectors=form), **settings_of(args, "multilabel", argv))
    return judge_by(args, judging, print_labels)


def parser() -> argparse.ArgumentParser:
    label = "extension of the JSON member with the findings (default: that of the run's evaluate section, else json)"
    parser = door_parser(__doc__, label=label)
    default = "(default: the run's evaluate section)"
    parser.add_argument("--names", nargs="+", metavar="NAME", help=f"of the findings {default}")
    parser.add_argument("--field", metavar="KEY", help=f"of the JSON object that holds the findings {default}")
    parser.add_argument("--group", metavar="KEY", help=f"of the JSON object, such as patient {default}")
    parser.add_argument("--norm", nargs="+", choices=["batch", "none"], default=["batch"], help="as for prelude probe")
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
