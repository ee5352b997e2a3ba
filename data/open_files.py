"""Reads of shards by number, by offset.

- Bytes are read by offset (pread): file positions are shared by forked processes, and a shard that has become shorter
  is a short read, where a memory map would kill the worker.
- An image and its label that lie side by side are one read: of small images, calls are what reading costs.
"""

import os
import resource
from collections import OrderedDict
from collections.abc import Iterable

from prelude.data.decode import BadImage
from prelude.data.errors import cause_of
from prelude.data.host import NoMoreFiles
from prelude.data.image_folder import ImageFolder
from prelude.data.remote_shards import RemoteShard
from prelude.data.waiting import doing, moved, open_file

_SIDE_BY_SIDE = 2**14  # bytes from the first of an image to the last of its label, which are read, and copied, at once

Place = tuple[int, int, int]  # shard, offset, size


class OpenFiles:
    """Reads of shards by number, through the most recently used file descriptors. Safe from several threads."""

    def __init__(self, paths: tuple[str, ...]):
        self.paths = paths
        self.whole = [isinstance(path, (ImageFolder, RemoteShard)) for path in paths]  # not by descriptor
        self.words = [f"it reads {path}".encode() for path in paths]
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.limit = 1024 if soft == resource.RLIM_INFINITY else max(min(1024, soft // 2), 1)
        self.opened: OrderedDict[int, _File] = OrderedDict()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Raises BadImage when fewer bytes than `size` can be had, RunStopped where a remote shard cannot, and where no
        more files can be opened."""
        path = self.paths[shard]
        try:
            if self.whole[shard]:
                doing(self.words[shard])
                content = path.read(offset, size)
            else:
                file = self._file(shard)  # held until the read is done: another thread may drop it meanwhile
                content = os.pread(file.fd, size, offset)
        except OSError as error:
            raise BadImage(f"cannot be read: {cause_of(error)}") from error
        moved()
        if len(content) < size:
            raise BadImage("the shard has become shorter")
        return content

    def read_both(self, image: Place, label: Place) -> tuple[bytes, bytes]:
        """Of the same shard. Raises as `read` does."""
        shard, offset, size = image
        _, label_offset, label_size = label
        begin = min(offset, label_offset)
        length = max(offset + size, label_offset + label_size) - begin
        if length > _SIDE_BY_SIDE or self.whole[shard]:
            return self.read(*image), self.read(*label)
        content = self.read(shard, begin, length)
        offset, label_offset = offset - begin, label_offset - begin
        return content[offset : offset + size], content[label_offset : label_offset + label_size]

    def will_read(self, places: Iterable[Place]) -> None:
        """Tells the operating system."""
        for shard, offset, size in places if hasattr(os, "posix_fadvise") else ():
            if self.whole[shard]:
                continue
            try:
                file = self._file(shard)
                os.posix_fadvise(file.fd, offset, size, os.POSIX_FADV_WILLNEED)
            except (OSError, NoMoreFiles):
                pass  # advice only: the read itself reports what is wrong

    def _file(self, shard: int) -> "_File":
        doing(self.words[shard])
        file = self.opened.pop(shard, None) or self._newly_opened(shard)
        self.opened[shard] = file  # the newest is last
        self._close_beyond(self.limit)
        return file

    def _newly_opened(self, shard: int) -> "_File":
        """Where the process can open no more, because others have what was left to them, half of these files make room.
        Raises OSError and NoMoreFiles."""
        while True:
            try:
                return _File(self.paths[shard])
            except NoMoreFiles:
                if not self.opened:
                    raise
                kept = len(self.opened) // 2
                self.limit = max(min(self.limit, kept), 1)
                self._close_beyond(kept)

    def _close_beyond(self, most: int) -> None:
        while len(self.opened) > most:
            try:
                self.opened.popitem(last=False)
            except KeyError:
                break  # another thread was faster

    def __getstate__(self):
        return {
            "paths": self.paths,
            "whole": self.whole,
            "words": self.words,
            "limit": self.limit,
            "opened": OrderedDict(),
        }  # descriptors do not travel


class _File:
    """An open file that closes with its last user, so that no thread reads from a descriptor that was closed."""

    def __init__(self, path: str):
        self.fd = open_file(path)

    def __del__(self, close=os.close):  # at the end of a process the module may have been emptied
        if hasattr(self, "fd"):
            close(self.fd)
