"""Where images depart from normal ones, by frozen encoders: maps of anomalies.

    prelude defects runs/mae random:runs/mae \\
        --train 'good-*.tar' --test test-0.tar --label defect.png
    prelude defects runs/mae --features map1 map2 map3 --pictures found.png

Train images are normal; masks of the test images say where a defect is, and an
image without one has none. A Gaussian for each place, and for a run of MAE what
it fills in wrongly. Several sources give one table; each result is also written
as JSON. docs/evaluators.md says how it is measured.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse

from prelude.launch.arguments import door_parser, parse_present, path, whole
from prelude.launch.exit_codes import door
from prelude.pretrain.files import refuse_no_png

LABEL, MASKS, SHOWN = "png", 16, 8


def main(argv: list[str] | None = None) -> int:
    args = parse_present(parser(), argv)
    if args.pictures:
        refuse_no_png(args.pictures, "--pictures")
    from prelude.launch.defect_maps import DefectJudging
    from prelude.launch.frozen import labelled_of, settings_of
    from prelude.launch.place_sheets import judge_and_draw

    args.label = args.label or LABEL
    judging = DefectJudging(
        (),
        labelled_of(args),
        of_defects=True,
        num_masks=args.masks,
        num_shown=SHOWN if args.pictures else 0,
        **settings_of(args, "defects", argv),
    )
    return judge_and_draw(args, judging)


def parser() -> argparse.ArgumentParser:
    label = f"extension of the masks of defects (default: {LABEL})"
    features = "levels: tokens, tokens4 of a vision transformer; map1 map2 of others (default: tokens or map)"
    parser = door_parser(__doc__, label=label, features=features)
    parser.add_argument(
        "--masks", type=whole(1), default=MASKS, metavar="N", help=f"that a run of MAE fills in (default: {MASKS})"
    )
    parser.add_argument("--pictures", type=path, metavar="FILE.png", help=f"maps of {SHOWN} images with a defect")
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
