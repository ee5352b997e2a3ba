"""How a door ends: 0 done, 2 a user's mistake, 3 a run that stopped itself, 4 done in part, 75 pre-empted (run it
again), 130 interrupted by Ctrl-C with nothing saved, 141 nobody reads what it prints."""

import multiprocessing
import os
import re
import select
import sys
from collections.abc import Callable
from types import ModuleType
from typing import NoReturn

from prelude.data.errors import RunStopped, Stopped, UserError, in_one_line
from prelude.launch.missing_package import refusal
from prelude.pretrain import stopping
from prelude.pretrain.stopping import INTERRUPTED, PREEMPTED

__all__ = ["INCOMPLETE", "PREEMPTED", "door", "leave"]

UNREAD = 141  # as a shell says of what SIGPIPE ended: `prelude recipes | head`
INCOMPLETE = 4  # some of what was asked for is missing, and what there is says which

# torch's OutOfMemoryError of a device, known by its name as torch may not be imported, and what its CPU allocator says
_NO_ROOM = re.compile(r"^OutOfMemoryError: |DefaultCPUAllocator: (can't allocate|not enough) memory")


def leave(code: int) -> NoReturn:
    """Ends a launched rank. What failed may have loader workers still: they ignore signals and would live on for some
    seconds, in which a launcher's output stays open."""
    for worker in multiprocessing.active_children():
        worker.kill()
    if distributed := _with_ranks():
        distributed.leave(code)
    raise SystemExit(code)


def door(main: Callable[[], int]) -> int:
    """Runs `main`, telling a foreseen failure in its own sentence instead of a traceback. The other ranks are told of
    any failure, so that they need not wait to find out."""
    stopping.interruptible()
    try:
        code = _explained(main)
        sys.stdout.flush()
        return code
    except (UserError, RunStopped) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        _left(error.exit_code, str(error))
        return error.exit_code
    except Stopped as stop:
        print(f"stopped {stop}; run the same command again", file=sys.stderr, flush=True)
        _left(stop.exit_code, f"stopped {stop}")
        return stop.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _left(INTERRUPTED, "interrupted")
        return INTERRUPTED
    except Exception as error:
        _left(1, in_one_line(error, typed=True))
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return UNREAD
        raise


def _explained(main: Callable[[], int]) -> int:
    try:
        return main()
    except MemoryError as error:
        raise _too_large(error) from None
    except ModuleNotFoundError as error:
        if told := refusal(error):
            raise told from None
        raise
    except RuntimeError as error:
        if _NO_ROOM.search(f"{type(error).__name__}: {error}"):
            raise _too_large(error) from None
        if not (distributed := _with_ranks()):
            raise
        with distributed.explained():
            raise


def _too_large(error: Exception) -> RunStopped:
    reason = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".") or "no more was to be had"
    return RunStopped(
        f"Memory is used up ({reason}); write a smaller train.micro_batch, whose gradients are accumulated to the same "
        "global batch, or train.gradient_checkpointing=true; for an evaluation a smaller --batch-size. `--dry-run` "
        "says what a run takes."
    )


def _nobody_reads() -> bool:
    """Whether it is standard output that broke. What is still to be written to it goes nowhere then, without a word."""
    output, poll = sys.__stdout__.fileno(), select.poll()
    poll.register(output)
    broken = any(event & select.POLLERR for _, event in poll.poll(0))
    if broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return broken


def _left(code: int, why: str) -> None:
    if distributed := _with_ranks():
        distributed.left(code, why)


def _with_ranks() -> ModuleType | None:
    """`pretrain.distributed`, once it is imported. Until then there is no other rank, and no torch, which a wrong word
    is told without."""
    return sys.modules.get("prelude.pretrain.distributed")
