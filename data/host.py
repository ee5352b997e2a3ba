"""What a process gets of the machine that it is on, and where it keeps things there; `prelude doctor` asks too, where
torch may be broken.

Of files a rank needs many: it has a connection to each other rank, more than once, and its loader's workers inherit
them. Libraries of communication end a process without a word where one more cannot be opened. So a run raises its limit
when it starts, and is refused there where its connections do not fit; later on a file that cannot be opened for want of
a descriptor is never taken for a bad one.
"""

import contextlib
import errno
import os
import resource
import socket
import tempfile
from pathlib import Path

from prelude.data.errors import RunStopped, UserError, cause_of

SHARED_MEMORY = "/dev/shm"
"""What large batches travel through between processes."""
CGROUP = Path("/sys/fs/cgroup")
ENOUGH_FILES = 65536  # for thousands of ranks; a container's own limit may be a thousand times as high, or none
_OF_ITSELF = 128  # files of a rank beside its connections: libraries, logs, pipes to workers, some shards


def num_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_limit() -> int | None:
    """Bytes that the container may hold; None: no limit."""
    for place in ("memory.max", "memory/memory.limit_in_bytes"):  # the second: the older version of cgroups
        with contextlib.suppress(OSError):
            limit = (CGROUP / place).read_text().strip()
            return int(limit) if limit.isdigit() else None
    return None


def cache_folder() -> Path:
    """Where indexes, features and remote shards are kept: $PRELUDE_CACHE, or ~/.cache/prelude, or where
    there is no home a folder of the user's among temporary files."""
    if asked := os.environ.get("PRELUDE_CACHE"):
        return Path(asked)
    try:
        return Path.home() / ".cache" / "prelude"
    except RuntimeError:  # a user without a name, and no HOME: `docker run --user 1234`
        return Path(tempfile.gettempdir()) / f"prelude-{os.getuid()}"


# ---- open files


class NoMoreFiles(RunStopped):
    """Nothing is wrong with the file that could not be opened."""


def own_fault(error: OSError) -> None:
    """Raises NoMoreFiles where it is this process, or its machine, that can open no more; to be asked before a failure
    is taken for that of a file."""
    if error.errno == errno.EMFILE:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise NoMoreFiles(
            f"A process on {socket.gethostname()} has all of the {soft} files open that it may, and needs another; "
            f"{raised('-n', hard, soft + 1, ENOUGH_FILES, 'nofile')}."
        ) from error
    if error.errno == errno.ENFILE:
        raise NoMoreFiles(
            f"{socket.gethostname()} has as many files open as it can ({cause_of(error)}); end other programs there, "
            "or let an administrator raise fs.file-max."
        ) from error


def attainable_files() -> int:
    """That a process may have open once `raise_files` was called."""
    soft, hard = (
        ENOUGH_FILES if of == resource.RLIM_INFINITY else of for of in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    return max(soft, min(hard, ENOUGH_FILES))


def raise_files() -> None:
    """The soft limit, which is low for programs that count files in a few bits, up to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < attainable_files():
        with contextlib.suppress(OSError, ValueError):  # some systems have a maximum below an unlimited hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (attainable_files(), hard))


def files_of_a_rank(world_size: int, rank: int = 0) -> int:
    """That it may have open in a run: two groups of all ranks, each with a connection to each other rank and three
    files more; on rank 0 two connections of each rank to the store that it keeps, too."""
    if world_size == 1:
        return _OF_ITSELF
    return _OF_ITSELF + 2 * (world_size + 3) + (0 if rank else 2 * world_size)


def refuse_few_files(world_size: int, rank: int) -> None:
    """Raises UserError, of the process that is this rank of so many."""
    needed, (_, hard) = files_of_a_rank(world_size, rank), resource.getrlimit(resource.RLIMIT_NOFILE)
    if attainable_files() < min(needed, ENOUGH_FILES):
        how = raised("-n", hard, needed, ENOUGH_FILES, "nofile")
        raise UserError(
            f"Rank {rank} of {world_size} has up to {needed} files and connections open, and a process on "
            f"{socket.gethostname()} may have {attainable_files()}; {how}."
        )


def raised(flag: str, hard: int, least: int, enough: int, name: str) -> str:
    """How a soft limit is raised: by anybody up to the hard one, and that by an administrator alone."""
    wanted = "unlimited" if enough == resource.RLIM_INFINITY else str(enough)
    in_docker = f"docker run --ulimit {name}={'-1' if wanted == 'unlimited' else wanted}"
    if hard == resource.RLIM_INFINITY or (enough != resource.RLIM_INFINITY and hard >= enough):
        return f"write `ulimit {flag} {wanted}` before the command, or {in_docker}"
    if least != resource.RLIM_INFINITY and hard >= least:
        return f"write `ulimit {flag} {hard}` before the command, the most that the hard limit allows, or {in_docker}"
    service = {"nofile": "LimitNOFILE", "memlock": "LimitMEMLOCK"}[name]
    return (
        f"the hard limit is {hard}, which only an administrator can raise: `* - {name} {wanted}` in "
        f"/etc/security/limits.conf and a new login, {service}= of the service (slurmd's, in a job), or {in_docker}; "
        f"where `ulimit {flag}` of this shell has lowered it, a new shell is enough"
    )
