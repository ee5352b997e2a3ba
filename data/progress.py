"""A progress bar for work that takes long, on a terminal alone."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

AFTER_SECONDS = 1.0


@contextlib.contextmanager
def progress_bar(what: str, count: int) -> Iterator[Callable[[int], None]]:
    """what: is done, as in "indexing shards". Yields a function that is told how many more of `count` are done. The bar
    is there once that has taken a second, and gone at the end."""
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task, began, shown, done = bar.add_task("", total=count), time.monotonic(), False, 0

    def advance(more: int) -> None:
        nonlocal shown, done
        done += more
        if not shown and bar.console.is_terminal and time.monotonic() - began > AFTER_SECONDS:
            bar.start()
            shown = True
        bar.update(task, completed=min(done, count))

    try:
        yield advance
    finally:
        if shown:
            bar.stop()
