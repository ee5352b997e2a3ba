"""From what `data.shards` says to paths: braces, wildcards, environment variables, folders and URLs."""

import glob
import math
import os
import re
import stat

from webdataset.shardlists import expand_urls

from prelude.data.absent import is_remote, missing, no_match
from prelude.data.errors import UserError
from prelude.data.image_folder import ImageFolder, open_folder
from prelude.data.remote_shards import RemoteShard, is_pattern, matching
from prelude.data.stores import is_stored

_MOST_NAMED = 10**7  # by the ranges of a pattern


def expand(pattern: str) -> list[str]:
    """Raises UserError naming the pattern and this host, and RunStopped for what a store does not give."""
    if isinstance(pattern, ImageFolder | RemoteShard):
        return [pattern]
    if not is_remote(pattern) and (found := _as_path(pattern, pattern)) is not None:
        return [found]
    if (count := _num_named(pattern)) > _MOST_NAMED:
        raise UserError(f"data.shards={pattern!r} names {count:,} files; write the numbers that there are.")
    try:
        urls = expand_urls(pattern)
    except (AssertionError, ValueError) as error:  # a variable that is not set; a brace that is not closed
        reason = str(error).replace("wds_WDS_", "WDS_") or "unbalanced braces"
        raise UserError(f"data.shards={pattern!r} cannot be expanded ({reason}); write plain paths.") from None
    return [path for url in urls for path in (_in_store(url) if _has_scheme(url) else _local(url, pattern))]


def _in_store(url: str) -> list[str]:
    return matching(url) if is_stored(url) and is_pattern(url) else [url]


def _num_named(pattern: str) -> int:
    """How many names the ranges in braces make, without making them."""
    spans = re.findall(r"\{(\d+)\.\.(\d+)\}", pattern)
    return math.prod(max(int(last) - int(first) + 1, 1) for first, last in spans)


def _has_scheme(url: str) -> bool:
    return is_remote(url) and not url.startswith("file://")


def _local(url: str, pattern: str) -> list[str]:
    path = os.path.expanduser(re.sub(r"^file:(//)?", "", url))
    if (found := _as_path(path, pattern)) is not None:
        return [found]
    if "*" in path or "?" in path:
        matches = sorted(glob.glob(path.replace("[", "[[]")))
        if matches:
            found = {match: _as_path(match, pattern) for match in matches}
            for match in (match for match, path in found.items() if path is None):
                raise missing(match, pattern)
            return list(found.values())
        raise no_match(path, pattern)
    raise missing(path, pattern)


def _as_path(path: str, pattern: str) -> str | None:
    """None where there is nothing. Asks once: a file system that others serve takes its time for each question."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return None
    if stat.S_ISDIR(mode):
        return open_folder(path)
    if not stat.S_ISREG(mode):
        raise UserError(
            f"{path} in data.shards={pattern!r} is a pipe or a device, and images are read by their place in a file; "
            f"write 'pipe:cat {path}' with data.num_samples=... and data.allow_commands=true, or copy the shard to a "
            f"disk."
        )
    return path
