"""Shards that plainly are not there, and how that is told. Imports nothing heavy: doors ask before anything else."""

import glob
import os
import re
import socket
from collections.abc import Sequence

from braceexpand import UnbalancedBracesError, braceexpand

from prelude.data.errors import UserError

_URL = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://", re.IGNORECASE)


def is_remote(url: str) -> bool:
    return bool(_URL.match(url))


def refuse_absent(shards: str | Sequence[str], name: str = "data.shards=") -> None:
    """Looks for the first file that each pattern names, where that is one of this machine; `data.shards` expands and
    looks for all. name: what stands before the pattern where it is said. Raises UserError."""
    for pattern in [shards] if isinstance(shards, str) else shards:
        if is_remote(pattern) or os.path.lexists(os.path.expanduser(pattern)):
            continue
        for part in pattern.split("::"):
            if not (is_remote(part) or "${" in part):
                _refuse_part(part, pattern, name)


def _refuse_part(part: str, pattern: str, name: str) -> None:
    try:
        path = os.path.expanduser(next(iter(braceexpand(part))))
    except (UnbalancedBracesError, StopIteration):
        return  # whoever expands it says what is wrong
    if os.path.lexists(path):
        return
    if not ("*" in path or "?" in path):
        raise missing(path, pattern, name)
    if next(glob.iglob(path.replace("[", "[[]")), None) is None:
        raise no_match(path, pattern, name)


def missing(path: str, pattern: str, name: str = "data.shards=") -> UserError:
    return UserError(
        f"{path} does not exist on {socket.gethostname()}; correct {name}{pattern!r}, or copy the shard there."
    )


def no_match(path: str, pattern: str, name: str = "data.shards=") -> UserError:
    return UserError(f"No file matches {path!r} on {socket.gethostname()}; correct {name}{pattern!r}.")
