"""What a process gets of the machine that it is on, and where it keeps things there; `prelude doctor` asks too, where
torch may be broken."""

import contextlib
import os
import tempfile
from pathlib import Path

SHARED_MEMORY = "/dev/shm"
"""What large batches travel through between processes."""
CGROUP = Path("/sys/fs/cgroup")


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
