"""Retrieval by frozen encoders: are the images nearest to one of its class?

    prelude retrieve runs/mae random:runs/mae pixels \\
        --train 'train-{0..9}.tar' --test test-0.tar
    prelude retrieve runs/mae --test 'test-*.tar' --leave-one-out
    prelude retrieve runs/mae --group json:patient --k 1 10 100

The train shards are the gallery, the test images the queries. With
--leave-one-out each test image is looked for among the others. Several sources
give one table; each result is also written as JSON.
docs/evaluators.md says how it is measured.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse
from functools import partial

from prelude.data.errors import UserError
from prelude.launch.arguments import door_parser, parse_present, whole
from prelude.launch.exit_codes import door


def main(argv: list[str] | None = None) -> int:
    args = parse_present(parser(), argv)
    if args.leave_one_out and (args.train or args.train_select):
        raise UserError("--leave-one-out looks for test images among themselves; leave --train out.")
    from prelude.evaluators.frozen.retrieval import retrieval
    from prelude.launch.frozen import judge

    return judge(
        args,
        [partial(retrieval, ks=args.k)],
        "retrieve",
        argv,
        group=args.group or "",
        one_set=args.leave_one_out,
    )


def parser() -> argparse.ArgumentParser:
    parser = door_parser(__doc__)
    parser.add_argument(
        "--k", nargs="+", type=whole(1), metavar="K", help="of recall@k (default: of 1 5 10 what the gallery has)"
    )
    parser.add_argument("--leave-one-out", action="store_true", help="look for each test image among the others")
    parser.add_argument(
        "--group",
        metavar="EXT",
        help="a label whose value images of one patient, camera, ... share: those of the query's are left out",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
