"""The ledger of samples that could not be read: counted, named once, listed in a file.

Each process keeps its own; the sums over ranks are the engine's business.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from prelude.data.counting import counted
from prelude.data.errors import cause_of
from prelude.data.signed_urls import shown
from prelude.data.tar_index import Problem

log = logging.getLogger(__name__)

MAX_LISTED = 100


class BadSamples:
    """`num_bad` of `num_read` attempts to read a sample failed; `counts` has them by (shard, reason).

    path: where the first hundred are appended, a JSON object a line (shard, key, reason, position); None for nowhere.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = path
        self.num_bad = 0
        self.num_read = 0
        self.counts: Counter[tuple[str, str]] = Counter()
        self._listed = 0
        self._named: set[str] = set()
        self._unindexed: list[dict] = []  # not yet listed

    def add(self, shard: str, reason: str, position: int, find_key: Callable[[], str]) -> None:
        """One failed attempt. `find_key` is called only if the sample is listed."""
        self._list_unindexed()
        self.num_bad += 1
        self.num_read += 1
        if shard not in self._named:
            self._named.add(shard)
            log.warning(
                "%s: a sample cannot be read (%s); further ones of this shard are only counted", shown(shard), reason
            )
        self.counts[shard, reason] += 1
        if self.path and self._listed < MAX_LISTED:
            self._listed += 1
            self._append([{"shard": shown(shard), "key": find_key(), "reason": reason, "position": position}])

    def add_read(self, count: int) -> None:
        """Samples that were read and delivered."""
        self.num_read += count
        self._list_unindexed()

    def add_unindexed(self, problems: dict[str, tuple[Problem, ...]]) -> None:
        """What an index left out: logged once a shard, and not part of `num_bad`, as it is never drawn.

        Listed when something is read: until then nobody knows whether the run will be refused, and leave no trace.
        """
        for shard, found in problems.items():
            reasons = Counter(problem.reason for problem in found)
            lost = sum(problem.lost for problem in found)
            about = f" (about {counted(lost, 'sample')})" if lost != len(found) else ""
            listed = ", ".join(f"{n} x {reason}" for reason, n in reasons.items())
            log.warning("%s: left out: %s%s", shown(shard), listed, about)
        every = ((shard, problem) for shard, found in problems.items() for problem in found)
        lines = [{"shard": shown(shard), "key": p.where, "reason": p.reason, "position": None} for shard, p in every]
        self._unindexed = lines[:MAX_LISTED]

    def _list_unindexed(self) -> None:
        lines, self._unindexed = self._unindexed, []
        if self.path and lines:
            self._append(lines)

    def add_unended(self, shards: Sequence[str]) -> None:
        """Shards without their end marker, of which nobody can know whether they are whole."""
        if shards:
            what = "end without an end marker, as after a copy that was cut off between two members"
            log.warning("%d shards %s (the first: %s)", len(shards), what, shown(shards[0]))

    def _append(self, lines: list[dict]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        try:
            with open(self.path, "a", opener=_not_through_a_link) as file:
                file.write(text)  # one write, so that ranks do not cut each other's lines
        except OSError as error:
            log.warning("bad samples are not listed: %s cannot be written (%s)", self.path, cause_of(error))
            self.path = None  # a list that nobody can read is no reason to end a run


def _not_through_a_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
