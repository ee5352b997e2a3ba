"""`prelude shards pack`: from its arguments to what it tells."""

import argparse
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from prelude.data.class_list import read_classes
from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.data.packing.images import QUALITY
from prelude.data.packing.pack import Packing, pack
from prelude.data.packing.source import SourceOptions
from prelude.evaluators.table_text import PlainTable
from prelude.launch.exit_codes import INCOMPLETE
from prelude.pretrain.distributed import cores_per_rank


def main(args: argparse.Namespace) -> int:
    """Exit code 4 where an image was left out."""
    if args.quality is not None and args.short_side is None:
        raise UserError("--quality has no effect without --short-side, as nothing is re-coded; leave it out.")
    if args.split == "":
        raise UserError("--split is empty; write the name of a split of the source, or leave it out.")
    options = SourceOptions(
        image=args.image,
        label=tuple(args.label),
        label_separator=args.label_separator,
        group=args.group,
        fields=tuple(args.fields),
        split=args.split or "",
        root=args.root,
        classes=read_classes(args.classes) if args.classes else None,
    )
    packing = Packing(
        to=args.to,
        name=(options.one_split or "train") if args.name is None else args.name,
        per_shard=args.per_shard,
        seed=args.seed,
        val_share=args.val_share,
        short_side=args.short_side,
        quality=QUALITY if args.quality is None else args.quality,
        workers=cores_per_rank() if args.workers is None else args.workers,
    )
    packing.check("--split" if options.one_split and args.name is None else "--name")
    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None, visible=False)  # what is refused has no bar

        def told(done: int, of: int) -> None:
            bar.update(task, completed=done, total=of, visible=True)

        summary, notes = pack(args.source, options, packing, told)
    for note in notes:
        print(note, file=sys.stderr)
    _tell(summary, packing)
    return INCOMPLETE if summary["lost"] else 0


def _tell(summary: dict, packing: Packing) -> None:
    table = PlainTable(show_header=False)
    for name, split in summary["splits"].items():
        mib = split["bytes"] / 2**20
        table.add_row(
            name, f"{counted(split['images'], 'image')} in {counted(split['shards'], 'shard')}, {mib:.1f} MiB"
        )
    if summary["classes"]:
        table.add_row("classes", f"{summary['classes']}, in {packing.to}/classes.txt")
    if summary["unlabelled"]:
        table.add_row("without a label", str(summary["unlabelled"]))
    for title, reasons in (("left out", summary["lost"]), ("also noted", summary["remarks"])):
        for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
            table.add_row(title, f"{count} x {reason}")
            title = ""
    Console().print(table)
    if summary["lost"] or summary["remarks"]:
        print(f"each by name: {packing.path('.left_out.jsonl')}")
    for name, split in summary["splits"].items():
        last = split["shards"] - 1
        braces = f"{{000000..{last:06d}}}" if last else "000000"
        print(f"data.shards='{packing.to}/{name}-{braces}.tar'")
