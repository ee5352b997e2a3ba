"""Checking a checkpoint to its last byte with all ranks of a job, each its share of the files.

A large one takes the time of its largest file then, and not that of all of them on rank 0.

Rank 0 leads, since what it looks at next depends on what was found. A rank that does not see the folder reads nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from prelude.checkpoints.manifest import (
    MANIFEST,
    Fault,
    Listed,
    fault_of,
    faults_of,
    joined,
    listed_files,
    obvious_fault,
)
from prelude.data.errors import UserError
from prelude.pretrain import distributed

Found = TypeVar("Found")


@dataclass(frozen=True)
class _Question:
    path: Path
    manifest: bytes


def by_all_ranks(find: Callable[[Callable[[Path], Fault | None]], Found]) -> Found:
    """What `find` returns on rank 0, on every rank. Collective. `find` is called there alone, with what says how a
    checkpoint is wrong, as `fault_of` does; all ranks read for it. Its UserError is raised on every rank."""
    if distributed.is_main():
        try:
            answer = find(_fault_of)
        except UserError as error:
            answer = error
        distributed.from_main(answer)
    else:
        while isinstance(answer := distributed.from_main(None), _Question):
            _read_together(answer)
    if isinstance(answer, UserError):
        raise answer
    return answer


def _fault_of(path: Path) -> Fault | None:
    """On rank 0."""
    if distributed.world_size() == 1:
        return fault_of(path)
    if fault := obvious_fault(path):
        return fault
    question = _Question(path, (path / MANIFEST).read_bytes())
    distributed.from_main(question)
    return _read_together(question)


def _read_together(question: _Question) -> Fault | None:
    """Collective. A fault of any rank, on every rank."""
    listed = _listed_here(question)
    readers = [rank for rank, sees in enumerate(distributed.of_all(listed is not None)) if sees]
    if not readers:
        return Fault("it is gone since it was looked at", lost=False)
    mine = _dealt(listed, len(readers))[readers.index(distributed.rank())] if listed is not None else {}
    return joined([fault for faults in distributed.of_all(faults_of(question.path, mine)) for fault in faults])


def _listed_here(question: _Question) -> dict[str, Listed] | None:
    """The files, where this rank sees the same checkpoint; else None."""
    try:
        if (question.path / MANIFEST).read_bytes() != question.manifest or obvious_fault(question.path):
            return None
    except OSError:
        return None
    listed = listed_files(question.path)
    return None if isinstance(listed, Fault) else listed


def _dealt(listed: dict[str, Listed], readers: int) -> list[dict[str, Listed]]:
    """For each reader its files: the largest first, to whoever has least to read."""
    shares: list[dict[str, Listed]] = [{} for _ in range(readers)]
    left = [0] * readers
    for name in sorted(listed, key=lambda name: (-listed[name].size, name)):
        least = left.index(min(left))
        shares[least][name] = listed[name]
        left[least] += listed[name].size
    return shares
