"""What `prelude shards` is told on the command line. Nothing here imports torch."""

import argparse

from prelude.launch.arguments import (
    add_cache,
    add_image,
    documented_parser,
    finite,
    offering,
    path,
    seed,
    value_range,
    whole,
)

_QUALITY = 90  # of JPEGs, where nothing else is asked for


def shards_parser(doc: str) -> argparse.ArgumentParser:
    parser = documented_parser(doc)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_pack(actions.add_parser("pack", help="make shards of a folder, a table, a dataset, or other shards"))
    about = actions.add_parser("info", help="what there is: counts, sizes, channels, classes, mean, and damage")
    _add_shards(about)
    about.add_argument(
        "--images", type=whole(0), default=1000, metavar="N", help="to decode; 0 for none (default: 1000)"
    )
    check = actions.add_parser("verify", help="decode every image; list what is undecodable or there twice")
    _add_shards(check)
    check.add_argument("--to", type=path, metavar="FILE", help="where all that is found goes, a JSON object a line")
    sheet = actions.add_parser("peek", help="draw a sheet of what an objective sees after augmentation")
    sheet.add_argument("shards", nargs="+", metavar="SHARDS", help="a folder of images, or paths, URLs, braces, *, ::")
    sheet.add_argument("--to", type=path, default="peek.png", metavar="FILE", help="the picture (default: peek.png)")
    sheet.add_argument("--config", type=path, metavar="RECIPE", help="whose views are drawn (default: whole images)")
    sheet.add_argument(
        "--set", nargs="+", default=[], metavar="key.sub=value", help="settings that replace the config's"
    )
    sheet.add_argument("--count", type=int, default=8, metavar="N", help="images (default: 8)")
    sheet.add_argument("--seed", type=seed, default=0, metavar="N", help="of the order and the views (default: 0)")
    add_image(sheet)
    add_cache(sheet)
    listing = actions.add_parser("index", help="write the index file that lies beside shards behind a URL")
    listing.add_argument("shards", nargs="+", metavar="SHARDS", help="paths, URLs, braces, *, ::")
    listing.add_argument("--to", required=True, type=path, metavar="DIR", help="where the file goes")
    add_cache(listing)
    _add_shapes(actions.add_parser("shapes", help="write the embedded data set of shapes"))
    return parser


def _add_shards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="a folder of images, or paths, URLs, braces, *, ::")
    parser.add_argument("--label", default="", metavar="EXT", help="extension of a label's member (default: cls)")
    parser.add_argument("--workers", type=whole(1), metavar="N", help="threads that decode (default: the cores)")
    there = "of an image (default: 3, or what images have that cannot be RGB)"
    parser.add_argument("--channels", type=whole(1), metavar="N", help=there)
    values = "values of deep images that are black and white, or auto"
    offering(parser.add_argument("--range", type=value_range, metavar="LOW,HIGH", help=values), ["auto"])
    add_image(parser)
    add_cache(parser)


def _add_pack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=path, metavar="SOURCE", help="what there is; docs/data.md says what it may be")
    parser.add_argument("--to", required=True, type=path, metavar="DIR", help="where the shards go")
    parser.add_argument("--name", metavar="WORD", help="how shards are called (default: the split, or train)")
    parser.add_argument("--per-shard", type=int, default=1000, metavar="N", help="samples (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the order (default: 0)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: the cores)")
    smaller = parser.add_argument_group("smaller images, which decode faster")
    smaller.add_argument("--short-side", type=int, metavar="PIXELS", help="of images that are larger; as JPEG")
    smaller.add_argument("--quality", type=int, metavar="Q", help=f"of these JPEGs, 1 to 100 (default: {_QUALITY})")
    split = parser.add_argument_group("train and val")
    split.add_argument("--val-share", type=finite, default=0.0, metavar="SHARE", help="of images that go to val-*.tar")
    split.add_argument("--group", default="", metavar="FIELD", help="whose images are on one side, such as a patient")
    split.add_argument("--split", metavar="NAME", help="of a source that has several, such as test; or all")
    found = parser.add_argument_group("what is where in the source")
    found.add_argument("--image", default="", metavar="NAME", help="column, array or member of the image")
    labels = "columns, array or member of the label; parent or top for folders; none for no label"
    found.add_argument("--label", nargs="+", default=[], metavar="NAME", help=labels)
    found.add_argument("--label-separator", default="", metavar="C", help="between the labels of one column")
    found.add_argument("--fields", nargs="+", default=[], metavar="NAME", help="columns to keep, in a .json member")
    found.add_argument("--root", type=path, default="", metavar="DIR", help="of a table's paths (default: its folder)")
    found.add_argument(
        "--classes", type=path, metavar="FILE", help="class names, one a line, in order of their numbers"
    )


def _add_shapes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", required=True, type=path, metavar="DIR", help="where the shards go")
    parser.add_argument("--num-train", type=int, default=4000, metavar="N", help="(default: 4000)")
    parser.add_argument("--num-test", type=int, default=1000, metavar="N", help="(default: 1000)")
    parser.add_argument("--image-size", type=int, default=48, metavar="PIXELS", help="(default: 48)")
    parser.add_argument("--depth", type=whole(1), metavar="SLICES", help="of volumes, which are written instead")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
