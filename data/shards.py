"""A data set of tar shards: which files it is, and where each sample lies in them.

- A folder of images, read in place, is one shard; see `image_folder`.
- `data.shards` is a path, a pattern with braces (`{000..099}`), `*` or `?`, several of them joined by `::`, or a list;
  braces, `::` and `${...}` are expanded by webdataset. A name that exists as it is written is taken as it is.
- A sample's id is its place in the index: shard after shard, in the order of the tar.
- The index of a tar is kept in a cache folder under its path, size and time of change, written to the side and renamed,
  so that any number of processes may build it at once.
- The fingerprint is a hash of names, sizes and offsets, not of folders: a data set that is moved is still the same.
"""

import copy
import functools
import glob
import hashlib
import json
import logging
import os
import re
import secrets
import socket
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from webdataset.shardlists import expand_urls

from prelude.data.errors import UserError
from prelude.data.image_folder import ImageFolder, open_folder
from prelude.data.tar_index import Problem, TarIndex, index_tar, keys_by_offset

log = logging.getLogger(__name__)

CACHE_VERSION = 1
_URL = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://")


class ShardIndex:
    """The samples of local, uncompressed tar shards. 16 bytes of memory a sample, 32 with labels.

    shards: see the module. label: extension of the member that holds a sample's label (`cls`), or "" for none; it
    changes neither ids nor fingerprint.

    Raises UserError where nothing matches, a shard is missing, unreadable, compressed or not local, or no shard holds
    an image. Damage inside a shard does not raise: see `problems`.
    """

    def __init__(self, shards: str | list[str], label: str = ""):
        self.label = label.lower().removeprefix(".")
        self.paths = tuple(expand_shards(shards))
        for path in self.paths:
            if is_remote(path):
                raise UserError(f"{path} in data.shards is not a local file and cannot be indexed; copy it to a disk.")
        parts = _load_all(self.paths, self.label)
        self.images = np.concatenate([part.images for part in parts])  # (N, 2) int64: offset, size
        self.labels = np.concatenate([part.labels for part in parts])  # (N, 2) int64, or (0, 2) without a label
        self.counts = np.array([len(part.images) for part in parts], np.int64)  # (num_shards,)
        self.problems = {path: part.problems for path, part in zip(self.paths, parts, strict=True) if part.problems}
        self.ends = np.cumsum(self.counts)
        self.fingerprint = self._fingerprint()
        if not self.num_samples:
            raise UserError(self._nothing_found(shards))

    @property
    def num_samples(self) -> int:
        return len(self.images)

    @property
    def num_shards(self) -> int:
        return len(self.paths)

    @property
    def num_problems(self) -> int:
        """Members and samples that could not be indexed, over all shards."""
        return sum(map(len, self.problems.values()))

    def shard_of(self, sample_id: int) -> str:
        """The path of the shard that holds a sample."""
        return self.paths[int(np.searchsorted(self.ends, sample_id, side="right"))]

    def key(self, sample_id: int) -> str:
        """A sample's key in its shard. Walks the shard's headers: for people to read, not for every sample."""
        shard, offset = self.shard_of(sample_id), int(self.images[sample_id, 0])
        keys = shard.keys_by_offset() if isinstance(shard, ImageFolder) else keys_by_offset(shard)
        return keys.get(offset, "?")

    def with_label(self, label: str) -> "ShardIndex":
        """The same data set, with the places of another label."""
        label = label.lower().removeprefix(".")
        return self if label in ("", self.label) else ShardIndex(list(self.paths), label)

    def subset(self, sample_ids: np.ndarray) -> "ShardIndex":
        """The data set of these samples alone, numbered anew from 0 in the order of the tar, with a fingerprint of
        its own. sample_ids: (n,) int64, growing, at least one.
        """
        part = copy.copy(self)
        part.images = self.images[sample_ids]
        part.labels = self.labels[sample_ids] if len(self.labels) else self.labels
        part.counts = np.bincount(np.searchsorted(self.ends, sample_ids, side="right"), minlength=self.num_shards)
        part.ends = np.cumsum(part.counts)
        part.fingerprint = part._fingerprint()
        return part

    def _fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for path, images in zip(self.paths, np.split(self.images, self.ends[:-1]), strict=True):
            name = path.fingerprint() if isinstance(path, ImageFolder) else os.path.basename(path)
            digest.update(json.dumps([name, len(images)]).encode())
            digest.update(np.ascontiguousarray(images, "<i8").tobytes())
        return digest.hexdigest()

    def _nothing_found(self, shards) -> str:
        found = [problem for problems in self.problems.values() for problem in problems]
        first = f" (the first problem: {found[0].reason}, {found[0].where})" if found else ""
        return (
            f"data.shards={shards!r} matches {len(self.paths)} files on {socket.gethostname()} without a single "
            f"image{first}; write tar files whose members are named like 000123.jpg, or make them of what is there: "
            f"prelude shards pack SOURCE --to DIR."
        )


def expand_shards(shards: str | list[str]) -> list[str]:
    """Local paths and URLs, in order; local ones exist. Raises UserError naming the pattern and this host."""
    found = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        found += _expand(pattern)
    if not found:
        raise UserError(
            "data.shards is empty; write the path of a tar file, or a pattern such as /data/{000..099}.tar."
        )
    return found


def is_remote(url: str) -> bool:
    return bool(_URL.match(url))


def cache_folder() -> Path:
    """Where indexes are kept: $PRELUDE_CACHE, or ~/.cache/prelude."""
    return Path(os.environ.get("PRELUDE_CACHE") or Path.home() / ".cache" / "prelude")


# ---- patterns into paths


def _expand(pattern: str) -> list[str]:
    if isinstance(pattern, ImageFolder):
        return [pattern]
    if not is_remote(pattern) and os.path.exists(pattern):
        return [_as_path(pattern)]
    try:
        urls = expand_urls(pattern)
    except (AssertionError, ValueError) as error:  # a variable that is not set; a brace that is not closed
        reason = str(error).replace("wds_WDS_", "WDS_") or "unbalanced braces"
        raise UserError(f"data.shards={pattern!r} cannot be expanded ({reason}); write plain paths.") from None
    return [path for url in urls for path in ([url] if _has_scheme(url) else _local(url, pattern))]


def _has_scheme(url: str) -> bool:
    return is_remote(url) and not url.startswith("file://")


def _local(url: str, pattern: str) -> list[str]:
    path = os.path.expanduser(re.sub(r"^file:(//)?", "", url))
    if os.path.exists(path):
        return [_as_path(path)]
    if "*" in path or "?" in path:
        matches = sorted(glob.glob(path.replace("[", "[[]")))
        if matches:
            return [_as_path(match) for match in matches]
        raise UserError(f"No file matches {path!r} on {socket.gethostname()}; correct data.shards={pattern!r}.")
    raise UserError(
        f"{path} does not exist on {socket.gethostname()}; correct data.shards={pattern!r}, or copy the shard there."
    )


def _as_path(path: str) -> str:
    return open_folder(path) if os.path.isdir(path) else path


# ---- indexes, kept on disk


def _load_all(paths: tuple[str, ...], label: str) -> list[TarIndex]:
    """The index of every shard; each rank of a node begins elsewhere, so that they share the work of a first use."""
    ranks = max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
    begin = len(paths) * int(os.environ.get("LOCAL_RANK", 0)) // ranks
    turned = paths[begin:] + paths[:begin]
    with ThreadPoolExecutor(8) as threads:  # waits for the disk overlap
        parts = list(threads.map(lambda path: _load(path, label), turned))
    return parts[len(paths) - begin :] + parts[: len(paths) - begin]


def _load(path: str, label: str) -> TarIndex:
    if isinstance(path, ImageFolder):
        return path.index(label)
    try:
        status = os.stat(path)
        identity = json.dumps([CACHE_VERSION, os.path.abspath(path), status.st_size, status.st_mtime_ns, label])
        name = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
        kept = cache_folder() / "index" / f"{name}.npz"
        index = _read(kept)
        if index is None:
            index = index_tar(path, label)
            _write(kept, index)
        return index
    except OSError as error:
        raise UserError(
            f"{path} cannot be read on {socket.gethostname()} ({error.strerror or error}); mend it, or leave it out of "
            f"data.shards."
        ) from None


def _read(kept: Path) -> TarIndex | None:
    try:
        with np.load(kept, allow_pickle=False) as arrays:
            problems = json.loads(arrays["problems"].tobytes())
            return TarIndex(arrays["images"], arrays["labels"], tuple(Problem(*problem) for problem in problems))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # not there yet, or spoilt: it is built again


def _write(kept: Path, index: TarIndex) -> None:
    """A cache that cannot be written costs time at the next start and nothing else."""
    aside = kept.with_name(f"{kept.stem}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    problems = np.frombuffer(json.dumps(index.problems).encode(), np.uint8)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(aside, "wb") as file:
                np.savez(file, images=index.images, labels=index.labels, problems=problems)
            os.replace(aside, kept)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        _warn_unkept(str(kept.parent), error.strerror)


@functools.cache  # once for a folder and not for each of its shards
def _warn_unkept(folder: str, reason: str) -> None:
    log.warning("indexes of shards are not kept, because %s cannot be written: %s", folder, reason)
