"""The index of shards behind a URL: kept, or read from a file beside them, or made of the shards in one pass.

- What is kept has every label, so that another one does not mean another pass.
- The file beside the shards is believed for those whose size is still the same.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

from prelude.data import index_file, stores
from prelude.data.absent import unreadable
from prelude.data.checksums import Digests
from prelude.data.counting import counted
from prelude.data.errors import UserError, cause_of
from prelude.data.host import cache_folder
from prelude.data.index_file import Entry
from prelude.data.kept_files import keep, warn_unkept
from prelude.data.remote_shards import RemoteShard, open_shard, read_beside, shard_name
from prelude.data.signed_urls import shown
from prelude.data.tar_index import index_every_label
from prelude.data.waiting import in_threads, moved
from prelude.data.whole_files import own_draft, write_whole

log = logging.getLogger(__name__)


def read_index_files(paths: list[str]) -> None:
    """For the remote shards among `paths` of which no index is kept yet: keeps what files beside them say."""
    wanted: dict[str, list[RemoteShard]] = {}
    for shard in paths:
        if isinstance(shard, RemoteShard) and not _kept(shard).exists():
            wanted.setdefault(stores.beside(str(shard), index_file.name_for(shard.name)), []).append(shard)
    reading = in_threads(read_beside, list(wanted), lambda url: f"the index {url}")
    for (url, shards), content in zip(wanted.items(), reading, strict=True):
        if content is not None:
            _keep_all(url, shards, content)
        else:
            gib = sum(shard.size for shard in shards) / 2**30
            log.warning(
                "there is no index file %s, so %d shards (%.3g GiB) are fetched to be indexed, once",
                shown(url), len(shards), gib,
            )  # fmt: skip


def load(shard: RemoteShard, image: str = "") -> Entry:
    """image: extension of the image's member where it is named: of those no file beside the shards knows.

    Raises UserError as `index_tar`, and RunStopped where the shard cannot be had.
    """
    entry = _read(shard, image)
    if entry is None:
        entry = Entry(shard.size, "", index_every_label(shard, image))
        _write(shard, entry, image)
    if entry.sha256:
        shard.checksums["sha256"] = entry.sha256
    return entry


def write_for(paths: Sequence[str], folder: str, sha256: Mapping[str, str] | None = None) -> list[str]:
    """Writes the index files of shards, local or remote, into `folder`; returns their paths. What a file there says of
    other shards stays, where these lie beside it.

    sha256: of shards by path, where it is known. Raises UserError for two shards of one name and for one that cannot be
    read, RunStopped for one that a store does not give, and OSError where the folder cannot be written.
    """
    paths = list(dict.fromkeys(paths))
    _refuse_one_name(paths)
    files: dict[str, dict[str, Entry]] = {}
    for path, entry in zip(paths, in_threads(_entry_of, paths, lambda path: f"the headers of {path}"), strict=True):
        entry = replace(entry, sha256=(sha256 or {}).get(path) or entry.sha256 or _sha256(path))
        files.setdefault(index_file.name_for(shard_name(path)), {})[shard_name(path)] = entry
    os.makedirs(folder, exist_ok=True)
    for name, given in files.items():
        entries = _of_others(os.path.join(folder, name), given) | given
        path = Path(folder, name)
        write_whole(path, index_file.write(dict(sorted(entries.items()))), own_draft(path))
    return [os.path.join(folder, name) for name in files]


def _refuse_one_name(paths: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for path in paths:
        first = seen.setdefault(shard_name(path), path)
        if first != path:
            raise UserError(
                f"{first} and {path} have the same name, by which an index file knows a shard; write one for each "
                f"folder, with another --to."
            )


def _of_others(path: str, given: Mapping[str, Entry]) -> dict[str, Entry]:
    """What the index file that is there says of other shards, of which those that do not lie beside it may have been
    made anew since, with as many bytes."""
    try:
        with open(path, "rb") as file:
            entries = index_file.read(file.read())
    except (FileNotFoundError, ValueError):
        return {}
    others = {name: entry for name, entry in entries.items() if name not in given}
    for name, entry in given.items():
        if name in entries and (entries[name].size, entries[name].sha256) != (entry.size, entry.sha256):
            log.warning("%s told of another %s, of %d bytes, which is replaced", path, name, entries[name].size)
    folder = os.path.dirname(path)
    kept = {name: entry for name, entry in others.items() if _lies_at(os.path.join(folder, name), entry.size)}
    if len(kept) < len(others):
        log.warning(
            "%s no longer holds %s, which do not lie beside it with the sizes that it told",
            path, counted(len(others) - len(kept), "other shard"),
        )  # fmt: skip
    return kept


def _lies_at(path: str, size: int) -> bool:
    return os.path.isfile(path) and os.path.getsize(path) == size


def _entry_of(path: str) -> Entry:
    kept = _read(path) if isinstance(path, RemoteShard) else None
    if kept is not None:
        return kept
    try:
        indexes = index_every_label(path)
        return Entry(path.size if isinstance(path, RemoteShard) else os.path.getsize(path), "", indexes)
    except OSError as error:
        raise unreadable(path, error) from None


def _sha256(path: str) -> str:
    """ "" of a remote shard that would have to be fetched for it."""
    if isinstance(path, RemoteShard) and not path.is_here():
        return ""
    try:
        fd = open_shard(path)
        try:
            return Digests(("sha256",)).of_file(fd, moved)["sha256"]
        finally:
            os.close(fd)
    except OSError as error:
        raise unreadable(path, error) from None


def _keep_all(url: str, shards: list[RemoteShard], content: bytes) -> None:
    try:
        entries = index_file.read(content)
    except ValueError as error:
        log.warning("the index file %s is not used (%s)", shown(url), error)
        return
    for shard in shards:
        entry = _entry_in(entries, shard)
        if entry is None or entry.size != shard.size:
            log.warning("%s is not as the index file %s says, so it is fetched to be indexed", shown(shard), shown(url))
        else:
            _write(shard, entry)


def _kept(shard: RemoteShard, image: str = "") -> Path:
    named = f".{blake2b(image.encode(), digest_size=8).hexdigest()}" if image else ""
    return cache_folder() / "index" / f"{shard.cache_name}{named}.remote.npz"


def _read(shard: RemoteShard, image: str = "") -> Entry | None:
    try:
        entry = _entry_in(index_file.read(_kept(shard, image).read_bytes()), shard)
    except (OSError, ValueError, KeyError):
        entry = None
    return entry or _made_here.get((shard.cache_name, image))


def _entry_in(entries: Mapping[str, Entry], shard: RemoteShard) -> Entry | None:
    return entries.get(shard.name) or entries.get(shard.first_name)


def _write(shard: RemoteShard, entry: Entry, image: str = "") -> None:
    """A folder that cannot be written costs another pass at the next start."""
    kept = _kept(shard, image)
    try:
        keep(kept, index_file.write({shard.name: entry}))
    except OSError as error:
        _made_here[shard.cache_name, image] = entry
        warn_unkept(str(kept.parent), cause_of(error))


_made_here: dict[tuple[str, str], Entry] = {}  # where nothing can be kept
