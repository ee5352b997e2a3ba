"""The nearest images of given ones, out of a file that prelude embed has made.

    prelude neighbours photos.parquet --of cats/1.jpg dogs/7.jpg --to sheet.png
    prelude neighbours train.npz --of new.jpg --source runs/mae --k 20

An image is given by its key in the file (SHARD.tar:KEY where several have it),
or as a file, which --source encodes. The search is exact, by cosine. --to draws
a contact sheet, with a row an image, from the shards that the file names.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse
import difflib
import os
from pathlib import Path

from prelude.launch.arguments import documented_parser, parse, path, source
from prelude.launch.exit_codes import door

SIDE = 128  # pixels of a picture in the sheet
MOST_TITLE = 20  # characters above one


def main(argv: list[str] | None = None) -> int:
    args = parse(parser(), argv)
    from prelude.data.errors import UserError

    if args.to and Path(args.to).suffix.lower() != ".png":
        raise UserError(f"--to {args.to} is no PNG; write the name of a .png file.")
    from prelude.evaluators.features.embedding import read_embedding
    from prelude.evaluators.frozen.neighbours import Pictures, nearest

    read = read_embedding(Path(args.file), args.kind)
    queries = _queries(read, args.of, args.source)
    found = nearest(read, queries, args.k, args.centred)
    _print(read, queries, found)
    if args.to:
        _draw(read, Pictures(read), queries, found, Path(args.to))
    return 0


def _queries(read, names: list[str], source_name: str | None) -> list:
    from prelude.checkpoints.sources import open_encoder
    from prelude.data.errors import UserError
    from prelude.evaluators.features.pixels import is_pixels, open_pixels
    from prelude.evaluators.frozen.neighbours import Query, image_query, row_of

    queries, encoder = [], None
    for name in names:
        row = row_of(read, name)
        if row is not None:
            queries.append(Query(name, read.values[row], row))
            continue
        if not os.path.isfile(name):
            near = difflib.get_close_matches(name, read.keys[:10000], 1)
            hint = f"did you mean {near[0]}?" if near else f"keys look like {read.keys[0]}."
            raise UserError(f"{name} is neither a key of the file nor an image file; {hint}")
        if not source_name:
            raise UserError(
                f"{name} is no key of the file, and as an image it needs an encoder; write --source "
                f"{read.about['source']}."
            )
        encoder = encoder or (open_pixels if is_pixels(source_name) else open_encoder)(source_name)
        queries.append(image_query(read, name, encoder))
    return queries


def _print(read, queries, found) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    labelled = read.labels is not None
    table = Table("of", "rank", "cosine", "key", "shard", *(["label"] if labelled else []), box=box.SIMPLE)
    for query, neighbours in zip(queries, found, strict=True):
        for rank, one in enumerate(neighbours, start=1):
            label = [str(read.labels[one.row]) if read.labels[one.row] >= 0 else ""] if labelled else []
            shard = os.path.basename(read.shards[one.row])
            first = query.name if rank == 1 else ""
            table.add_row(first, str(rank), f"{one.cosine:.4f}", read.keys[one.row], shard, *label)
    Console(highlight=False, markup=False).print(table)


def _draw(read, pictures, queries, found, to: Path) -> None:
    import io

    from prelude.data.decode import BadImage
    from prelude.data.errors import UserError
    from prelude.objectives.patch_pictures import page
    from prelude.pretrain.files import reason, write_whole

    rows = []
    try:
        for query, neighbours in zip(queries, found, strict=True):
            own = pictures.of_row(query.row) if query.image is None else pictures.decoded(query.image)
            panels = [(_short(os.path.basename(query.name)), _framed(own))]
            for one in neighbours:
                title = f"{one.cosine:.3f} {os.path.basename(read.keys[one.row])}"
                panels.append((_short(title), _framed(pictures.of_row(one.row))))
            rows.append(panels)
    except BadImage as error:
        raise UserError(f"A picture can no longer be read ({error}); embed the images again.") from None
    content = io.BytesIO()
    page(rows).save(content, "PNG")
    try:
        write_whole(to, content.getvalue())
    except OSError as error:
        raise UserError(
            f"--to {to} cannot be written ({reason(error)}); write a file in a folder that is there."
        ) from None
    print(to)


def _short(title: str) -> str:
    title = title.encode("ascii", "replace").decode()  # the sheet's font has no more
    return title if len(title) <= MOST_TITLE else title[: MOST_TITLE - 2] + ".."


def _framed(picture):
    """Fitted into a square, its shape kept; small ones are enlarged without smoothing."""
    from PIL import Image

    factor = SIDE / max(picture.size)
    size = tuple(max(1, round(side * factor)) for side in picture.size)
    fitted = picture.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)
    square = Image.new("RGB", (SIDE, SIDE), "white")
    square.paste(fitted, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return square


def parser() -> argparse.ArgumentParser:
    parser = documented_parser(__doc__)
    parser.add_argument("file", type=path, metavar="FILE", help="written by prelude embed")
    parser.add_argument("--of", nargs="+", required=True, type=path, metavar="KEY|IMAGE", help="keys or image files")
    parser.add_argument("--source", type=source, metavar="SOURCE", help="the encoder that made FILE, for image files")
    parser.add_argument("--kind", metavar="KIND", help="of feature (default: the first in FILE)")
    parser.add_argument("--k", type=int, default=10, metavar="N", help="neighbours (default: 10)")
    parser.add_argument("--centred", action="store_true", help="take off the mean of FILE before the cosine")
    parser.add_argument("--to", type=path, metavar="PNG", help="a contact sheet")
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
