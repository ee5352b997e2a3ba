"""What a door prints, in a notebook or on a terminal: the lines that tell of steps are one line with a bar, and an
error is left to the exception that tells it."""

import re
import shutil
import sys
from typing import TextIO

_STEP = re.compile(r"step (\d+)/(\d+)  ")
_BAR = 20  # characters


def is_live() -> bool:
    """Whether a line can take the place of the one before: in a notebook and on a terminal, and not in a file."""
    return "ipykernel" in sys.modules or sys.stdout.isatty()


class ProgressLine:
    """Called with each line. `end` leaves the last one standing."""

    def __init__(self, stream: TextIO, live: bool):
        self.stream, self.live = stream, live
        self.width = 0  # of the line that the next step replaces; 0: there is none

    def __call__(self, line: str) -> None:
        found = _STEP.match(line) if self.live else None
        if found:
            step, steps = map(int, found.groups())
            done = _BAR * step // steps
            text = f"{'█' * done}{'░' * (_BAR - done)} {line}"
            # What is wrapped is never taken back
            room = shutil.get_terminal_size().columns - 1 if self.stream.isatty() else None
            text = text[:room]
            self.stream.write(f"\r{text.ljust(self.width)[:room]}")
            self.width = len(text)
        elif not line.startswith("error: "):
            self.end()
            self.stream.write(f"{line}\n")
        self.stream.flush()

    def end(self) -> None:
        if self.width:
            self.stream.write("\n")
            self.stream.flush()
        self.width = 0
