"""Write the features of images to a file that other tools read.

    prelude embed runs/mae photos/ --to photos.parquet
    prelude embed runs/mae 'train-{0..9}.tar' --kind cls last4 --to train.npz
    deepspeed --num_gpus 8 launch/embed.py runs/mae train.tar --to train.safetensors

The ending of --to says what is written: .parquet, .npz or .safetensors, with
key, shard, sample_id, label (where there are labels), and each kind of feature.
Features are kept in the bank on the way: a run that was killed goes on there.
Images that cannot be decoded are listed in FILE.left-out.jsonl.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse
import sys
from pathlib import Path

from prelude.launch.arguments import documented_parser, parse, path, source, value_range
from prelude.launch.exit_codes import door

LABEL = "cls"


def main(argv: list[str] | None = None) -> int:
    args = parse(parser(), argv)
    from prelude.data.errors import UserError
    from prelude.pretrain import distributed

    if args.batch_size < 1 or (args.num_workers or 0) < 0:
        raise UserError("--batch-size must be 1 or more, and --num-workers 0 or more; correct them.")
    from prelude.data.shards import ShardIndex
    from prelude.evaluators.features.bank import Bank
    from prelude.evaluators.features.embedding import check_file, embedded, embedding_of, write_embedding
    from prelude.evaluators.judging import bank_folder, open_source, sections_of
    from prelude.launch.frozen import common

    to = Path(args.to)
    check_file(to)
    settings = common(args, "embed", argv)
    seen_as = args.range or next(filter(None, (part.get("range") for part in sections_of([args.source], "data"))), None)
    index = _labelled(ShardIndex, args, seen_as)
    encoder = open_source(args.source, [args.source], args.seed)
    bank = Bank(args.bank or bank_folder(args.source, [args.source]))
    reading = {"batch_size": settings["batch_size"], "num_workers": settings["num_workers"]}
    with _progress(index.num_samples) as bar:
        task = bar.add_task("features", total=index.num_samples)
        ranks = distributed.world_size()
        rows, ids = embedded(
            bank,
            encoder,
            index,
            args.kind,
            device=distributed.device(),
            seen=lambda count: bar.advance(task, count * ranks),
            **reading,
        )
        bar.update(task, completed=index.num_samples)
    if distributed.is_main():
        embedding, missing = embedding_of(rows, ids, encoder, index, args.source)
        write_embedding(embedding, to, args.dtype)
        _tell(embedding, missing, to, args.dtype)
    distributed.stop()
    return 0


def _labelled(make, args: argparse.Namespace, seen_as):
    """The index with its labels. Those that were asked for must be there; without a wish, those that happen to be."""
    from prelude.data.labels import no_label

    index = make(args.shards[0] if len(args.shards) == 1 else args.shards, args.label or LABEL, seen_as)
    if args.label and not (index.labels[:, 0] >= 0).any():
        raise no_label(index)
    return index


def _progress(total: int):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from prelude.pretrain import distributed

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not (distributed.is_main() and console.is_terminal))


def _tell(embedding, missing, to: Path, dtype: str) -> None:
    from prelude.evaluators.features.embedding import write_left_out

    kinds = ", ".join(f"{kind} ({embedding.width(kind)})" for kind in embedding.parts)
    print(f"{to}: {len(embedding):,} images, {kinds}, {dtype}")
    listed = to.with_name(f"{to.name}.left-out.jsonl")
    if not missing:
        listed.unlink(missing_ok=True)
        return
    write_left_out(missing, listed)
    first = missing[0]
    print(
        f"{len(missing):,} images are left out (the first: {first.key} in {first.shard}, {first.reason}); all are "
        f"listed in {listed}",
        file=sys.stderr,
    )


def parser() -> argparse.ArgumentParser:
    parser = documented_parser(__doc__)
    parser.add_argument("source", type=source, metavar="SOURCE", help="a run, an export, timm:NAME, pixels:32, ...")
    parser.add_argument("shards", nargs="+", type=path, metavar="SHARDS", help="shards, or a folder of images")
    parser.add_argument("--to", required=True, type=path, metavar="FILE", help=".parquet, .npz or .safetensors")
    parser.add_argument(
        "--kind", nargs="+", metavar="KIND", help="cls, mean, last4; pool, stages, stage2 (default: what suits)"
    )
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="(default: float32)")
    parser.add_argument("--label", metavar="EXT", help="extension of the class number (default: cls, if there)")
    parser.add_argument("--range", type=value_range, metavar="LOW,HIGH", help="of 16-bit images, or auto")
    parser.add_argument("--bank", type=path, metavar="DIR", help="where features are kept (default: RUN/bank)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of random: (default: 0)")
    parser.add_argument("--num-workers", type=int, metavar="N", help="processes that read images")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="(default: 256)")
    parser.add_argument("--timeout-seconds", type=float, metavar="N", help="for images (default: 300)")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher adds it; the environment says more
    parser.set_defaults(seeds=1, out=None)
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
