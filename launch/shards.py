"""Make shards, and look at them before training on them.

prelude shards pack photos --to shards                of a folder, a table, a dataset, or other shards
prelude shards info 'train-{000000..000019}.tar'      how many samples, and what is wrong with which
prelude shards shapes --to data/shapes                write the embedded data set
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse

from rich.console import Console
from rich.table import Table

from prelude.data.shapes import write_shards
from prelude.data.shards import ShardIndex
from prelude.launch import packing
from prelude.launch.arguments import documented_parser
from prelude.launch.exit_codes import door

_MOST_PROBLEMS = 20


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.action == "pack":
        return packing.main(args)
    if args.action == "info":
        return info(args.shards, args.label)
    for split, count in (("train", args.num_train), ("test", args.num_test)):
        paths = write_shards(args.to, split, count, seed=args.seed, image_size=args.image_size)
        print(f"{count} {split} images in {len(paths)} shards: {paths[0]} ...")
    return 0


def info(shards: str, label: str) -> int:
    """Prints what the index says; exit code 1 where something is wrong, for scripts."""
    index = ShardIndex(shards, label)
    table = Table(show_header=False)
    table.add_row("shards", str(index.num_shards))
    table.add_row("samples", str(index.num_samples))
    table.add_row("samples a shard", f"{index.counts.min()} to {index.counts.max()}")
    table.add_row("bytes an image", f"{index.images[:, 1].mean():.0f} on average, {index.images[:, 1].max()} at most")
    if label:
        table.add_row(f"with .{label}", str(int((index.labels[:, 1] > 0).sum())))
    table.add_row("fingerprint", index.fingerprint)
    table.add_row("problems", str(index.num_problems))
    Console().print(table)
    listed = [
        f"{path}: {problem.reason} at {problem.where}" for path, found in index.problems.items() for problem in found
    ]
    for line in listed[:_MOST_PROBLEMS]:
        print(line)
    if len(listed) > _MOST_PROBLEMS:
        print(f"... and {len(listed) - _MOST_PROBLEMS} more")
    return 1 if listed else 0


def parser() -> argparse.ArgumentParser:
    parser = documented_parser(__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    packing.add_arguments(actions.add_parser("pack", help=packing.ABOUT))
    about = actions.add_parser("info", help="count samples and list damage, from the tars' headers")
    about.add_argument("shards", metavar="SHARDS", help="path, braces, * or a list joined by ::")
    about.add_argument("--label", default="", metavar="EXT", help="extension of a label's member, to count it too")
    shapes = actions.add_parser("shapes", help="write the embedded data set of shapes")
    shapes.add_argument("--to", required=True, metavar="DIR", help="where the shards go")
    shapes.add_argument("--num-train", type=int, default=4000, metavar="N", help="(default: 4000)")
    shapes.add_argument("--num-test", type=int, default=1000, metavar="N", help="(default: 1000)")
    shapes.add_argument("--image-size", type=int, default=48, metavar="PIXELS", help="(default: 48)")
    shapes.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
