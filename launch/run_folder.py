"""A run's folder during one start: held against other starts, and written into only once resume has accepted.

    with run_folder(config) as folder:
        Engine(config, objective, loader, store, [*folder.monitors, ...]).run()

- A start that is refused leaves the folder as it found it; one that would have made the folder takes it away again.
- What is written at the start (config.yaml, environment.json) is a log like others: a full disk does not end the run.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prelude.data.errors import UserError
from prelude.data.whole_files import write_whole
from prelude.pretrain import distributed
from prelude.pretrain.config import Config
from prelude.pretrain.environment import describe_environment
from prelude.pretrain.files import Growing, Tolerant, reason, remedy
from prelude.pretrain.monitors import Monitor
from prelude.pretrain.run_lock import RunLock
from prelude.pretrain.schedules import Progress


@dataclass(frozen=True)
class RunFolder:
    path: Path
    monitors: list["StartOfRun"]  # first among the engine's: what they write, others read

    def record(self, config: Config) -> None:
        """What config.yaml is to say, where more is known by now."""
        for monitor in self.monitors:
            monitor.config = config

    def note(self, **facts) -> None:
        """What environment.json says besides, of what is known once the engine is built."""
        for monitor in self.monitors:
            monitor.facts |= facts


@contextmanager
def run_folder(config: Config) -> Iterator[RunFolder]:
    """Collective. Raises UserError on every rank where another start holds the folder, or it cannot be written."""
    path = Path(config.run_dir)
    lock = RunLock(path, say=lambda text: print(text, file=sys.stderr, flush=True))
    refusal = distributed.from_main(_refusal(lock, path) if distributed.is_main() else None)
    if refusal:
        raise UserError(refusal)
    try:
        yield RunFolder(path, [StartOfRun(config)] if distributed.is_main() else [])
    finally:
        lock.release()


def _refusal(lock: RunLock, path: Path) -> str | None:
    try:
        lock.hold()
    except UserError as error:
        return str(error)
    except OSError as error:
        return not_written(path, error)
    if refusal := through_a_link(path):
        lock.release()
    return refusal


def through_a_link(path: Path) -> str | None:
    """Why a run may not write its checkpoints there, where a link leads elsewhere."""
    if not (path / "checkpoints").is_symlink():
        return None
    return (
        f"{path / 'checkpoints'} is a symbolic link, and a run writes through none, since other runs may do so "
        f"too; write run_dir=... with a folder on the disk where the checkpoints belong."
    )


def not_written(path: Path, error: OSError) -> str:
    """What to do where a run folder cannot be written: a run that lies there is not begun anew elsewhere."""
    instead = "make it writable" if (path / "checkpoints").is_dir() else "write another run_dir"
    return f"run_dir={path} cannot be written ({reason(error)}); {remedy(error, instead)}."


class StartOfRun(Monitor):
    """Told that the run begins, it writes what began: config.yaml, environment.json, deepspeed.log."""

    def __init__(self, config: Config):
        self.config, self.path, self.facts = config, Path(config.run_dir), {}
        self.stop = self.path / "STOP"
        self.earlier_stop = _identity(self.stop)
        self.messages = _Messages(Growing(self.path / "deepspeed.log"))
        distributed.deepspeed_messages_to(self.messages)

    def start(self, progress: Progress) -> None:
        # What stopped the last start must not stop this one; what came since is meant for it.
        if self.earlier_stop and _identity(self.stop) == self.earlier_stop:
            self._take_away_stop()
        with Tolerant(self.path / "config.yaml"):
            write_whole(self.path / "config.yaml", self.config.to_yaml())
        with Tolerant(self.path / "environment.json"):
            write_whole(self.path / "environment.json", json.dumps(describe_environment() | self.facts, indent=2))
        self.messages.begin()

    def _take_away_stop(self) -> None:
        try:
            self.stop.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.stop} ended an earlier start, would end this one too, and cannot be removed "
                f"({reason(error)}); remove it, and start again."
            ) from None


class _Messages(logging.Handler):
    """DeepSpeed's log lines, which it begins to write before the run is known to begin."""

    def __init__(self, file: Growing):
        super().__init__()
        self.file, self.early = file, []

    def begin(self) -> None:
        early, self.early = self.early, None
        for line in early:
            self.file.append(line)

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record).encode(errors="replace") + b"\n"
        if self.early is None:
            self.file.append(line)
        else:
            self.early.append(line)


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file it is, and from when; None where there is none."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
