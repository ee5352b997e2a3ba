"""See what frozen features are kept, and remove them.

    prelude bank runs/mae            what is in runs/mae/bank
    prelude bank runs/mae --clear    and remove it

Features are made again when an evaluation wants them. Without a folder: those
kept outside of any run.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse
from pathlib import Path

from rich import box
from rich.console import Console

from prelude.evaluators.table_text import PlainTable, print_plain
from prelude.launch.alone import refuse_ranks
from prelude.launch.arguments import documented_parser, parse, path
from prelude.launch.exit_codes import door


def main(argv: list[str] | None = None) -> int:
    args = parse(parser(), argv)
    refuse_ranks("bank")
    from prelude.evaluators.features.bank import Bank
    from prelude.evaluators.judging import BANK, run_of

    console = Console(highlight=False)
    for folder in args.folders or [None]:
        bank = Bank(Path(folder) / BANK if folder and run_of(folder) == Path(folder).absolute() else folder)
        entries = bank.entries()
        size = sum(entry.num_bytes for entry in entries)
        print_plain(console, f"{bank.folder}: {len(entries)} entries, {size / 2**20:,.1f} MiB", soft_wrap=True)
        if args.clear:
            bank.clear()
            console.print("removed")
        elif entries:
            console.print(table_of(entries))
    return 0


def table_of(entries) -> PlainTable:
    table = PlainTable("encoder", "features", "images", "width", "data", "MiB", box=box.SIMPLE)
    for entry in entries:
        about, size = entry.about, f"{entry.num_bytes / 2**20:.1f}"
        if not about:
            table.add_row("never finished", "", "", "", "", size)
            continue
        counts = f"{about['num_samples']:,}", f"{about['width']:,}"
        table.add_row(about["name"], about["kind"], *counts, about["data"][:8], size)
    return table


def parser() -> argparse.ArgumentParser:
    parser = documented_parser(__doc__)
    parser.add_argument("folders", nargs="*", type=path, metavar="DIR", help="runs, or folders given as --bank")
    parser.add_argument("--clear", action="store_true", help="remove all entries, and what was never finished")
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
