"""Which rank the others wait for, told while there is still somebody to tell it.

- Each rank writes once a second into a store of its own connection what it is doing: how many places that all ranks
  pass it has passed, the step, the innermost function of its main thread. A rank that waits inside a collective cannot
  say who is missing; these notes can.
- Rank 0 reads all notes, the others read rank 0's and its verdict, so that a thousand ranks are a thousand small
  messages a second. After a minute of waiting rank 0 warns; after the limit every rank leaves with exit code 3 and one
  sentence that names rank, host and last checkpoint.
- Where the others wait in `distributed.gather`, which has no limit of torch's, a rank whose data keep coming (an index
  of many shards takes longer than any limit) is warned of, and not given up. No connection breaks there either: a rank
  that says nothing for a minute has died.
- It costs the step nothing: the main thread sets a few attributes (`reach`), threads do the rest, and none of them
  touches the device. They are daemons, and keep no process alive.
"""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist

from prelude.data.errors import RunStopped
from prelude.pretrain import stopping
from prelude.pretrain.meeting import Meeting, first_line, named

_MESSAGES_A_SECOND = 256  # that the store of rank 0 is given at most
_COMMUNICATION = re.compile(r"gloo|nccl|ucc|connection (closed|reset)|broken pipe|socket|store", re.IGNORECASE)
_SILENCE = 60.0  # seconds without a note, of which there is one a second, in a gathering
_COLLECTIVE_CALL, _GATHERING = "a collective", "a gathering"
_NO_STORE = "its store does not answer"
_COLLECTIVE = re.compile(r"torch.distributed|deepspeed.comm")


class _Here:
    """What the main thread is doing. Set by it, read by the threads."""

    place = 0  # how many places that all ranks pass
    doing = "starting"
    step: int | None = None
    within = ""  # what returns only when all ranks have come
    moves: Callable[[], int] = staticmethod(lambda: 0)  # how often something has come from its data
    checkpoint: str | None = None  # the last one, as a person would name it


@dataclass
class Note:
    """What one rank said last, and when that was news on this rank's clock."""

    number: int = 0
    place: int = 0
    doing: str = "starting"
    waits: bool = False
    gathers: bool = False  # waits, and has no limit of torch's
    lost: bool = False  # a collective failed under it
    left: int | None = None  # the exit code of a rank that has ended
    why: str = ""
    moves: int = 0
    heard: float = 0.0
    since: float = 0.0  # at this place
    moved: float = 0.0  # when something had come last

    def take(self, text: bytes, now: float) -> None:
        said = json.loads(text)
        if said["number"] != self.number:
            self.heard = now
        if said["place"] != self.place:
            self.since = now
        if said.get("moves", 0) != self.moves:
            self.moved = now
        for name, value in said.items():
            setattr(self, name, value)


def reach(doing: str, step: int | None = None) -> None:
    """Called on every rank, at the same places in the same order; `doing` completes "Rank 1 is …"."""
    _Here.place += 1
    _Here.doing, _Here.step = doing, step


def goes_by(moves: Callable[[], int]) -> None:
    """moves: grows while something comes to this rank, which for so long is not given up by those who gather."""
    _Here.moves = staticmethod(moves)


def saved(checkpoint: str | None) -> None:
    _Here.checkpoint = checkpoint


@contextmanager
def collective(gathers: bool = False) -> Iterator[None]:
    """Around what returns only when all ranks have come. gathers: however long that takes."""
    doing, step = _Here.doing, _Here.step
    _Here.place += 1
    _Here.within = _GATHERING if gathers else _COLLECTIVE_CALL
    try:
        yield
    finally:
        _Here.within = ""
    reach(doing, step)


class Watch:
    """The threads of one rank. `limit`: seconds until those who wait give up."""

    def __init__(self, meeting: Meeting, limit: float, warn_after: float):
        self.meeting, self.limit, self.warn_after = meeting, limit, warn_after
        self.interval = max(min(1.0, limit / 20), meeting.world_size / _MESSAGES_A_SECOND)
        self.patience = max(5 * self.interval, 3.0)  # until silence is an end, where a collective has failed too
        self.silence = max(self.patience, min(limit, _SILENCE))  # until it is an end where others gather
        self.read = now = time.monotonic()  # the notes, last
        self.excused = 0.0  # until when those who gathered saw something come
        heard = range(meeting.world_size) if meeting.rank == 0 else (0,)
        self.notes = {rank: Note(heard=now, since=now) for rank in heard}
        self.main = threading.main_thread().ident
        self.number, self.lost, self.left, self.why = 0, False, None, ""
        self.waiting_since, self.warned = None, False
        self.verdict: dict | None = None
        self.wake, self.decided, self.stopped = threading.Event(), threading.Event(), threading.Event()
        self.explains = self.ends = False
        self.threads = [threading.Thread(target=act, daemon=True) for act in (self._talk, self._judge_on)]
        for thread in self.threads:
            thread.start()

    # ---- one thread: the store, which may keep it waiting

    def _talk(self) -> None:
        store = None
        while True:
            try:
                store = store or self.meeting.connect()
                self._exchange(store)
            except RuntimeError:  # what torch makes of a store that is gone
                if not self.stopped.is_set():
                    self._lose_store()
                return
            if self.stopped.is_set():
                return
            self.wake.wait(self.interval)

    def _lose_store(self) -> None:
        """Rank 0 keeps it to its end, unless an agent does; what it said of its own end is the better reason."""
        if not self.notes[0].left:
            self.notes[0].left, self.notes[0].why = 1, _NO_STORE

    def _exchange(self, store: dist.Store) -> None:
        self.number += 1
        last = self.left is not None
        store.set(f"note/{self.meeting.rank}", json.dumps(self._own_note()))
        keys = [f"note/{rank}" for rank in self.notes]
        if not last and store.check(keys):
            for note, text in zip(self.notes.values(), store.multi_get(keys), strict=True):
                note.take(text, time.monotonic())
            self.read = time.monotonic()
        if self.meeting.rank == 0 and self.verdict:
            store.set("verdict", json.dumps(self.verdict))
        elif self.meeting.rank and store.check(["verdict"]):
            self.verdict = json.loads(store.get("verdict"))
        if last:
            self.stopped.set()

    def _own_note(self) -> dict:
        within, where = self._look_at_main()
        step = "" if _Here.step is None else f" of step {_Here.step}"
        return {
            "number": self.number, "place": _Here.place, "doing": f"{_Here.doing}{step}{where}",
            "waits": bool(within), "gathers": within == _GATHERING, "moves": _Here.moves(),
            "lost": self.lost, "left": self.left, "why": self.why,
        }  # fmt: skip

    def _look_at_main(self) -> tuple[str, str]:
        """(what it is within that returns only when all ranks have come, where it is)."""
        frame = sys._current_frames().get(self.main)
        if frame is None:
            return "", ""
        where = f" (in {frame.f_code.co_name}, {os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"
        within = _Here.within
        while frame and not within:
            within = _COLLECTIVE_CALL if _COLLECTIVE.search(frame.f_code.co_filename) else ""
            frame = frame.f_back
        return within, where

    # ---- the other thread: only clocks

    def _judge_on(self) -> None:
        while not self.stopped.wait(self.interval):
            if self.verdict is None:
                self.verdict = self._judge_all() if self.meeting.rank == 0 else self._judge_first()
            if self.verdict is not None:
                self._end()
                return

    def _judge_all(self) -> dict | None:
        """On rank 0. A rank is waited for that has passed the fewest places; among several, one that is not itself
        inside a collective."""
        now = time.monotonic()
        present = {rank: note for rank, note in self.notes.items() if note.left != 0}
        behind = min(note.place for note in present.values())
        awaited = [rank for rank, note in present.items() if note.place == behind]
        awaited = [rank for rank in awaited if not self._waits(present[rank], now)] or awaited
        waiting = {rank: note for rank, note in present.items() if rank not in awaited or self._waits(note, now)}
        if not waiting:
            self.waiting_since = None
            return None
        if self.waiting_since is None or self.waiting_since[0] != (behind, awaited):
            self.waiting_since, self.warned = ((behind, awaited), now), False
        seconds = now - self.waiting_since[1]
        gathering = all(note.gathers for note in waiting.values())
        if gathering:  # kept: who gathered is in the next collective before the last to come has said that it came
            moving = (present[rank] for rank in awaited if not self._waits(present[rank], now))
            self.excused = max((note.moved for note in moving), default=0.0)
        without = min(seconds, now - self.excused)
        for rank in present if gathering else awaited:
            note = present[rank]
            if note.left is not None:  # and so says nothing more
                if seconds > self.patience:
                    return self._sentence(f"Rank {rank} on {self._host(rank)} has ended with {_ended(note)}", note.left)
            elif self._has_died(note, now, gathering):
                return self._sentence(
                    f"Rank {rank} on {self._host(rank)} has died; when last heard of it was {note.doing}"
                )
        if without > self.limit:
            awaited = self._awaited(awaited, now)
            return self._sentence(f"{awaited} for {without:.0f} s (train.rank_timeout_seconds)")
        if seconds > self.warn_after and not self.warned:
            self.warned = True
            reading = " in which it reads nothing" if gathering else ""
            _print(
                f"warning: {len(waiting)} of {self.meeting.world_size} ranks wait: {self._awaited(awaited, now)} "
                f"for {seconds:.0f} s; the run ends after {self.limit:.0f} s of this{reading}."
            )
        return None

    def _judge_first(self) -> dict | None:
        """On the others: rank 0 itself, which keeps the store or at least has to be heard in it."""
        note, now = self.notes[0], time.monotonic()
        silent = now - note.heard
        within = self._look_at_main()[0]
        stuck = within or self.lost or silent > self.limit
        if note.left and stuck:
            ended = "has died" if note.why == _NO_STORE else f"has ended with {_ended(note)}"
            return self._sentence(f"Rank 0 on {self._host(0)} {ended}", note.left)
        gone = within == _GATHERING and self.read - note.heard > self.silence
        if gone or silent > (self.patience if self.lost else self.limit):
            return self._sentence(f"Rank 0 on {self._host(0)} has not been heard of for {silent:.0f} s")
        if silent > self.warn_after and not self.warned:
            self.warned = True
            _print(f"warning: rank 0 on {self._host(0)} has not been heard of for {silent:.0f} s.")
        return None

    def _has_died(self, note: Note, now: float, gathering: bool) -> bool:
        """In a gathering no collective fails, and silence is counted only while this rank does read notes."""
        if self._is_silent(note, now) and any(other.lost for other in self.notes.values() if other.left != 0):
            return True
        return gathering and self.read - note.heard > self.silence

    def _waits(self, note: Note, now: float) -> bool:
        return (note.waits or note.lost) and note.left is None and not self._is_silent(note, now)

    def _is_silent(self, note: Note, now: float) -> bool:
        return now - note.heard > self.patience

    def _awaited(self, ranks: list[int], now: float) -> str:
        if len(ranks) == self.meeting.world_size:
            return f"{named(ranks)} have been waiting for one another, {self.notes[ranks[0]].doing},"
        texts = []
        for rank in ranks[:3]:
            note = self.notes[rank]
            silent = " and not heard of" if self._is_silent(note, now) else ""
            texts.append(f"rank {rank} on {self._host(rank)} has been {note.doing}{silent}")
        text = "; ".join(texts) + ("; and others" if len(ranks) > 3 else "")
        return text[0].upper() + text[1:]

    def _host(self, rank: int) -> str:
        return self.meeting.hosts[rank]

    def _sentence(self, what: str, left: int | None = None) -> dict:
        do = "Look at that rank's output and host, then start the same command again."
        return {
            "code": left if left in (stopping.PREEMPTED, stopping.INTERRUPTED) else RunStopped.exit_code,
            "text": f"{what}, and the others cannot go on without it.{_kept()} {do}",
        }

    def _end(self) -> None:
        self.decided.set()
        if self.explains:
            return  # the main thread has come back from its collective, and ends in its own way
        self.ends = True
        _print(f"error: {self.verdict['text']}")
        if self.meeting.rank == 0:
            time.sleep(4 * self.interval)  # its end may be the store's: the others read the verdict first
        os._exit(self.verdict["code"])

    # ---- for the main thread

    def explain(self, error: Exception) -> RunStopped | None:
        """What a failed collective means: who is missing. None where the error is of another kind."""
        if not (isinstance(error, dist.DistError) or _COMMUNICATION.search(str(error))):
            return None
        if self.ends:
            time.sleep(60)  # the other thread has told it, and ends the process
        self.explains = self.lost = True
        self.decided.wait(2 * self.patience + 5 * self.interval)
        if self.verdict is None:
            return RunStopped(
                f"Rank {self.meeting.rank} lost the other ranks while it was {_Here.doing} ({first_line(error)})."
                f"{_kept()} Start the same command again."
            )
        stopped = RunStopped(self.verdict["text"])
        stopped.exit_code = self.verdict["code"]
        return stopped

    def leave(self, code: int, why: str) -> None:
        """Tells the others that this rank ends, and how. Returns soon, whether they hear it or not."""
        self.why, self.left = why, code
        self.wake.set()
        self.threads[0].join(3 * self.interval)
        self.stopped.set()
        until = time.monotonic() + 4 * self.interval
        while code and self.meeting.keeps_store and time.monotonic() < until and not self._all_have_left():
            time.sleep(0.05)  # they read it before this process takes the store along

    def _all_have_left(self) -> bool:
        store, keys = self.meeting.store, [f"note/{rank}" for rank in range(self.meeting.world_size)]
        return store.check(keys) and all(json.loads(text)["left"] is not None for text in store.multi_get(keys))


def _kept() -> str:
    return "" if _Here.checkpoint is None else f" The last checkpoint is {_Here.checkpoint}."


def _ended(note: Note) -> str:
    return f"exit code {note.left}" + (f" ({note.why})" if note.why else "")


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
