"""Features of images, as a file for other tools.

    prelude embed runs/mae 'train-{0..9}.tar' --to features.parquet
    prelude embed timm:resnet50 photos/ --kind pool stages --to photos.npz
    deepspeed --module prelude.launch.embed runs/mae 'train-*.tar' \\
        --to features.safetensors

Killed, the same command goes on. What could not be read is listed beside the
file, and the exit code is 4. docs/embedding.md says what the file holds.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse
import sys
from pathlib import Path

from prelude.data.absent import refuse_absent
from prelude.data.counting import counted
from prelude.evaluators.embedding.formats import DTYPES, format_of
from prelude.launch.arguments import (
    KINDS,
    SOURCES,
    add_image,
    add_range,
    add_reading,
    add_select,
    documented_parser,
    offering,
    parse,
    path,
    seed,
    source,
)
from prelude.launch.exit_codes import INCOMPLETE, door
from prelude.pretrain.files import refuse_to_overwrite


def main(argv: list[str] | None = None) -> int:
    args = parse(parser(), argv)
    format_of(args.to)
    refuse_absent(args.shards, "")
    refuse_to_overwrite(args.to, "--to")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from prelude.evaluators.embedding.embed import Embedding, embed
    from prelude.launch.frozen import part_of, reading, say
    from prelude.pretrain import distributed

    common = reading(args, argv)
    columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), disable=not distributed.is_main())
    task = bar.add_task("", total=None)

    def told(done: int, of: int) -> None:
        bar.start()  # a mistake that is found before is told without a bar
        bar.update(task, completed=done, total=of)

    try:
        written = embed(
            Embedding(
                args.source,
                args.shards,
                Path(args.to),
                kinds=args.kind,
                dtype=args.dtype,
                label=args.label or "",
                image=args.image or "",
                select=part_of(args.select),
                value_range=args.range,
                bank=args.bank,
                seed=args.seed,
                say=say,
                told=told,
                **common,
            )
        )
    finally:
        bar.stop()
    distributed.stop()
    if written is None:
        return 0
    widths = ", ".join(f"{kind} of width {width}" for kind, width in written.kinds.items())
    print(f"{written.path}: {counted(f'{written.num_rows:,}', 'image')}, {widths}, {args.dtype}")
    for reason, count in written.left_out.most_common():
        print(f"left out: {count:,} x {reason}, listed in {written.listed}", file=sys.stderr)
    return INCOMPLETE if written.left_out else 0


def parser() -> argparse.ArgumentParser:
    parser = documented_parser(__doc__)
    parser.add_argument("source", type=source, metavar="SOURCE", help=SOURCES)
    parser.add_argument("shards", nargs="+", type=path, metavar="SHARDS", help="shards, or folders of images")
    parser.add_argument(
        "--to",
        required=True,
        type=path,
        metavar="FILE",
        help="a .parquet, .npz, .npy or .safetensors that is not there",
    )
    kind = parser.add_argument(
        "--kind",
        nargs="+",
        metavar="KIND",
        help="cls, mean, last4, last4x2 of a vision transformer; pool, stages, stagesx2, stage2, stage2x4 of others "
        "(default: those that suit the encoder)",
    )
    offering(kind, KINDS)
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help=f"of the features (default: {DTYPES[0]})")
    parser.add_argument(
        "--label", metavar="EXT", help="where the class is: cls, txt, json:FIELD (default: cls, where there are such)"
    )
    parser.add_argument(
        "--bank", type=path, metavar="DIR", help="where features are kept until FILE is there (default: beside it)"
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of random: (default: 0)")
    add_select(parser, "--select", "the shards")
    add_image(parser)
    add_range(parser)
    add_reading(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
