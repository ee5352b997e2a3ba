"""Code run in a copy of this process, to be killed there; a new interpreter would take seconds to import the same."""

import os
from collections.abc import Callable

import torch


def is_killed(action: Callable[[], None]) -> bool:
    """Whether a signal ended the copy before `action` did."""
    return code_of(action) < 0


def code_of(action: Callable[[], None]) -> int:
    """With which the copy ended: minus the signal, what `action` left with, or 0."""
    child = os.fork()
    if child == 0:
        try:
            alone()
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def alone() -> None:
    """For a copy: OpenMP's threads were not copied, and whoever shares work with them waits for ever."""
    torch.set_num_threads(1)
