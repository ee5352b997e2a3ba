"""The index of shards behind a URL: kept, or read from a file beside them, or made of the shards in one pass.

- What is kept has every label, so that another one does not mean another pass.
- The file beside the shards is believed for those whose size is still the same.
"""

import functools
import logging
import os
import secrets
from pathlib import Path

from prelude.data import index_file, stores
from prelude.data.index_file import Entry
from prelude.data.node_cache import cache_folder
from prelude.data.remote_shards import RemoteShard, read_beside
from prelude.data.tar_index import TarIndex, index_every_label
from prelude.data.waiting import in_threads

log = logging.getLogger(__name__)


def read_index_files(paths: list[str]) -> None:
    """For the remote shards among `paths` of which no index is kept yet: keeps what files beside them say."""
    wanted: dict[str, list[RemoteShard]] = {}
    for shard in paths:
        if isinstance(shard, RemoteShard) and not _kept(shard).exists():
            plain, signature = shard.partition("?")[::2]
            beside = f"{plain.rpartition('/')[0]}/{index_file.name_for(shard.name)}"
            wanted.setdefault(beside if not signature else f"{beside}?{signature}", []).append(shard)
    reading = in_threads(read_beside, list(wanted), lambda url: f"the index {url}")
    for (url, shards), content in zip(wanted.items(), reading, strict=True):
        if content is not None:
            _keep_all(url, shards, content)
        else:
            gib = sum(shard.size for shard in shards) / 2**30
            log.warning(
                "there is no index file %s, so %d shards (%.3g GiB) are fetched to be indexed, once",
                stores.without_signature(url), len(shards), gib,
            )  # fmt: skip


def load(shard: RemoteShard, label: str) -> TarIndex:
    """Raises UserError as `index_tar`, and RunStopped where the shard cannot be had."""
    entry = _read(shard)
    if entry is None:
        entry = Entry(shard.size, "", index_every_label(shard))
        _write(shard, entry)
    if entry.sha256:
        shard.checksums["sha256"] = entry.sha256
    return entry.index(label) if label else entry.indexes[""]


def _keep_all(url: str, shards: list[RemoteShard], content: bytes) -> None:
    try:
        entries = index_file.read(content)
    except ValueError as error:
        log.warning("the index file %s is not used (%s)", url, error)
        return
    for shard in shards:
        entry = entries.get(shard.name)
        if entry is None or entry.size != shard.size:
            log.warning("%s is not as the index file %s says, so it is fetched to be indexed", shard, url)
        else:
            _write(shard, entry)


def _kept(shard: RemoteShard) -> Path:
    return cache_folder() / "index" / f"{shard.cache_name}.remote.npz"


def _read(shard: RemoteShard) -> Entry | None:
    try:
        return index_file.read(_kept(shard).read_bytes())[shard.name]
    except (OSError, ValueError, KeyError):
        return _made_here.get(shard.cache_name)


def _write(shard: RemoteShard, entry: Entry) -> None:
    """A folder that cannot be written costs another pass at the next start."""
    kept = _kept(shard)
    aside = kept.with_name(f"{kept.stem}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_bytes(index_file.write({shard.name: entry}))
            os.replace(aside, kept)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        _made_here[shard.cache_name] = entry
        _warn_unkept(str(kept.parent), error.strerror)


_made_here: dict[str, Entry] = {}  # where nothing can be kept


@functools.cache
def _warn_unkept(folder: str, reason: str) -> None:
    log.warning("indexes of remote shards are not kept, because %s cannot be written: %s", folder, reason)
