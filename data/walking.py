"""Many shards walked once, by as many processes as there are cores, with a progress bar.

- What a shard holds is kept by whoever walks it. A process that dies, or a shard that it could not read, costs nothing
  but time: whoever asked walks what is not there yet, and says what is wrong.
- A few shards are walked here: processes are started when that has taken a second.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

from prelude.data.errors import RunStopped, UserError
from prelude.data.host import num_cores
from prelude.data.progress import progress_bar
from prelude.data.waiting import end_with_parent, moved, while_it_moves

ALONE_SECONDS = 1.0
_DONE, _GOING_ON = b".", b" "
_START_METHOD = "fork" if sys.platform == "linux" else "spawn"  # they import nothing anew, and use neither GPU nor pool


def walk_all(shards: Sequence, walk: Callable, tell: Callable) -> None:
    """`walk(shard)` of every shard, here or in another process. Raises what `walk` does where it is called here.

    tell: gets the shard that is walked here from now on, None when that is over.
    """
    began = time.monotonic()
    with progress_bar("indexing shards", len(shards)) as advance:
        for number, shard in enumerate(shards):
            left = shards[number:]
            processes = 0 if multiprocessing.current_process().daemon else min(num_cores(), len(left))
            if processes > 1 and time.monotonic() - began > ALONE_SECONDS:
                tell(None)
                _in_processes(left, walk, processes, advance)
                return
            tell(shard)
            walk(shard)
            moved()
            advance(1)
        tell(None)


def _in_processes(shards: Sequence, walk: Callable, count: int, advance: Callable[[int], None]) -> None:
    context = multiprocessing.get_context(_START_METHOD)
    reading, writing = context.Pipe(duplex=False)
    started = [
        context.Process(target=_walk_some, args=(shards[number::count], walk, writing), daemon=True)
        for number in range(count)
    ]
    try:
        for process in started:
            process.start()
        writing.close()  # the pipe ends with the last of them
        while told := os.read(reading.fileno(), 1):
            moved()
            if told == _DONE:
                advance(1)
    finally:
        for process in started:
            if process.pid is not None:
                process.kill()
                process.join()
        reading.close()


def _walk_some(shards: Sequence, walk: Callable, writing) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    with while_it_moves(lambda: os.write(writing.fileno(), _GOING_ON)):  # a shard may take long
        for shard in shards:
            with contextlib.suppress(OSError, UserError, RunStopped):
                walk(shard)
            os.write(writing.fileno(), _DONE)
