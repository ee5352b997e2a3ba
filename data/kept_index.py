"""The index of every shard, made of the headers once and kept in the cache folder.

- Under the path, size and times of change of a tar, so that one which has changed is read again.
- Written to the side and renamed, so that any number of processes may build it at once.
"""

import functools
import hashlib
import json
import logging
import os
import secrets
import socket
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from prelude.data.errors import UserError
from prelude.data.image_folder import ImageFolder
from prelude.data.node_cache import cache_folder
from prelude.data.remote_index import load as load_remote
from prelude.data.remote_index import read_index_files
from prelude.data.remote_shards import RemoteShard
from prelude.data.tar_index import Problem, TarIndex, index_tar
from prelude.data.waiting import in_threads

log = logging.getLogger(__name__)

CACHE_VERSION = 3


def load_all(paths: Sequence[str], label: str, images: Sequence[str]) -> list[TarIndex]:
    """The index of every shard; each rank of a node begins elsewhere, so that they share the work of a first use.

    label: extension of the label's member, or "". images: for each shard, that of the image's member, or "" for any.
    """
    ranks = max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
    begin = len(paths) * int(os.environ.get("LOCAL_RANK", 0)) // ranks
    turned = list(zip([*paths[begin:], *paths[:begin]], [*images[begin:], *images[:begin]], strict=True))
    read_index_files([path for path, image in turned if not image])
    load = lambda one: _load(one[0], label, one[1])  # noqa: E731
    parts = list(in_threads(load, turned, lambda one: f"the headers of {one[0]}"))
    return parts[len(paths) - begin :] + parts[: len(paths) - begin]


def _load(path: str, label: str, image: str) -> TarIndex:
    if isinstance(path, ImageFolder):
        return path.index(label, image)
    if isinstance(path, RemoteShard):
        return load_remote(path, label, image)
    try:
        status = os.stat(path)
        times = status.st_mtime_ns, status.st_ctime_ns  # the second changes even where a tool puts the first back
        named = [image] if image else []
        identity = json.dumps([CACHE_VERSION, os.path.abspath(path), status.st_size, *times, label, *named])
        name = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
        kept = cache_folder() / "index" / f"{name}.npz"
        index = _read(kept)
        if index is None:
            index = index_tar(path, label, image)
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
            about = json.loads(arrays["about"].tobytes())
            problems = tuple(Problem(*problem) for problem in about.pop("problems"))
            return TarIndex(arrays["images"], arrays["labels"], problems, **about)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None  # not there yet, or spoilt: it is built again


def _write(kept: Path, index: TarIndex) -> None:
    """A cache that cannot be written costs time at the next start and nothing else."""
    aside = kept.with_name(f"{kept.stem}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    about = {name: getattr(index, name) for name in ("problems", "ended", "content", "label_content")}
    encoded = np.frombuffer(json.dumps(about).encode(), np.uint8)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(aside, "wb") as file:
                np.savez(file, images=index.images, labels=index.labels, about=encoded)
            os.replace(aside, kept)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        _warn_unkept(str(kept.parent), error.strerror)


@functools.cache  # once for a folder and not for each of its shards
def _warn_unkept(folder: str, reason: str) -> None:
    log.warning("indexes of shards are not kept, because %s cannot be written: %s", folder, reason)
