"""Tables in a terminal: names break between their parts and never within one, and nothing is cut.

- A table that no width of names fits in is as wide as it has to be.
- Names of files and classes, settings and reasons hold brackets and colons, which rich takes for markup and emoji and
  leaves out: whatever has such text in it is a `PlainTable`, or is printed by `print_plain`.
"""

import re
from collections.abc import Callable, Iterable

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_PART = re.compile(r"[^/_,:\s-]*[/_,:\s-]*")  # a word and the separators behind it


class PlainTable(Table):
    """Its rows show text as it is."""

    def add_row(self, *cells, **how) -> None:
        super().add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), **how)


def print_plain(console: Console, text: str, **how) -> None:
    """The text as it is."""
    console.print(text, highlight=False, markup=False, emoji=False, **how)


def folded(text: str, width: int) -> str:
    """The text in lines of at most `width`, longer only where a part is."""
    lines = [""]
    for part in _PART.findall(text):
        if lines[-1] and len((lines[-1] + part).rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def fits(console: Console, table: Table) -> bool:
    return _width(console, table) <= console.width


def print_whole(console: Console, build: Callable[[int], Table], names: Iterable[str]) -> None:
    """build: the table with its names folded to a width, and no column that wraps by itself."""
    widths = range(max(map(len, names), default=1), 0, -1)
    table = next((table for table in map(build, widths) if fits(console, table)), build(1))
    table.width = _width(console, table)
    console.print(table, crop=False)


def _width(console: Console, table: Table) -> int:
    return Measurement.get(console, console.options.update(width=10_000), table).maximum
