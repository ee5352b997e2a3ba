"""Shards written by several processes, which end with the one that started them."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for

from prelude.data.errors import RunStopped
from prelude.data.packing.plan import Shard
from prelude.data.packing.writer import Outcome, ShardWriter

_TICK = 0.2  # seconds between two looks at the counter


def write_shards(
    writer: ShardWriter, shards: list[Shard], workers: int, progress: Callable[[int], None]
) -> Iterator[Outcome]:
    """The outcomes of all shards, in no order. Raises RunStopped where a worker dies, and what `ShardWriter` raises."""
    if min(workers, len(shards)) <= 1:
        done = 0

        def say():
            nonlocal done
            done += 1
            progress(done)

        for shard in shards:
            yield writer.write(shard, say)
        return

    # Forked, the workers share the listing and need not import anything; where that is unsafe they are sent it.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    counter = context.Value("q", 0)
    pool = ProcessPoolExecutor(min(workers, len(shards)), context, _start, (writer, counter))
    try:
        running = {pool.submit(_write, shard) for shard in shards}
        while running:
            finished, running = wait(running, timeout=_TICK, return_when=FIRST_COMPLETED)
            progress(counter.value)
            for future in finished:
                yield future.result()
    except BrokenProcessPool as error:
        raise RunStopped(
            "A process that packs images died, most often for want of memory; write a smaller --workers and give the "
            "same command again, which goes on from there."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_writer: ShardWriter | None = None
_counter = None


def _start(writer: ShardWriter, counter) -> None:
    global _writer, _counter
    _writer, _counter = writer, counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the shard under way is finished
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    wait_for([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _write(shard: Shard) -> Outcome:
    return _writer.write(shard, _count)


def _count() -> None:
    with _counter.get_lock():
        _counter.value += 1
