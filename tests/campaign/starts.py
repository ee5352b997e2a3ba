"""Starts of the pretraining door for the campaign: each a process of its own, forked from one that has imported
everything, so that a start costs a second instead of ten.
"""

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def import_everything() -> None:
    """What a start imports, once. No thread may run when processes are forked."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401
    import tensorboard.summary  # noqa: F401
    import torch
    import torch._dynamo  # noqa: F401

    from prelude.launch import training  # noqa: F401
    from prelude.objectives import mae  # noqa: F401

    torch.set_num_threads(1)


@dataclass
class Start:
    """A running start, or one that has ended: `code` as of subprocess, `told` all that it printed."""

    process: int
    output: Path
    code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            process, status = os.waitpid(self.process, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if process else None
        return self.code

    def wait(self, seconds: float = 120) -> int:
        until = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > until:
                self.send(signal.SIGKILL)
                os.waitpid(self.process, 0)
                self.code = -999
            time.sleep(0.003)
        return self.code

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process, number)

    @property
    def told(self) -> str:
        return self.output.read_text(errors="replace")

    def refused_in_words(self, *codes: int) -> bool:
        """Whether it ended with one of these codes and an `error:` that is no traceback."""
        return self.code in codes and "error: " in self.told and "Traceback" not in self.told


def start(argv: list[str], output: Path, *, file_limit: int | None = None, without_rights: bool = False) -> Start:
    """Starts `prelude pretrain` with these words. file_limit: bytes that a file may have. without_rights: as whom
    permissions bind, root too."""
    from prelude.launch import pretrain
    from prelude.launch.exit_codes import door, leave
    from prelude.pretrain import stopping

    # Held back until the new process listens, as a program does from its first line on.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    process = os.fork()
    if process:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return Start(process, output)
    try:
        os.setsid()
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        if without_rights:
            _give_up_rights()
        stopping.listen()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        leave(door(lambda: pretrain.main(argv)))
    except BaseException:
        traceback.print_exc()
        with contextlib.suppress(OSError):
            sys.stderr.flush()
    finally:
        os._exit(1)


def _give_up_rights() -> None:
    """Drops the capabilities by which root passes over permissions (Linux)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset")
