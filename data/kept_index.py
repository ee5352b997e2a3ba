"""The index of a data set's shards, made of their headers once and kept in the cache folder.

- Of each shard there is a small file with every label, and of all shards together one table for each label, which is
  mapped: opening it takes the same time and memory whatever lies in the shards. See `places`.
- Both are kept under the paths, sizes and times of change of the tars: one that has changed is read again, and none
  else. Other sets of the same shards, and other labels, need no look at the tars.
- One process of a node makes what is missing, and the others wait for it. Where locks do not keep them apart they share
  the shards, each passing over what is known by then. Files are written to the side and renamed.
- Where nothing can be kept, each process makes an index in its memory; so it does of a folder of images.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prelude.data import index_file, remote_index
from prelude.data.absent import unreadable
from prelude.data.errors import RunStopped, cause_of
from prelude.data.image_files import ARRAY_EXTENSION
from prelude.data.image_folder import ImageFolder
from prelude.data.index_file import Entry
from prelude.data.kept_files import (
    CACHE_VERSION,
    folder,
    hash_of,
    keep,
    mark_used,
    remove_left_drafts,
    used_at,
    warn_unkept,
)
from prelude.data.locks import alone
from prelude.data.places import Chained, Mapped, Places, write_images, write_labels
from prelude.data.remote_shards import RemoteShard, named, shard_name
from prelude.data.tar_index import MOST_LABELS, Problem, TarIndex, index_every_label, index_tar, is_image
from prelude.data.waiting import called, in_threads, moved
from prelude.data.walking import walk_all

_STATED_AT_ONCE = 256
_UNUSED_SECONDS = 30 * 86400  # after which the table of shards as they were before makes room


class Shard(NamedTuple):
    """What an index says of a shard beside its places; see `TarIndex`."""

    count: int
    content: str
    ended: bool
    problems: tuple[Problem, ...]
    sha256: str = ""  # of a remote one


@dataclass(frozen=True)
class Kept:
    """The index of shards. identity: changes with what is in it; "" where it is not kept."""

    images: Places | np.ndarray  # (N, 2): offset and size
    labels: Places | np.ndarray  # (N, 2), or (0, 2) without a label
    shards: list[Shard]
    label_contents: list[str]
    identity: str


def load_all(paths: Sequence[str], label: str, images: Sequence[str]) -> Kept:
    """The index of these shards.

    label: extension of the label's member, or "". images: for each shard, that of the image's member, or "" for any.
    Raises UserError for a shard that cannot be read or is compressed, RunStopped for one that a store does not give.
    """
    if any(isinstance(path, ImageFolder) for path in paths):
        return _with_folders(paths, label, images)
    states = _states(paths)
    of_paths = hash_of([CACHE_VERSION, [state[0] for state in states], list(images)])[:16]
    of_states = hash_of([CACHE_VERSION, states, list(images), label == ARRAY_EXTENSION])
    sought = _Sought(paths, states, images, label, f"{of_paths}-{of_states}", [])
    try:
        kept = _opened(sought) or called(lambda: _made(sought), sought.waits_for)
    except OSError as error:
        warn_unkept(str(folder()), cause_of(error))
        return _in_memory(paths, label, images)
    for path, shard in zip(paths, kept.shards, strict=True):
        if shard.sha256:
            path.checksums["sha256"] = shard.sha256
    return kept


# ---- all shards


class _Sought(NamedTuple):
    paths: Sequence[str]
    states: list[list]
    images: Sequence[str]  # names of image members
    label: str
    name: str
    at: list[str]  # the shard that is being walked here, if one is

    def walks(self, shard: tuple | None) -> None:
        self.at[:] = [] if shard is None else [shard[0]]

    def waits_for(self) -> str:
        return f"the headers of {self.at[0]}" if self.at else f"the index of {named(self.paths)}"

    def path(self, label: str = "") -> str:
        of_label = f".{hash_of(label)[:16]}.labels" if label else ".images"
        return str(folder() / f"{self.name}{of_label}")

    def shards(self) -> list[tuple]:
        return list(zip(self.paths, self.states, self.images, strict=True))


def _states(paths: Sequence[str]) -> list[list]:
    """What changes with a shard, beginning with its path."""

    def of_some(begin: int) -> list[list]:
        found = []
        for path in paths[begin : begin + _STATED_AT_ONCE]:
            if isinstance(path, RemoteShard):
                found.append([path.identity])
                continue
            try:
                status = os.stat(path)
            except OSError as error:
                raise unreadable(path, error) from None
            # The second time changes even where a tool puts the first one back.
            found.append([os.path.abspath(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns])
            moved()
        return found

    begins = range(0, len(paths), _STATED_AT_ONCE)
    return [state for found in in_threads(of_some, begins, lambda begin: paths[begin]) for state in found]


def _opened(sought: _Sought, labels_too: bool = True) -> Kept | None:
    """None where it is not there yet, or spoilt."""
    try:
        images = Mapped(sought.path())
        shards = [
            Shard(count, content, ended, tuple(Problem(*problem) for problem in problems), sha256)
            for count, content, ended, problems, sha256 in images.about
        ]
        labels, contents = np.empty((0, 2), np.int64), [index_file.no_labels(0)] * len(shards)
        if sought.label and labels_too:
            labels = Mapped(sought.path(sought.label), images)
            contents = list(labels.about)
        if len(images) != sum(shard.count for shard in shards) or not len(shards) == len(contents) == len(sought.paths):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    mark_used(sought.path())
    return Kept(images, labels, shards, contents, sought.name)


def _made(sought: _Sought) -> Kept:
    """By one process of a node. Raises OSError where it cannot be kept."""
    folder().mkdir(parents=True, exist_ok=True)
    with alone(f"{folder() / sought.name}.lock") as locked:
        kept = _opened(sought)
        if kept is not None:
            return kept
        _know_each(sought, locked)
        if _opened(sought, labels_too=False) is None:
            _write_images(sought)
        if sought.label:
            _write_labels(sought)
        _remove_superseded(sought)
        remove_left_drafts()
        kept = _opened(sought)
    if kept is None:
        raise OSError(f"what was written to {sought.path()} is not there")
    return kept


def _know_each(sought: _Sought, locked: bool) -> None:
    """Keeps what is in each shard, as far as that is not known yet."""
    remote_index.read_index_files([path for path, image in zip(sought.paths, sought.images, strict=True) if not image])
    shards = sought.shards()
    begin = _own_place(len(shards), locked)
    shards = [*shards[begin:], *shards[:begin]]
    local = [shard for shard in shards if not isinstance(shard[0], RemoteShard) and not _kept_file(*shard).exists()]
    walk_all(local, _know_unless_kept, sought.walks)
    remote = [shard for shard in shards if isinstance(shard[0], RemoteShard)]
    for _ in in_threads(_entry, remote, lambda shard: f"the headers of {shard[0]}"):
        moved()


def _own_place(count: int, locked: bool) -> int:
    """Where this process begins: others may be walking the same shards, where locks do not keep them apart. Some hold
    within a host alone, on which each start begins at the same shard then, and names the same damaged one first."""
    of_process = [] if locked else [os.getpid()]
    return int(hash_of([socket.gethostname(), *of_process]), 16) % max(count, 1)


def _write_images(sought: _Sought) -> None:
    about: list[Shard] = []

    def tables() -> Iterator[np.ndarray]:
        about.clear()
        for shard in sought.shards():
            entry = _entry(shard)
            # Where arrays are the labels, they are not the images of a shard that has no others.
            found = entry.indexes[""] if sought.label != ARRAY_EXTENSION else _labelled(shard, sought.label)
            about.append(Shard(len(found.images), found.content, found.ended, found.problems, entry.sha256))
            moved()
            yield found.images

    write_images(sought.path(), tables, lambda: about)


def _write_labels(sought: _Sought) -> None:
    images, contents = Mapped(sought.path()), []

    def tables() -> Iterator[np.ndarray]:
        contents.clear()
        for shard, (count, *_) in zip(sought.shards(), images.about, strict=True):
            found = _labelled(shard, sought.label)
            if len(found.labels) != count:
                raise RunStopped(f"{shard[0]} has changed while it was indexed; start again.")
            contents.append(found.label_content)
            moved()
            yield found.labels

    write_labels(sought.path(sought.label), tables, images, lambda: contents)


def _remove_superseded(sought: _Sought) -> None:
    """Tables of these shards as they were before, which nobody has opened for long."""
    of_paths = sought.name.partition("-")[0]
    for path in folder().glob(f"{of_paths}-*"):
        with contextlib.suppress(OSError):
            if not path.name.startswith(sought.name) and time.time() - used_at(path) > _UNUSED_SECONDS:
                path.unlink()


# ---- one shard


def _labelled(shard: tuple, label: str) -> TarIndex:
    """With the places of a label."""
    path, _, image = shard
    entry = _entry(shard)
    known_to_lack = not (
        "." in label or label == ARRAY_EXTENSION or is_image(label) or len(entry.indexes) > MOST_LABELS
    )
    return entry.index(label) if label in entry.indexes or known_to_lack else index_tar(path, label, image)


def _entry(shard: tuple) -> Entry:
    path, state, image = shard
    if isinstance(path, RemoteShard):
        return remote_index.load(path, image)
    try:
        return index_file.read(_kept_file(path, state, image).read_bytes())[shard_name(path)]
    except (OSError, ValueError, KeyError):  # not there yet, or spoilt
        return _know_local(shard)


def _know_unless_kept(shard: tuple) -> None:
    if not _kept_file(*shard).exists():  # by now
        _know_local(shard)


def _know_local(shard: tuple) -> Entry:
    path, state, image = shard
    try:
        entry = Entry(state[1], "", index_every_label(path, image))
    except OSError as error:
        raise unreadable(path, error) from None
    keep(_kept_file(path, state, image), index_file.write({shard_name(path): entry}))
    return entry


def _kept_file(path: str, state: list, image: str) -> Path:
    return folder() / "shards" / f"{hash_of([CACHE_VERSION, state, *([image] if image else [])])}.npz"


def _with_folders(paths: Sequence[str], label: str, images: Sequence[str]) -> Kept:
    parts, pairs = [], zip(paths, images, strict=True)
    for is_folder, run in groupby(pairs, key=lambda pair: isinstance(pair[0], ImageFolder)):
        if is_folder:
            indexes = in_threads(
                lambda pair: pair[0].index(label, pair[1]), run, lambda pair: f"the images in {pair[0]}"
            )
            parts.append(_of_indexes(list(indexes)))
        else:
            of_run = list(run)
            parts.append(load_all([path for path, _ in of_run], label, [image for _, image in of_run]))
    return Kept(
        Chained([part.images for part in parts]),
        Chained([part.labels for part in parts]) if label else np.empty((0, 2), np.int64),
        [shard for part in parts for shard in part.shards],
        [content for part in parts for content in part.label_contents],
        "",
    )


def _in_memory(paths: Sequence[str], label: str, images: Sequence[str]) -> Kept:
    def load(one: tuple[str, str]) -> TarIndex:
        path, image = one
        if isinstance(path, RemoteShard):
            entry = remote_index.load(path, image)
            return entry.index(label) if label else entry.indexes[""]
        try:
            return index_tar(path, label, image)
        except OSError as error:
            raise unreadable(path, error) from None

    remote_index.read_index_files([path for path, image in zip(paths, images, strict=True) if not image])
    pairs = list(zip(paths, images, strict=True))
    return _of_indexes(list(in_threads(load, pairs, lambda pair: f"the headers of {pair[0]}")))


def _of_indexes(parts: Sequence[TarIndex]) -> Kept:
    return Kept(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.labels for part in parts]),
        [Shard(len(part.images), part.content, part.ended, part.problems) for part in parts],
        [part.label_content for part in parts],
        "",
    )
