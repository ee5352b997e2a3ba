"""Make shards, and look at them before training on them.

    prelude shards pack photos --to shards
    prelude shards info 'train-{000000..000019}.tar'
    prelude shards verify 'train-{000000..000019}.tar'
    prelude shards peek photos --config mae_cifar10
    prelude shards index 's3://bucket/train-{000000..000019}.tar' --to .
    prelude shards shapes --to data/shapes

`pack` makes shards of a folder, a table, a dataset, or other shards; `info`
says how many samples there are, what they are like, and what is wrong with
which; `verify` decodes every image and finds duplicates; `peek` draws what an
objective sees; `index` writes the file that spares others a pass over
remote shards; `shapes` writes the embedded data set.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse

from prelude.data.absent import refuse_absent
from prelude.data.counting import counted
from prelude.launch.alone import refuse_ranks
from prelude.launch.arguments import with_settings_once
from prelude.launch.exit_codes import door
from prelude.launch.shards_arguments import shards_parser


def main(argv: list[str] | None = None) -> int:
    args = with_settings_once(parser().parse_args(argv))
    refuse_ranks("shards")
    refuse_absent(getattr(args, "shards", ()), "")
    if args.action == "pack":
        from prelude.launch.packing import main as action
    elif args.action == "peek":
        from prelude.launch.peek import peek as action
    elif args.action == "shapes":
        action = shapes
    else:
        from prelude.launch import inspection

        action = {"info": inspection.info, "verify": inspection.verify, "index": inspection.index_file}[args.action]
    if hasattr(args, "cache_dir"):
        from prelude.data.remote_shards import keep_remote_shards

        keep_remote_shards(args.cache_dir, args.cache_gib)
    return action(args)


def shapes(args: argparse.Namespace) -> int:
    from prelude.data.shape_volumes import write_volumes
    from prelude.data.shapes import write_shards

    for split, count in (("train", args.num_train), ("test", args.num_test)):
        if args.depth:
            size = (args.image_size, args.image_size, args.depth)
            what, paths = "volumes", write_volumes(args.to, split, count, seed=args.seed, size=size)
        else:
            what, paths = "images", write_shards(args.to, split, count, seed=args.seed, image_size=args.image_size)
        print(f"{count} {split} {what} in {counted(len(paths), 'shard')}: {paths[0]} ...")
    return 0


def parser() -> argparse.ArgumentParser:
    return shards_parser(__doc__)


if __name__ == "__main__":
    raise SystemExit(door(main))
