"""Remote shards, fetched before they are needed; and whether the cache has room for what the order needs at once.

- The order is known, so the shards of the next positions are fetched by threads beside the reading, those that come
  first at first. Processes of a node share the work: a shard that another one is fetching is passed over.
- No further ahead than the cache has room for; what will be needed soon is not removed. Those that read side by side,
  images and volumes, have a part of the room each.
- A look into the order ends at a few dozen shards that are missing, or where the next hundreds of thousands of samples
  are here, and comes again when these are fetched, or the reader has moved on; where all are here to stay, seldom.
- A fetch ahead that fails is no end of the run: whoever needs the shard tries again, and tells.
"""

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from prelude.data.errors import RunStopped, UserError
from prelude.data.mixed_order import order_of, passes
from prelude.data.node_cache import GIB
from prelude.data.order import Order, Shuffle
from prelude.data.remote_shards import Left, RemoteShard
from prelude.data.shards import ShardIndex
from prelude.data.source import worker

log = logging.getLogger(__name__)

AT_ONCE = 8  # shards that a node fetches
_LOOK_SECONDS = 0.2
_REST_SECONDS = 1.0  # when all that has room is there, and after a failure
_PLAN_SECONDS = 2.0  # for which a plan is good, at least; a longer look is good for longer
_STAYING_SECONDS = 60.0  # where all are here, and only another job on the node can remove one
_PLANNING = 1 / 20  # of the time, at most
_MOST_MISSING = 4 * AT_ONCE  # shards of a plan that are to be fetched
_MOST_SAMPLES = 2**18  # that a plan looks through, a quarter of a second's work and many seconds' reading


def fetch_ahead(steps, source, index: ShardIndex, room: float = 1.0):
    """Passes steps on while the shards of later ones are fetched. source: has `ahead`. room: the share of the cache
    that they may fill."""
    threads = num_threads(*worker()) if any(isinstance(path, RemoteShard) for path in index.paths) else 0
    if not threads:
        yield from steps
        return
    ahead = _Ahead(index, source.ahead, room)
    for _ in range(threads):
        threading.Thread(target=ahead.run, daemon=True).start()
    try:
        for step in steps:
            ahead.nth = int(step["__key__"])
            yield step
    finally:
        ahead.left.set()


def num_threads(number: int, num_workers: int) -> int:
    """Of one worker, so that a node has `AT_ONCE`, or one a rank where there are more ranks."""
    of_rank = max(AT_ONCE // max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1), 1)
    return of_rank // num_workers + (number < of_rank % num_workers)


class _Ahead:
    """The shards that come next, and the threads that fetch them."""

    def __init__(self, index: ShardIndex, samples_from: Callable[[int], Iterator[np.ndarray]], room: float):
        self.paths, self.ends, self.samples_from = index.paths, index.ends, samples_from
        self.remote = {path for path in self.paths if isinstance(path, RemoteShard)}
        limit = room * next(iter(self.remote)).cache.limit
        self.holds_all = _bytes(self.remote) <= limit
        self.room = math.inf if self.holds_all else limit - max(shard.size for shard in self.remote)
        self.nth, self.left = 0, threading.Event()
        self.lock, self.plan, self.planned_for, self.due_at = threading.Lock(), [], -1, 0.0
        self.continues = False  # once its shards are here
        self.has_all = False
        self.plans = 0
        self.failed_at: dict[str, float] = {}

    def run(self) -> None:
        while not self.left.wait(_LOOK_SECONDS):
            try:
                rests = self._fetch_next()
            except Left:
                return
            if rests:
                self.left.wait(_REST_SECONDS)

    def _fetch_next(self) -> bool:
        """Whether there is nothing to be done for a while."""
        missing = [shard for shard in self._next_shards() if not shard.is_here()]
        plans = self.plans
        for shard in missing:
            if time.monotonic() - self.failed_at.get(shard, -_REST_SECONDS) < _REST_SECONDS:
                continue
            try:
                if not shard.bring_ahead(self.left.is_set):
                    return True
            except RunStopped as error:
                self.failed_at[shard] = time.monotonic()
                log.debug("%s", error)
            if self.plans != plans:
                break
        return not missing

    def _next_shards(self) -> list[RemoteShard]:
        with self.lock:
            if self._is_due():
                self.planned_for, began = self.nth, time.monotonic()
                self.plan = self._planned(self.planned_for)
                took = time.monotonic() - began
                self.due_at = began + (_STAYING_SECONDS if self.has_all else max(_PLAN_SECONDS, took / _PLANNING))
                self.plans += 1
        for shard in self.plan:
            shard.will_be_needed()
        return self.plan

    def _is_due(self) -> bool:
        if self.continues and all(shard.is_here() for shard in self.plan):
            return True
        return self.planned_for != self.nth and time.monotonic() >= self.due_at

    def _planned(self, nth: int) -> list[RemoteShard]:
        """Those of the next positions, as many as have room beside one that is being fetched for a reader, and no more
        than `_MOST_MISSING` that are not here. Notes whether all are here, and the cache holds them all."""
        found: dict[int, RemoteShard] = {}
        room, num_missing, num_looked_at = self.room, 0, 0
        self.continues = self.has_all = False
        for samples in self.samples_from(nth):
            numbers, first = np.unique(np.searchsorted(self.ends, samples, side="right"), return_index=True)
            for number in numbers[np.argsort(first)].tolist():
                shard = self.paths[number]
                if number in found or not isinstance(shard, RemoteShard):
                    continue
                room -= shard.size
                if room < 0 and found:
                    return list(found.values())
                found[number] = shard
                num_missing += not shard.is_here()
                if num_missing == _MOST_MISSING:
                    self.continues = True
                    return list(found.values())
            num_looked_at += len(samples)
            if num_looked_at >= _MOST_SAMPLES or len(found) == len(self.remote) or self.left.is_set():
                break
        if self.holds_all:
            self.continues = num_missing > 0  # to see whether that was all
            self.has_all = not num_missing and all(shard.is_here() for shard in self.remote)
        return list(found.values())


# ---- room


@dataclass(frozen=True)
class Reading:
    """What is read of an index: all of it in the order of a seed. anywhere: other samples at the same time, too."""

    index: ShardIndex
    seed: int
    anywhere: bool = False

    @cached_property
    def remote(self) -> set[RemoteShard]:
        return {path for path in self.index.paths if isinstance(path, RemoteShard)}

    @cached_property
    def sizes(self) -> np.ndarray:
        """(num_shards,) bytes that each takes of the cache."""
        return np.array([path.size if isinstance(path, RemoteShard) else 0 for path in self.index.paths], np.int64)


def shares_of_room(readings: Sequence[Reading], shuffle: Shuffle, tell: bool) -> list[float]:
    """The share of the cache that each of those that are read side by side may fill ahead.

    Raises UserError where their orders would fetch shards again and again, saying which order or cache would not. tell:
    how much is fetched where the cache cannot hold everything.
    """
    remote = set().union(*(reading.remote for reading in readings))
    total = _bytes(remote)
    if not remote or total <= (limit := next(iter(remote)).cache.limit):
        return [1.0] * len(readings)
    if (anywhere := sum(_bytes(reading.remote) for reading in readings if reading.anywhere)) > limit:
        raise UserError(
            f"objective.pair_by reads images out of order, from any of {anywhere / GIB:.3g} GiB of remote shards, and "
            f"data.cache_gib={limit / GIB:.3g} cannot hold them; write data.cache_gib={1.01 * anywhere / GIB:.3g} or "
            f"more."
        )
    demands = [_demand(reading, shuffle) for reading in readings]
    at_once, fetched = (sum(column) for column in zip(*demands, strict=True))
    if at_once > limit:
        together = ", images and volumes together," if len(readings) > 1 else ","
        raise UserError(
            f"data.shuffle reads shards of {at_once / GIB:.3g} GiB side by side{together} and "
            f"data.cache_gib={limit / GIB:.3g} would have them fetched again and again; write "
            f"{_way_out(readings, shuffle, limit)}."
        )
    if tell:
        log.warning(
            "%.3g GiB of remote shards do not fit into data.cache_gib=%.3g: each node fetches about %.3g GiB %s%s",
            total / GIB, limit / GIB, fetched / GIB,
            "an epoch" if len(readings) == 1 else "for a pass through images and one through volumes",
            f"; data.shuffle.span={_largest(readings)} fetches each shard once" if fetched > 2 * total else "",
        )  # fmt: skip
    return [of_reading / max(at_once, 1) for of_reading, _ in demands]


def _bytes(shards: set[RemoteShard]) -> int:
    return sum(shard.size for shard in shards)


def _largest(readings: Sequence[Reading]) -> int:
    """Samples of the shard that has most."""
    return max(int(reading.index.counts.max()) for reading in readings)


def _demand(reading: Reading, shuffle: Shuffle) -> tuple[int, int]:
    """(bytes of the shards that are read side by side at most, bytes that are fetched in an epoch)."""
    if reading.anywhere:  # and so all of them, at any time
        return _bytes(reading.remote), _bytes(reading.remote)
    index, sizes = reading.index, reading.sizes
    order = order_of(index, reading.seed, shuffle)
    if not index.parts:
        return _demand_of(order, index.ends, sizes)
    of_parts = [  # windows of parts move on apart, so that the largest of each may come together
        _demand_of(one, index.ends - part.begin, sizes) for one, part in zip(order.orders, index.parts, strict=True)
    ]
    fetched = sum(bytes_ * times for (_, bytes_), times in zip(of_parts, passes(index.parts), strict=True))
    return sum(at_once for at_once, _ in of_parts), int(fetched)


def _demand_of(order: Order, ends: np.ndarray, sizes: np.ndarray) -> tuple[int, int]:
    """The same of one pass. ends: where shards end among the order's samples."""
    at_once = fetched = 0
    before = np.zeros(len(sizes), bool)
    for samples in order.first_samples_by_turn(0):
        now = np.zeros(len(sizes), bool)
        now[np.searchsorted(ends, samples, side="right")] = True
        at_once = max(at_once, int(sizes[now].sum()))
        fetched += int(sizes[now & ~before].sum())
        before = now
    return at_once, fetched


def _way_out(readings: Sequence[Reading], shuffle: Shuffle, limit: int) -> str:
    """The settings that are nearest to what was asked for and leave half of the cache for what comes next."""
    whole = _largest(readings)

    def at_once_by(other: Shuffle) -> int:
        return sum(_demand(reading, other)[0] for reading in readings)

    for window in (shuffle.window, *(whole * times for times in (32, 16, 8, 4, 2, 1))):
        for streams in (shuffle.streams, 4, 2):
            if window <= shuffle.window and streams <= shuffle.streams:
                at_once = at_once_by(Shuffle(streams, whole, window))
                if 2 * at_once <= limit:
                    return (
                        f"data.shuffle.span={whole} data.shuffle.window={window} data.shuffle.streams={streams}, which "
                        f"reads shards whole, {at_once / GIB:.3g} GiB side by side, or a larger data.cache_gib"
                    )
    return f"data.cache_gib={2 * at_once_by(Shuffle(2, whole, whole)) / GIB:.3g} or more"
