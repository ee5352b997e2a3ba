"""Shards behind a URL, read as local ones: each is brought once to a node, whole, and then read by offset.

- A `RemoteShard` is its URL, with what the store said of it at the start. It can be handed wherever a path can.
- What was brought is compared with size and checksum. A transfer that breaks off or stalls is tried again, with growing
  pauses, until nothing has come for as long as the run waits for anything; one that brings something else, or gets no
  further, some times. What no attempt can change ends the run at once, in the words of the store.
- The cache is a setting of the process, as is its patience.
"""

import functools
import logging
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from urllib.parse import urlsplit

from prelude.data import stores
from prelude.data.checksums import computable
from prelude.data.counting import counted
from prelude.data.errors import RunStopped, UserError, cause_of
from prelude.data.host import cache_folder, own_fault
from prelude.data.node_cache import GIB, NodeCache, Writer
from prelude.data.signed_urls import shown, without_signature
from prelude.data.waiting import doing, in_threads, moved, open_file, patience

log = logging.getLogger(__name__)

CACHE_GIB = 64.0
ATTEMPTS = 6  # in a row at what time alone seldom mends
FIRST_PAUSE_SECONDS = 0.5
MAX_PAUSE_SECONDS = 15.0
_ASKED_AT_ONCE = 16
_WORTH_A_LISTING = 32  # shards in one folder


@dataclass
class CacheSetting:
    folder: str = ""  # "": shards/ in the cache folder
    gib: float = CACHE_GIB


_setting = CacheSetting()


def keep_remote_shards(folder: str | None, gib: float | None) -> None:
    """From now on shards are kept in `folder`, `gib` GiB of them at most; None for what is usual."""
    _setting.folder = os.path.abspath(os.path.expanduser(folder)) if folder else ""
    _setting.gib = CACHE_GIB if gib is None else gib


class RemoteShard(str):
    """A URL. size: bytes. checksums: by name, of the store and of an index."""

    size: int
    checksums: dict[str, str]
    version: str
    cache: NodeCache

    def __format__(self, spec: str) -> str:
        """In a sentence it is `shown`; `str()` has all of it."""
        return format(shown(str(self)), spec)

    @property
    def name(self) -> str:
        """Of the file, as a local copy is called, in fingerprints."""
        return stores.name_of(str(self))

    @property
    def first_name(self) -> str:
        """Which it had at first: of what was taken for a path, in which `%20` was no space."""
        return os.path.basename(urlsplit(self).path)

    @property
    def identity(self) -> str:
        """Changes with the content, as far as the store tells, and not with a signature."""
        return f"{without_signature(self)} {self.size} {self.version}"

    @functools.cached_property
    def cache_name(self) -> str:
        return blake2b(self.identity.encode(), digest_size=16).hexdigest()

    def open(self) -> int:
        """A descriptor of the whole shard, to be read at once and closed. Raises RunStopped where it cannot be had."""
        return self._in_cache(lambda: self.cache.open(self.cache_name, self.size, self._bring))

    def read(self, offset: int, size: int) -> bytes:
        """Fewer bytes where the shard ends before. Raises RunStopped as `open`."""
        fd = self.open()
        try:
            return os.pread(fd, size, offset)
        finally:
            os.close(fd)

    def peek(self, offset: int, size: int) -> bytes:
        """A few bytes, for which alone the shard is not brought. Raises OSError and RunStopped."""
        if self.is_here():
            return self.read(offset, size)
        content = _tried(lambda: stores.read_range(self, self.size, offset, size), self)
        return self.read(offset, size) if content is None else content

    def is_here(self) -> bool:
        return self.cache.has(self.cache_name)

    def bring_ahead(self, should_leave: Callable[[], bool]) -> bool:
        """Brings the shard, unless another process does; False where there is no room. Raises RunStopped, and `Left`
        once `should_leave`."""
        bring = functools.partial(self._bring, should_leave=should_leave)
        return self._in_cache(lambda: self.cache.bring_ahead(self.cache_name, self.size, bring))

    def will_be_needed(self) -> None:
        self.cache.touch(self.cache_name)

    def _in_cache(self, use: Callable):
        try:
            return use()
        except OSError as error:
            own_fault(error)
            raise RunStopped(
                f"data.cache_dir={self.cache.folder} cannot be used ({cause_of(error)}); mend it, or write "
                f"another folder."
            ) from error

    def _bring(self, writer: Writer, should_leave: Callable[[], bool] | None = None) -> None:
        transfer = _Transfer(self, writer, should_leave)
        _tried(transfer.run, self, lambda: (writer.at, transfer.came_at), should_leave)


class Left(Exception):
    """A transfer that is no longer wanted."""


class _Transfer:
    """The way of one shard into a file, over several attempts."""

    def __init__(self, shard: RemoteShard, writer: Writer, should_leave: Callable[[], bool] | None):
        self.shard, self.writer, self.should_leave = shard, writer, should_leave
        self.expected = computable(shard.checksums)
        self.wrong: dict[str, str] | None = None  # checksums of a whole transfer that were not those expected
        self.came_at = 0.0  # when something came last

    def run(self) -> None:
        """One attempt; it goes on where the last one broke off, if a checksum will tell whether that was right, and if
        the store, which may refuse a part of what it gives whole, lets it."""
        start = self.writer.at if self.expected and self.writer.at < self.shard.size else 0
        try:
            self._run(start)
        except stores.Refused as error:
            if not start or error.status in (None, 404):
                raise
            self._run(0)

    def _run(self, start: int) -> None:
        shard, writer = self.shard, self.writer
        writer.at = start
        for offset, chunk, told in stores.stream(shard, shard.size, start):
            if not offset:
                self.expected = computable(told | shard.checksums)
                if start or not writer.at:
                    writer.begin_again(tuple(self.expected))
                start = 0
            if offset + len(chunk) > shard.size:
                raise stores.Wrong(f"more than the {shard.size} bytes come that were promised")
            writer.write(chunk)
            self.came_at = time.monotonic()
            self._tell()
        if writer.at < shard.size:
            raise stores.Failed(f"the transfer ended after {writer.at} of {shard.size} bytes")
        self._compare()

    def _tell(self) -> None:
        if self.should_leave is None:  # somebody waits for it
            mib = f"{self.writer.at / 2**20:.1f} of {self.shard.size / 2**20:.1f} MiB"
            doing(f"it fetches {self.shard}, {mib}".encode())
            moved()
        elif self.should_leave():
            raise Left

    def _compare(self) -> None:
        found = self.writer.digests.hexadecimal()
        wrong = [kind for kind, digest in self.expected.items() if found[kind] != digest]
        if not wrong or (wrong == ["etag"] and len(self.expected) > 1):
            return
        before, self.wrong = self.wrong, found
        said = f"its {wrong[0]} is {found[wrong[0]]} and not {self.expected[wrong[0]]}"
        if before != found:  # at the first time it may be the way here
            self.writer.begin_again(())
            raise stores.Wrong(said)
        if wrong != ["etag"]:
            raise stores.Refused(f"{said}, twice")
        _tell_of_etags()  # whole it is, as it came twice


@functools.cache
def _tell_of_etags() -> None:
    log.warning("the ETags of this store are no MD5 (as with KMS keys), so each shard is fetched twice to compare")


def _tried(function: Callable, url: str, progress=lambda: (0, 0.0), should_leave: Callable[[], bool] | None = None):
    """`function()`, again and again while it fails and might not, until nothing has come for as long as a wait may
    last. What brings something and gets nowhere, and what nobody waits for yet, is tried `ATTEMPTS` times.

    progress: (bytes that are here, when the last of them came). Raises RunStopped with the URL and the reason.
    """
    failed = num_wrong = num_vain = furthest = 0
    pause, since = FIRST_PAUSE_SECONDS, time.monotonic()
    while True:
        try:
            found = function()
        except stores.Refused as error:
            raise RunStopped(
                f"{url} cannot be fetched: {error}; correct the URL, or look at what serves it."
            ) from error
        except stores.Failed as error:
            (here, came_at), is_wrong = progress(), isinstance(error, stores.Wrong)
            if here > furthest:
                furthest, failed, num_vain, pause = here, 0, 0, FIRST_PAUSE_SECONDS
            failed, num_wrong, num_vain = failed + 1, num_wrong + is_wrong, num_vain + (came_at > since)
            furthest, since = 0 if is_wrong else furthest, max(since, came_at)
            left = since + patience.timeout_seconds - time.monotonic()
            num_counted = max(num_wrong, num_vain, failed if should_leave is not None else 0)
            if left <= pause or num_counted >= ATTEMPTS:
                raise RunStopped(
                    f"{url} cannot be fetched, after {counted(failed, 'attempt')}: {error}; look at what serves it, "
                    f"and run again."
                ) from error
            _failures[url] = str(error)
            if should_leave is None:
                doing(f"it tries {shown(url)} again: {error}".encode())
            own = pause * random.SystemRandom().uniform(0.5, 1)
            _pause(min(max(own, error.pause), 0.9 * left), should_leave)  # the last attempt is before the wait ends
            pause = min(2 * pause, MAX_PAUSE_SECONDS)
        else:
            _failures.pop(url, None)
            return found


_failures: dict[str, str] = {}  # why what is asked of a URL is being tried again, by URL


def _why_again(url: str) -> str:
    """For the sentence of a wait; "" where nothing has failed."""
    return f" ({why})" if (why := _failures.get(url)) else ""


def _pause(seconds: float, should_leave: Callable[[], bool] | None) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if should_leave is not None and should_leave():
            raise Left
        time.sleep(min(0.1, seconds))


# ---- URLs into shards


def remote_shards(urls: list[str]) -> list[str]:
    """The same paths, with each URL of a store as a `RemoteShard`. Raises UserError where a library or the cache is
    missing, and RunStopped for what a store does not give."""
    wanted = [url for url in urls if not isinstance(url, RemoteShard) and stores.is_stored(url)]
    if not wanted:
        return urls
    for url in {url.partition(":")[0]: url for url in wanted}.values():
        stores.prepare(url)
    cache = _cache()
    new = list(dict.fromkeys(wanted))
    folders: dict[str, list[str]] = {}
    for url in new:
        folders.setdefault(url.rpartition("/")[0], []).append(url)
    listed = [some[0] for some in folders.values() if len(some) >= _WORTH_A_LISTING and not some[0].startswith("http")]
    for _ in in_threads(stores.list_folder, listed, lambda url: f"the files beside {url}"):
        pass
    describe = lambda url: _tried(lambda: stores.describe(url), url)  # noqa: E731
    said = in_threads(describe, new, lambda url: f"the size of {url}{_why_again(url)}", _ASKED_AT_ONCE)
    shards = {url: _shard(url, described, cache) for url, described in zip(new, said, strict=True)}
    return [url if isinstance(url, RemoteShard) else shards.get(url, url) for url in urls]


def matching(pattern: str) -> list[str]:
    """The URLs of a pattern, sorted. Raises UserError where none matches."""
    if pattern.lower().startswith("http"):
        raise UserError(f"{pattern} cannot be listed by its server; write numbers in braces, such as {{000..099}}.tar.")
    stores.prepare(pattern)
    found = _tried(lambda: stores.matching(pattern), pattern)
    if not found:
        raise UserError(f"Nothing matches {pattern}; correct data.shards.")
    return found


def is_pattern(url: str) -> bool:
    """Whether a URL has wildcards; `?` in one of a server begins its query."""
    of_server = url.lower().startswith("http")
    return "*" in url.partition("?")[0] if of_server else "*" in url or "?" in url


def _shard(url: str, said: stores.Described, cache: NodeCache) -> RemoteShard:
    shard = RemoteShard(url)
    shard.size, shard.checksums, shard.version, shard.cache = said.size, dict(said.checksums), said.version, cache
    if shard.size > cache.limit:
        raise UserError(
            f"{url} has {said.size / GIB:.3g} GiB, more than all of data.cache_gib={cache.limit / GIB:.3g}; write a "
            f"larger one."
        )
    return shard


def _cache() -> NodeCache:
    folder, limit = _setting.folder or str(cache_folder() / "shards"), int(_setting.gib * GIB)
    if (folder, limit) not in _caches:
        cache = NodeCache(folder, limit)
        cache.check()
        _caches[folder, limit] = cache
    return _caches[folder, limit]


_caches: dict[tuple[str, int], NodeCache] = {}


# ---- whatever a shard is


def shard_name(path: str) -> str:
    """The name of its file, or of a folder of images."""
    return path.name if hasattr(path, "name") else os.path.basename(path)  # a remote one and a folder know theirs


def named(paths: Sequence[str]) -> str:
    """Shards, in a sentence."""
    return paths[0] if len(paths) == 1 else f"{paths[0]} and the rest"


def open_shard(path: str) -> int:
    """A descriptor to read a shard by offset, to be closed soon. Raises OSError, and RunStopped for a remote one."""
    return path.open() if isinstance(path, RemoteShard) else open_file(path)


def read_some(path: str, offset: int, size: int) -> bytes:
    """A few bytes of a shard that is not going to be read whole now. Raises OSError, BadImage, and RunStopped for a
    remote one."""
    if hasattr(path, "peek"):  # a remote one, or a folder of images
        return path.peek(offset, size)
    fd = open_file(path)
    try:
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)


def read_beside(url: str) -> bytes | None:
    """A small file of a store; None where there is none. Raises RunStopped where the store fails."""
    return _tried(lambda: stores.read_whole(url), url)
