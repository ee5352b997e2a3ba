"""The images that are nearest to given ones by their features.

    prelude neighbours features.parquet --of 000123 photo.jpg --sheet near.png
    prelude neighbours runs/mae --shards 'train-{0..9}.tar' --of 000123

Out of a file of `prelude embed`, or of the bank of a source, which makes what
it lacks. Nearest by cosine; every image is compared. More: docs/embedding.md.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse
import csv
import io
from collections.abc import Sequence
from pathlib import Path

from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.launch.arguments import (
    KINDS,
    Shards,
    add_image,
    add_range,
    add_reading,
    add_select,
    documented_parser,
    offering,
    parse_present,
    path,
    seed,
    source,
    whole,
)
from prelude.launch.exit_codes import door
from prelude.pretrain.files import refuse_to_overwrite

COLUMNS = ("query", "rank", "cosine", "key", "label", "shard")


def main(argv: list[str] | None = None) -> int:
    args = parse_present(parser(), argv)
    for option, place, ending in (("--sheet", args.sheet, ".png"), ("--out", args.out, ".csv")):
        if place and Path(place).suffix.lower() != ending:
            raise UserError(f"{option} {place} does not end in {ending}; write {Path(place).stem}{ending}.")
        if place:
            refuse_to_overwrite(place, option)
    from prelude.evaluators.embedding.neighbours import index_of, nearest, queries_among, vectors_of
    from prelude.evaluators.embedding.sheet import contact_sheet
    from prelude.launch.frozen import write_result
    from prelude.pretrain import distributed

    embedded, encoder = opened(args, argv)
    distributed.stop()  # ranks share the encoder's work, and no other
    if not distributed.is_main():
        return 0
    queries = queries_among(embedded, args.of)
    if encoder is None and any(query.path for query in queries):
        encoder = encoder_of(args, embedded)
    found = nearest(embedded, queries, vectors_of(embedded, queries, encoder), args.k)
    rows = list(table_rows(embedded, found))
    if args.out:
        text = io.StringIO(newline="")
        csv.writer(text).writerows([COLUMNS, *rows])
        write_result(args.out, text.getvalue())
    show(rows, f"nearest of {counted(f'{len(embedded):,}', 'image')} by {embedded.kind} features, cosine")
    if args.sheet:
        write_result(args.sheet, contact_sheet(embedded, index_of(embedded, args.shards), found))
    return 0


def opened(args: argparse.Namespace, argv: Sequence[str] | None):
    """The set, and the encoder where it had to be opened."""
    from prelude.evaluators.embedding.neighbours import embedded_of
    from prelude.evaluators.embedding.reading import is_embedding, read
    from prelude.evaluators.judging import bank_folder, open_source
    from prelude.launch.frozen import part_of, reading

    common = reading(args, argv)
    if is_embedding(args.features):
        for option in ("select", "image", "range", "bank", "seed"):
            if getattr(args, option) not in (None, ""):
                raise UserError(f"--{option} has no effect beside a file, which has its features; leave it out.")
        return read(args.features, args.kind), None
    if not args.shards:
        raise UserError(
            f"{args.features} is no file of features; write one that `prelude embed` has made, or --shards with the "
            f"images that this source is to see."
        )
    if args.encoder:
        raise UserError(f"--encoder has no effect beside {args.features}, which is one; leave it out.")
    encoder = open_source(args.features, [args.features], args.seed or 0)
    bank = args.bank or bank_folder(args.features, [args.features])
    seen_as = {"value_range": args.range, "image": args.image or "", "select": part_of(args.select)}
    images = {"kind": args.kind, **seen_as, **common}
    return embedded_of(encoder, args.features, args.shards, bank, **images), encoder


def encoder_of(args: argparse.Namespace, embedded):
    """That of the file, wherever it lies now."""
    from prelude.evaluators.judging import open_source

    about = embedded.about
    name = args.encoder or about.get("source", "")
    try:
        return open_source(name, [name], about.get("seed", 0))
    except UserError as error:
        if args.encoder:
            raise
        raise UserError(
            f"{embedded.name} was made by {name}, which cannot be opened ({error}); write --encoder with where it is."
        ) from None


def table_rows(embedded, found):
    for one in found:
        for rank, (row, cosine) in enumerate(zip(one.rows, one.cosines, strict=True), start=1):
            label = "" if embedded.labels is None or embedded.labels[row] < 0 else int(embedded.labels[row])
            shard = embedded.shards[embedded.shard[row]]
            yield one.query.name, rank, f"{cosine:.6f}", embedded.keys[row], label, shard


def show(rows: Sequence[tuple], title: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from prelude.evaluators.table_text import folded, print_whole

    labelled = any(row[COLUMNS.index("label")] != "" for row in rows)
    names = [name for name in COLUMNS if name != "label" or labelled]
    cells = [dict(zip(COLUMNS, map(str, row), strict=True)) for row in rows]
    for row in cells:
        row |= {"shard": Path(row["shard"]).name, "query": row["query"] if row["rank"] == "1" else ""}

    def build(width: int) -> Table:
        table = Table(box=box.SIMPLE, title=title)
        for name in names:
            table.add_column(name, no_wrap=True)
        for row in cells:
            table.add_row(*(Text(folded(row[name], width)) for name in names))
        return table

    console = Console(highlight=False)
    if not console.is_terminal:  # another program reads the keys
        console.width = 10_000
    print_whole(console, build, [row[name] for row in cells for name in names])


def parser() -> argparse.ArgumentParser:
    parser = documented_parser(__doc__)
    parser.add_argument(
        "features", type=source, metavar="FEATURES", help="a file of features, or a source as evaluations take it"
    )
    parser.add_argument(
        "--of",
        required=True,
        nargs="+",
        type=path,
        metavar="IMAGE",
        help="keys (SHARD.tar:KEY where several shards have it), or image files",
    )
    parser.add_argument(
        "--shards",
        action=Shards,
        metavar="SHARDS",
        help="the images: those that a source is to see, or where those of a file are now",
    )
    add_select(parser, "--select", "the shards that a source is to see")
    add_image(parser)
    parser.add_argument("--k", type=whole(1), default=8, metavar="K", help="neighbours (default: 8)")
    offering(parser.add_argument("--kind", metavar="KIND", help="of feature (default: the first)"), KINDS)
    parser.add_argument("--sheet", type=path, metavar="FILE.png", help="a contact sheet of the images")
    parser.add_argument("--out", type=path, metavar="FILE.csv", help="the table as a file")
    parser.add_argument(
        "--encoder", type=source, metavar="SOURCE", help="what made the file, for image files (default: as it says)"
    )
    parser.add_argument("--bank", type=path, metavar="DIR", help="where features of a source are (default: RUN/bank)")
    parser.add_argument("--seed", type=seed, metavar="N", help="of random: (default: 0)")
    add_range(parser)
    add_reading(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
