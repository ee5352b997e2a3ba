"""Do frozen encoders tell an image from its own tiles in another order?

    prelude shape runs/mae random:runs/mae pixels --test test-0.tar
    prelude shape runs/mae --tiles 2 4 7 14 --num-images 500

The odd one out of an image and two of its disruptions, for several sizes of
tiles; chance is a third. No labels are needed. Several sources give one table;
each result is also written as JSON. docs/evaluators.md says how it is measured.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse

from prelude.launch.alone import refuse_ranks
from prelude.launch.arguments import (
    KINDS,
    OUT,
    SOURCES,
    Shards,
    add_image,
    add_range,
    add_select,
    documented_parser,
    offering,
    parse_present,
    path,
    source,
    whole,
)
from prelude.launch.arguments import seed as seed_number
from prelude.launch.exit_codes import door


def main(argv: list[str] | None = None) -> int:
    args = parse_present(parser(), argv)
    refuse_ranks("shape")
    from prelude.evaluators.judging import refuse_unknown
    from prelude.evaluators.results import print_table
    from prelude.launch.frozen import given_words, say
    from prelude.launch.shape_judged import images_of, judge_shape

    refuse_unknown(args.sources)
    shown, command = images_of(args), f"prelude shape {given_words(argv)}"
    results = [judge_shape(name, shown, args, command=command, say=say) for name in args.sources]
    print_table(results)
    return 0


def parser() -> argparse.ArgumentParser:
    parser = documented_parser(__doc__)
    parser.add_argument("sources", nargs="+", type=source, metavar="SOURCE", help=SOURCES)
    parser.add_argument(
        "--test",
        action=Shards,
        metavar="SHARDS",
        help="images (default: those of the run's evaluate section)",
    )
    parser.add_argument(
        "--tiles",
        nargs="+",
        type=whole(2),
        metavar="K",
        help="sides of the grid (default: of 2 4 8 16 those that fit)",
    )
    kinds = "(default: those that suit each encoder)"
    offering(parser.add_argument("--features", nargs="+", metavar="KIND", help=kinds), KINDS)
    parser.add_argument("--num-images", type=whole(1), metavar="N", help="from all over (default: 500)")
    parser.add_argument("--out", type=path, metavar="DIR", help=OUT)
    parser.add_argument("--seed", type=seed_number, default=0, metavar="N", help="of random: (default: 0)")
    add_select(parser, "--test-select", "test")
    add_image(parser)
    add_range(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
