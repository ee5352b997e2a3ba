"""How far a look into the order goes, and when it is the last: of shards and a cache that are only said to be there."""

import math
import threading
import time
from collections.abc import Iterator
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest

from prelude.data import fetching
from prelude.data.fetching import AT_ONCE, fetch_ahead
from prelude.data.remote_shards import RemoteShard

SAMPLES = 100  # of a shard
SHARDS = 2000
LOOKED_AT = 1000  # positions that the source gives at once


class Cache:
    """Which of the shards are here. Bringing one takes no time."""

    def __init__(self, limit: int):
        self.limit, self.here, self.brought = limit, set(), []

    def has(self, name: str) -> bool:
        return name in self.here

    def touch(self, name: str) -> None:
        pass

    def bring_ahead(self, name: str, size: int, bring) -> bool:
        if name not in self.here:
            self.here.add(name)
            self.brought.append(name)
        return True


class Reading:
    """One shard after the other, without end."""

    def __init__(self, limit: int = SHARDS):
        self.cache, self.looked_at = Cache(limit), 0
        self.shards = [RemoteShard(f"s3://bucket/{number:06}.tar") for number in range(SHARDS)]
        for shard in self.shards:
            shard.size, shard.version, shard.cache = 1, "", self.cache
        self.index = SimpleNamespace(paths=tuple(self.shards), ends=np.arange(1, SHARDS + 1) * SAMPLES)

    def have(self, numbers) -> None:
        self.cache.here |= {self.shards[number].cache_name for number in numbers}

    def brought(self) -> list[int]:
        numbers = {shard.cache_name: number for number, shard in enumerate(self.shards)}
        return [numbers[name] for name in self.cache.brought]

    def ahead(self, nth: int) -> Iterator[np.ndarray]:
        for begin in count(nth * SAMPLES, LOOKED_AT):
            self.looked_at += LOOKED_AT
            yield (begin + np.arange(LOOKED_AT)) % (SHARDS * SAMPLES)

    def steps(self, room: float = 1.0):
        """A micro-batch is a shard, so that its number is that of the shard."""
        return fetch_ahead(({"__key__": f"{nth:09}"} for nth in count()), self, self.index, room)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name in ("_LOOK_SECONDS", "_REST_SECONDS", "_PLAN_SECONDS"):
        monkeypatch.setattr(fetching, name, 0.001)
    monkeypatch.setattr(fetching, "_PLANNING", math.inf)
    monkeypatch.setattr(fetching, "_MOST_SAMPLES", 20 * LOOKED_AT)  # 200 shards


def until(true) -> bool:
    end = time.monotonic() + 20
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    return true()


def threads_beside(before: set) -> set:
    return set(threading.enumerate()) - before


def test_where_all_shards_are_here_to_stay_the_order_is_looked_into_once():
    reading = Reading()
    reading.have(range(SHARDS))
    steps = reading.steps()
    next(steps)
    assert until(lambda: reading.looked_at >= 20 * LOOKED_AT)
    for _ in range(200):
        next(steps)
        time.sleep(0.001)
    assert reading.looked_at <= 20 * LOOKED_AT and not reading.brought()
    steps.close()


def test_one_of_them_that_another_job_removes_is_fetched_again(monkeypatch):
    monkeypatch.setattr(fetching, "_STAYING_SECONDS", 0.05)
    reading = Reading()
    reading.have(range(SHARDS))
    steps = reading.steps()
    next(steps)
    assert until(lambda: reading.looked_at >= 20 * LOOKED_AT)
    reading.cache.here.remove(reading.shards[210].cache_name)  # further on than was looked
    for _ in range(100):
        next(steps)
    assert until(lambda: reading.brought() == [210])
    steps.close()


def test_all_shards_are_fetched_in_their_order():
    reading = Reading()
    steps = reading.steps()
    next(steps)
    assert until(lambda: len(reading.cache.brought) >= 190)  # 200 are within what is looked through
    first = reading.brought()[:100]
    assert max(first) < 100 + 4 * AT_ONCE  # a few dozen further than the first that is missing
    for _ in range(SHARDS - 1):
        next(steps)
        if len(reading.cache.here) == SHARDS:
            break
        time.sleep(0.002)
    assert until(lambda: len(reading.cache.here) == SHARDS)
    steps.close()


def test_a_shard_far_ahead_is_fetched_once_the_reader_comes_near():
    reading = Reading()
    reading.have(set(range(SHARDS)) - {1000})
    steps = reading.steps()
    next(steps)
    assert until(lambda: reading.looked_at >= 20 * LOOKED_AT)
    time.sleep(0.1)
    assert reading.looked_at <= 20 * LOOKED_AT and not reading.brought()  # it rests while nobody reads
    for _ in range(900):
        next(steps)
    assert until(lambda: reading.brought() == [1000])
    steps.close()


def test_a_cache_that_cannot_hold_all_is_never_done():
    reading, before = Reading(limit=SHARDS // 2), set(threading.enumerate())
    reading.have(range(SHARDS))
    steps = reading.steps()
    next(steps)
    time.sleep(0.1)
    assert len(threads_beside(before)) == AT_ONCE and reading.looked_at <= 20 * LOOKED_AT
    steps.close()
    assert until(lambda: not threads_beside(before))
