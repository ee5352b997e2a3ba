"""Starts another door in a process of its own, as a person would, and shows what it says.

The child has a process group of its own: what asks this process to end is passed on to it, so that it saves and ends in
its own way, and the same command goes on later. It asks itself to end when this process is gone without a word.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from prelude.launch.exit_codes import PREEMPTED
from prelude.pretrain import stopping
from prelude.pretrain.distributed import free_port

DOORS = Path(__file__).resolve().parent

# of DeepSpeed's launcher: which commands it ran, which accelerator it did not find
_CHATTER = re.compile(r"\[\d{4}-\d\d-\d\d [\d:,]+\] \[(DEBUG|INFO|WARNING)\] \[\w+\.py:\d+:")


class Preempted(Exception):
    """A child was asked to end before it was done; run again, it goes on."""


def run_door(door: str, arguments: Sequence[str], *, num_ranks: int, name: str, quiet: bool = False) -> str | None:
    """Runs `door` (`pretrain`) to its end, by the launcher where there are several ranks; each line that it prints
    begins with `name`, unless it is to be `quiet`. Returns None, or in one sentence why it failed. Raises Preempted."""
    script = [str(DOORS / f"{door}.py"), *arguments]
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(num_ranks), "--master_port", str(free_port())]
    command = [sys.executable, *(launcher if num_ranks > 1 else []), *script]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        env=os.environ | {stopping.PARENT: str(os.getpid())},
    )  # fmt: skip
    try:
        with stopping.postponed(lambda: _signal(process, signal.SIGTERM)):
            sentence = _show(process.stdout, "" if quiet else name)
            code = process.wait()
            asked_to_stop = stopping.requested()
    finally:
        if process.poll() is None:
            _signal(process, signal.SIGKILL)
    if asked_to_stop or code == PREEMPTED:
        raise Preempted
    return None if code == 0 else sentence or f"{door} ended with code {code} and did not say why."


def _signal(process: subprocess.Popen, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _show(lines: Iterable[str], name: str) -> str:
    """Prints the lines that a user has use for, unless `name` is empty, and returns the error among them, if any."""
    error = ""
    for line in lines:
        text = line.rstrip()
        if name and not _CHATTER.match(text):
            print(f"[{name}] {text}", file=sys.stderr, flush=True)
        if text.startswith("error: "):
            error = text.removeprefix("error: ")
        elif error and text.startswith("  "):  # a mistake of a config, below the line that counts them
            error += f" {text.strip()}"
    return error
