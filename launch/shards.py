"""Make shards, and look at them before training on them.

prelude shards pack photos --to shards                of a folder, a table, a dataset, or other shards
prelude shards info 'train-{000000..000019}.tar'      counts, sizes, classes, mean, and what is wrong with which
prelude shards verify 'train-{000000..000019}.tar'    decode every image; damage and duplicates
prelude shards peek photos --config mae_cifar10       a sheet of what the objective sees
prelude shards shapes --to data/shapes                write the embedded data set
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse

from prelude.data.shapes import write_shards
from prelude.launch import inspection, packing
from prelude.launch.arguments import documented_parser
from prelude.launch.exit_codes import door


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.action == "peek":
        from prelude.launch.peek import peek  # here: only what draws needs objectives

        return peek(args)
    found = {"pack": packing.main, "info": inspection.info, "verify": inspection.verify}
    if args.action in found:
        return found[args.action](args)
    for split, count in (("train", args.num_train), ("test", args.num_test)):
        paths = write_shards(args.to, split, count, seed=args.seed, image_size=args.image_size)
        print(f"{count} {split} images in {len(paths)} shards: {paths[0]} ...")
    return 0


def parser() -> argparse.ArgumentParser:
    parser = documented_parser(__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    packing.add_arguments(actions.add_parser("pack", help=packing.ABOUT))
    inspection.add_arguments(actions)
    sheet = actions.add_parser("peek", help="draw a sheet of what an objective sees after augmentation")
    inspection.add_shards(sheet)
    sheet.add_argument("--to", default="peek.png", metavar="FILE", help="the picture (default: peek.png)")
    sheet.add_argument("--config", metavar="RECIPE", help="whose views are drawn (default: the images themselves)")
    sheet.add_argument("--count", type=int, default=8, metavar="N", help="images (default: 8)")
    sheet.add_argument("--seed", type=int, default=0, metavar="N", help="of the order and the views (default: 0)")
    sheet.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the config's")
    shapes = actions.add_parser("shapes", help="write the embedded data set of shapes")
    shapes.add_argument("--to", required=True, metavar="DIR", help="where the shards go")
    shapes.add_argument("--num-train", type=int, default=4000, metavar="N", help="(default: 4000)")
    shapes.add_argument("--num-test", type=int, default=1000, metavar="N", help="(default: 1000)")
    shapes.add_argument("--image-size", type=int, default=48, metavar="PIXELS", help="(default: 48)")
    shapes.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
