"""Shards that plainly are not there or cannot be read, and how that is told. Imports nothing heavy: doors ask before
anything else.

Whoever opens shards names them `data.shards`, and the image of a sample that holds several `data.image`, as most are;
who was given them by other names says so (`told_as`).
"""

import glob
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from braceexpand import UnbalancedBracesError, braceexpand

from prelude.data.errors import RunStopped, UserError, cause_of
from prelude.data.host import own_fault

_KEY = re.compile(r"\bdata\.shards\b(=)?")
_IMAGE = re.compile(r"\bdata\.image\b(=)?")
_URL = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://", re.IGNORECASE)


@contextmanager
def told_as(name: str, otherwise: str = "", image: str = "--image ") -> Iterator[None]:
    """What is refused inside speaks of the shards as they were given.

    name: what stands before the pattern, such as `--test ` or `evaluate.test_shards=`; "" where nothing does.
    otherwise: what may be written instead of correcting that, such as `--test SHARDS`. image: what stands before the
    extension of an image's member, such as `evaluate.image=`.
    """
    try:
        yield
    except (UserError, RunStopped) as error:
        alone = name.strip(" =") or "the shards"
        text = _KEY.sub(lambda found: name if found[1] else alone, str(error))
        text = _IMAGE.sub(lambda found: image if found[1] else image.strip(" ="), text)
        text = f"{text.removesuffix('.')}, or write {otherwise}." if otherwise else text
        raise type(error)(text) from None


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


def unreadable(path: str, error: OSError) -> UserError:
    """Raises NoMoreFiles where that is why."""
    own_fault(error)
    return UserError(
        f"{path} cannot be read on {socket.gethostname()} ({cause_of(error)}); mend it, or leave it out of data.shards."
    )
