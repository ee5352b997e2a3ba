"""Segmentation by frozen encoders: a linear head, and the nearest patches.

    prelude segment runs/mae random:runs/mae pixels \\
        --train 'train-{0..9}.tar' --test test-0.tar
    prelude segment runs/mae --label mask.png --ignore 0 --features tokens4
    prelude segment runs/mae --pictures segmented.png

Masks are members beside the images, such as a .png beside a .jpg: a class
number for each pixel, 255 for what counts for nothing. Several sources give one
table; each result is also written as JSON.
docs/evaluators.md says how it is measured.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse
from functools import partial

from prelude.evaluators.defaults import TEMPERATURE, K
from prelude.launch.arguments import above_zero, door_parser, parse_present, path, whole
from prelude.launch.exit_codes import door
from prelude.pretrain.files import refuse_no_png

LABEL, SHOWN = "png", 8


def main(argv: list[str] | None = None) -> int:
    args = parse_present(parser(), argv)
    if args.pictures:
        refuse_no_png(args.pictures, "--pictures")
    from prelude.evaluators.dense.segmentation import segment_knn, segment_linear
    from prelude.launch.frozen import labelled_of, settings_of
    from prelude.launch.place_sheets import judge_and_draw
    from prelude.launch.segment_maps import SegmentJudging

    args.label = args.label or LABEL
    labelled = labelled_of(args)
    named = {"names": labelled.classes}
    nearest = partial(segment_knn, k=args.k, temperature=args.temperature, **named)
    judged = {"linear": partial(segment_linear, **named), "knn": nearest}
    judging = SegmentJudging(
        [judged[name] for name in dict.fromkeys(args.heads)],
        labelled,
        ignored=args.ignore,
        num_shown=SHOWN if args.pictures else 0,
        **settings_of(args, "segment", argv),
    )
    return judge_and_draw(args, judging)


def parser() -> argparse.ArgumentParser:
    label = f"extension of the masks (default: {LABEL})"
    features = "tokens, tokens4 of a vision transformer; map, map2 of others (default: tokens or map)"
    parser = door_parser(__doc__, label=label, features=features)
    parser.add_argument(
        "--heads", nargs="+", choices=("linear", "knn"), default=["linear", "knn"], help="(default: linear knn)"
    )
    parser.add_argument(
        "--ignore",
        nargs="+",
        type=whole(0, 255),
        default=[],
        metavar="CLASS",
        help="classes that count for nothing, beside 255",
    )
    parser.add_argument("--k", type=whole(1), default=K, metavar="K", help=f"nearest patches (default: {K})")
    parser.add_argument(
        "--temperature", type=above_zero, default=TEMPERATURE, metavar="T", help=f"(default: {TEMPERATURE})"
    )
    parser.add_argument("--pictures", type=path, metavar="FILE.png", help=f"what is predicted of {SHOWN} test images")
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
