"""For scripts of cases: both ranks of a launch go through them, and then the first alone, as a world of one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from prelude.pretrain import distributed


def at_two_ranks_and_one(cases: Callable[[Path], None], out: Path) -> NoReturn:
    """`cases(out / "2")` on two ranks, then `cases(out / "1")` on the first. Ends the process."""
    first = os.environ["RANK"] == "0"
    _in_a_world(cases, out / "2")
    if first:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        _in_a_world(cases, out / "1")
    distributed.leave(0)


def _in_a_world(cases: Callable[[Path], None], out: Path) -> None:
    distributed.start()
    assert distributed.world_size() == int(out.name)
    out.mkdir(exist_ok=True)
    distributed.barrier()
    cases(out)
    distributed.stop()
