"""Tables of plain text, in which nothing is cut and no word is broken, however narrow the terminal is."""

import shutil
import textwrap
from collections.abc import Sequence

_LEAST_WIDTH = 80  # a narrower terminal breaks the lines itself
_GAP = "  "


def pairs(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """What, and how much of it, which goes on below itself where it is long."""
    first = max(len(what) for what, _ in rows)
    lines = [title, "-" * len(title)] if title else []
    for what, how_much in rows:
        begun, *more = wrapped(how_much, _width() - first - len(_GAP)) or [""]
        lines += [f"{what:<{first}}{_GAP}{begun}".rstrip(), *(" " * first + _GAP + line for line in more)]
    return "\n".join(lines)


def columns(title: str, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Right-justified, each as wide as what stands in it; titles may be of several lines."""
    heads = [title.split("\n") for title in titles]
    tallest = max(map(len, heads))
    above = [[head[line] if line < len(head) else "" for head in heads] for line in range(tallest)]
    widths = [max(map(len, column)) for column in zip(*above, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    lines = [_GAP.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
             for row in (*above, rule, *rows)]  # fmt: skip
    return "\n".join([*wrapped(title, _width()), *lines])


def wrapped(text: str, width: int) -> list[str]:
    """Lines that break between words alone: a longer word, such as a path, can still be copied."""
    return textwrap.wrap(text, max(width, 20), break_long_words=False, break_on_hyphens=False)


def paragraph(text: str) -> str:
    return "\n".join(wrapped(text, _width()))


def _width() -> int:
    return max(shutil.get_terminal_size().columns, _LEAST_WIDTH)
