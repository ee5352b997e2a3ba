"""Say what this machine offers, and what is wrong with it.

    prelude doctor
    prelude doctor --json > doctor.json
    srun --ntasks-per-node 1 prelude doctor

Versions, devices, launch variables, shared memory, limits, folders; below them,
in a sentence each, what would slow a run down or end it, and what to do. The
packages that compute are loaded in a process of their own, so that one that is
broken is named. Of several ranks on a machine the first one speaks.
Exit codes: 0 nothing is wrong, 1 something is.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse
import json
import platform
import sys
from collections.abc import Iterable, Iterator

from prelude.data.counting import counted
from prelude.launch import installed, machine
from prelude.launch.arguments import documented_parser, parse
from prelude.launch.exit_codes import door
from prelude.launch.finding import Finding

_TITLE_WIDTH = 14


def main(argv: list[str] | None = None) -> int:
    args = parse(parser(), argv)
    if not machine.speaks_for_its_host():
        return 0
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # a path or a variable may be no text, or none of this terminal
    found = findings()
    return tell_as_json(found) if args.json else tell(found)


def findings() -> Iterator[Finding]:
    """One after another, as they are found: what takes long comes last, and is begun first."""
    with installed.Loading() as loading:
        yield from installed.versions()
        yield from machine.findings()
        yield from loading.findings()


def tell(found: Iterable[Finding]) -> int:
    print(f"{'host':<{_TITLE_WIDTH}}{platform.node()}", flush=True)
    wrong = []
    for finding in found:
        first, *others = finding.found
        print(f"{finding.title:<{_TITLE_WIDTH}}{first}")
        for line in others:
            print(f"{'':<{_TITLE_WIDTH}}{line}")
        print(end="", flush=True)
        wrong += finding.wrong
    if not wrong:
        print("\nNothing is wrong.")
        return 0
    print(f"\n{counted(len(wrong), 'thing')} {'is' if len(wrong) == 1 else 'are'} wrong:")
    for number, sentence in enumerate(wrong, 1):
        print(f"{number}. {sentence}")
    return 1


def tell_as_json(found: Iterable[Finding]) -> int:
    found = list(found)
    listed = [{"title": one.title, "found": one.found, "wrong": one.wrong} for one in found]
    print(json.dumps({"host": platform.node(), "findings": listed}, indent=2))
    return int(any(one.wrong for one in found))


def parser() -> argparse.ArgumentParser:
    parser = documented_parser(__doc__)
    parser.add_argument("--json", action="store_true", help="the same for a program")
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
