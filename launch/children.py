"""Starts another door in a process of its own, as a person would, and shows what it says.

The child has a process group of its own: what asks this process to end is passed on to it, so that it saves and ends in
its own way, and the same command goes on later. It asks itself to end when this process is gone without a word.
"""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from prelude.data.errors import OTHER_FOLDER
from prelude.launch.exit_codes import PREEMPTED
from prelude.pretrain import stopping
from prelude.pretrain.launchers import without_rank

DOORS = Path(__file__).resolve().parent
_OF_A_CHILD = {"FORCE_COLOR": ""}  # a notebook's kernel sets it, and would have a bar drawn into our pipe
IN_OUT = {OTHER_FOLDER: "another --out"}  # environment of a run whose folder follows from --out
_ERROR = re.compile(r"(?:\w+\.py: )?error: ")  # a door's own, or that of its arguments

# of DeepSpeed's launcher: which commands it ran, which accelerator it did not find
_CHATTER = re.compile(r"\[\d{4}-\d\d-\d\d [\d:,]+\] \[(DEBUG|INFO|WARNING)\] \[\w+\.py:\d+:")


class Preempted(Exception):
    """A child was asked to end before it was done; run again, it goes on."""

    def __init__(self, through_us: bool = False):
        self.through_us = through_us  # whether this process was asked, and passed it on


def run_door(
    door: str,
    arguments: Sequence[str],
    *,
    num_ranks: int,
    name: str,
    quiet: bool = False,
    show: Callable[[str], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> str | None:
    """Runs `door` (`pretrain`) to its end, by the launcher where there are several ranks; each line that it prints
    begins with `name`, unless it is to be `quiet`, or goes to `show`. Returns None, or in one sentence why it failed.
    Raises Preempted."""
    script = [str(DOORS / f"{door}.py"), *arguments]
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(num_ranks), "--master_port", str(free_port())]
    command = [sys.executable, *(launcher if num_ranks > 1 else []), *script]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        env=without_rank(os.environ) | _OF_A_CHILD | {stopping.PARENT: str(os.getpid())} | dict(environment or {}),
    )  # fmt: skip
    try:
        with stopping.postponed(lambda: _signal(process, signal.SIGTERM)):
            sentence = _heard(process.stdout, show or (_silence if quiet else partial(_print_under, name)))
            code = process.wait()
            asked_to_stop = stopping.requested()
    finally:
        if process.poll() is None:
            _signal(process, signal.SIGKILL)
    if asked_to_stop or code == PREEMPTED:
        raise Preempted(asked_to_stop)
    return None if code == 0 else sentence or f"{door} ended with code {code} and did not say why."


def _signal(process: subprocess.Popen, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _heard(lines: Iterable[str], show: Callable[[str], None]) -> str:
    """Shows the lines that a reader has use for, and returns the error among them, if any."""
    error = ""
    for line in lines:
        text = line.rstrip()
        if not _CHATTER.match(text):
            show(text)
        if found := _ERROR.match(text):
            error = text[found.end() :]
        elif error and text.startswith("  "):  # a mistake of a config, below the line that counts them
            error += f" {text.strip()}"
    return error


def _print_under(name: str, text: str) -> None:
    print(f"[{name}] {text}", file=sys.stderr, flush=True)


def _silence(text: str) -> None: ...


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
