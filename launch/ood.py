"""Are images of other kinds told from known classes by frozen encoders?

    prelude ood runs/mae random:runs/mae pixels \\
        --train 'train-{0..9}.tar' --test test-0.tar --others 'other-*.tar'
    prelude ood runs/mae --unknown 8 9

Others are another data set's images, or classes that train goes without. Three
scores: Mahalanobis by class, the nearest neighbours, mixtures of each class.
Several sources give one table; each result is also written as JSON.
docs/evaluators.md says how it is measured.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse
from functools import partial

from prelude.launch.arguments import Shards, door_parser, parse_present, whole
from prelude.launch.exit_codes import door


def main(argv: list[str] | None = None) -> int:
    args = parse_present(parser(), argv)
    from prelude.evaluators.frozen.outlier_judging import OutlierJudging
    from prelude.evaluators.frozen.outliers import COMPONENTS, SCORES, outliers
    from prelude.launch.frozen import judge_by, labelled_of, settings_of

    settings = {"unknown": args.unknown, "k": args.k, "components": args.components or COMPONENTS}
    judging = OutlierJudging(
        [partial(outliers, score=score, **settings) for score in SCORES],
        labelled_of(args),
        others=args.others,
        **settings_of(args, "ood", argv),
    )
    return judge_by(args, judging)


def parser() -> argparse.ArgumentParser:
    parser = door_parser(__doc__)
    parser.add_argument(
        "--others",
        action=Shards,
        metavar="SHARDS",
        help="images that are none of the classes; their labels are not read",
    )
    parser.add_argument(
        "--unknown", nargs="+", type=int, default=[], metavar="CLASS", help="classes that train is to go without"
    )
    parser.add_argument(
        "--k", type=whole(1), metavar="K", help="which of the nearest is meant (default: 50, or the last of fewer)"
    )
    parser.add_argument("--components", type=whole(1, 100), metavar="M", help="Gaussians a class (default: 4)")
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
