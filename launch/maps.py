"""Pictures of what encoders take for alike, and of where they look.

    prelude maps runs/mae random:runs/mae --images test-0.tar --to maps.png
    prelude maps runs/mae --images pets/ --of cat dog --point 0.4,0.6 --to a.png

For each encoder a row of the principal components of its places as colours, one
of the similarity to the framed place of the first image, and one of its
attention, or of its activations. docs/evaluators.md says how they are computed.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse
from collections.abc import Sequence

from prelude.data.errors import UserError
from prelude.launch.alone import refuse_ranks
from prelude.launch.arguments import (
    ENCODERS,
    Shards,
    add_image,
    add_range,
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
from prelude.pretrain.config import EvaluateConfig
from prelude.pretrain.files import refuse_no_png

COUNT, MOST = 6, 24


def main(argv: list[str] | None = None) -> int:
    args = parse_present(parser(), argv)
    refuse_ranks("maps")
    refuse_no_png(args.to, "--to")
    if len(args.of or ()) > MOST:
        raise UserError(f"A sheet has room for {MOST} images, not {len(args.of)}; name fewer after --of.")
    from prelude.checkpoints.sources import open_encoder
    from prelude.evaluators.dense.correspondence import rows_of, see, sheet
    from prelude.evaluators.dense.samples import chosen_samples, read_samples
    from prelude.evaluators.embedding.embed import index_as_seen
    from prelude.evaluators.features.dense import dense_plan
    from prelude.evaluators.features.extraction import evaluation_plan
    from prelude.evaluators.judging import first_section, refuse_unknown
    from prelude.evaluators.labelled import selection
    from prelude.launch.frozen import part_of, write_result

    refuse_pixels(args.sources)
    refuse_unknown(args.sources)
    section = first_section(args.sources)
    of_section = selection(section.test_select) if section and not args.images else None
    image = args.image or (section and section.image) or ""
    seen_as = {"value_range": args.range, "image": image, "select": part_of(args.select) or of_section}
    named = "--images " if args.images else "evaluate.test_shards="
    index = index_as_seen(args.sources, shards_of(args, section), **seen_as, named=named)
    blocks, told, chosen = [], [], {}
    for name in args.sources:
        opened = open_encoder(name, seed=args.seed)
        channels = opened.config.in_chans
        if channels not in chosen:  # alike in all blocks, as far as their encoders read the same images
            chosen[channels] = chosen_samples(index, args.of, args.count, channels)
        samples = chosen[channels]
        plan = dense_plan(evaluation_plan(opened))
        pixels = read_samples(index, plan, samples.ids)
        seen = see(opened, pixels, plan, point=args.point, kind=args.features or "")
        blocks.append((opened.name, rows_of(pixels, plan, seen, with_attention=True)))
        height, width = seen.grid
        told.append(f"{opened.name}: {seen.kind}, {height} x {width} places")
        if seen.looked:
            told[-1] += f"; {seen.looked.what}"
    from prelude.evaluators.dense.drawing import FILE_BYTES, to_png

    write_result(args.to, to_png(sheet(blocks), FILE_BYTES))
    images = dict.fromkeys(f"images: {', '.join(samples.keys)}" for samples in chosen.values())
    print("\n".join([*images, *told]))
    return 0


def refuse_pixels(sources: Sequence[str]) -> None:
    from prelude.evaluators.features.pixels import is_pixels

    if any(map(is_pixels, sources)):
        raise UserError("pixels has no encoder whose places could be compared, or that looks anywhere; leave it out.")


def shards_of(args: argparse.Namespace, section: EvaluateConfig | None) -> str | Sequence[str]:
    found = args.images or (section and section.test_shards)
    if not found:
        raise UserError(f"There are no images to show {args.sources[0]}; write --images SHARDS, or a folder.")
    return found


def point(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        x = y = -1.0
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is no point; write X,Y from 0,0 (top left) to 1,1, such as 0.5,0.5")
    return x, y


def parser() -> argparse.ArgumentParser:
    parser = documented_parser(__doc__)
    parser.add_argument("sources", nargs="+", type=source, metavar="SOURCE", help=ENCODERS)
    parser.add_argument(
        "--images",
        action=Shards,
        metavar="SHARDS",
        help="shards, or a folder of images (default: the test shards of the run's evaluate section)",
    )
    parser.add_argument("--of", nargs="+", metavar="KEY", help="which images; the first one is pointed at")
    parser.add_argument(
        "--count", type=whole(1, MOST), default=COUNT, metavar="N", help=f"images from all over (default: {COUNT})"
    )
    parser.add_argument(
        "--point", type=point, default=(0.5, 0.5), metavar="X,Y", help="in the first image (default: 0.5,0.5)"
    )
    kinds = "tokens, tokens4 or map, map2 (default: tokens or map)"
    offering(parser.add_argument("--features", metavar="KIND", help=kinds), ("tokens", "tokens4", "map", "map2"))
    parser.add_argument("--to", required=True, type=path, metavar="FILE.png", help="a file that is not there")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of random: (default: 0)")
    add_select(parser, "--select", "the images")
    add_image(parser)
    add_range(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
