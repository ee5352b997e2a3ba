"""Starts of the pretraining door for the campaign: each rank a process of its own, forked from one that has imported
everything, so that a start costs a second instead of ten.
"""

import contextlib
import ctypes
import os
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
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
    """A running start, or one that has ended: its ranks, `told` all that they printed."""

    processes: list[int] = field(default_factory=list)
    outputs: list[Path] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)  # of ranks that have ended, as of subprocess

    def poll(self) -> int | None:
        """`code` once all ranks have ended."""
        for rank, process in enumerate(self.processes):
            if rank not in self.codes:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return self.code if len(self.codes) == len(self.processes) else None

    @property
    def code(self) -> int:
        """0 where it is that of all ranks, else the first one's that has another."""
        return next((code for _, code in sorted(self.codes.items()) if code), 0)

    def wait(self, seconds: float = 120) -> int:
        until = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > until:
                self.send(signal.SIGKILL)
                for rank, process in enumerate(self.processes):
                    if rank not in self.codes:
                        os.waitpid(process, 0)
                        self.codes[rank] = -999
            time.sleep(0.003)
        return self.code

    def send(self, number: signal.Signals, ranks: list[int] | None = None) -> None:
        for rank, process in enumerate(self.processes):
            if rank not in self.codes and (ranks is None or rank in ranks):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)

    @property
    def told(self) -> str:
        return "".join(output.read_text(errors="replace") for output in self.outputs)

    def refused_in_words(self, *codes: int) -> bool:
        """Whether each rank ended with one of these codes and an `error:` that is no traceback."""
        said = all("error: " in output.read_text(errors="replace") for output in self.outputs)
        return said and set(self.codes.values()) <= set(codes) and "Traceback" not in self.told


def start(
    argv: list[str],
    output: Path,
    ranks: int = 1,
    *,
    file_limit: dict[int, int] | None = None,
    without_rights: bool = False,
    killed_at: dict[int, int] | None = None,
) -> Start:
    """Starts `prelude pretrain` with these words. file_limit: bytes that a file of some ranks may have. without_rights:
    as whom permissions bind, root too. killed_at: at which of its operations on files a rank kills itself."""
    started, env = Start(), {}
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    for rank in range(ranks):
        own = env | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
        told = output.with_suffix(f".{rank}{output.suffix}") if rank else output
        limit, moment = (file_limit or {}).get(rank), (killed_at or {}).get(rank)
        started.outputs.append(told)
        told.write_text("")
        started.processes.append(_fork(argv, told, own, limit, without_rights, moment))
    return started


def _fork(argv, output: Path, env: dict, file_limit: int | None, without_rights: bool, moment: int | None) -> int:
    from prelude.launch import pretrain
    from prelude.launch.exit_codes import door, leave
    from prelude.pretrain import stopping

    # Held back until the new process listens, as a program does from its first line on.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    process = os.fork()
    if process:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return process
    try:
        os.setsid()
        os.environ |= env
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        if without_rights:
            _give_up_rights()
        if moment is not None:
            _kill_at(moment)
        stopping.listen()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        leave(door(lambda: pretrain.main(argv)))
    except BaseException:
        traceback.print_exc()
        with contextlib.suppress(OSError):
            sys.stderr.flush()
    finally:
        os._exit(1)


def _kill_at(moment: int) -> None:
    """Two chances for each operation that changes the disk: before it, and where it is half done."""
    from prelude.checkpoints import tensor_files

    left = [moment]

    def chance(half=None) -> None:
        if left[0] == 0:
            if half:
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    def guarded(function, half):
        def call(*args, **kwargs):
            chance()
            chance(lambda: half(*args))
            return function(*args, **kwargs)

        return call

    def half_a_file(path, contents):
        path.write_bytes(b"".join(bytes(content) for content in contents)[: 8 + 1])

    def half_a_folder(path, *_):
        next(p for p in Path(path).iterdir() if p.is_file()).unlink()

    tensor_files._write = guarded(tensor_files._write, half_a_file)
    shutil.rmtree = guarded(shutil.rmtree, half_a_folder)
    for name in ("fsync", "rename", "replace", "mkdir"):
        setattr(os, name, guarded(getattr(os, name), lambda *_: None))


def _give_up_rights() -> None:
    """Drops the capabilities by which root passes over permissions (Linux)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset")
