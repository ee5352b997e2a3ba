"""What a rank says of another that has ended or is waited for, from the notes that both leave in a store."""

import json
import threading
import time
from types import MappingProxyType, SimpleNamespace

import pytest
import torch.distributed as dist

from prelude.pretrain import attendance
from prelude.pretrain.attendance import Watch
from prelude.pretrain.meeting import Meeting


@pytest.mark.parametrize("left, code", [(130, 130), (75, 75), (2, 3)])
def test_a_rank_that_said_that_it_ends_has_not_died_and_its_reason_is_that_of_all(left, code):
    store = dist.HashStore()
    meeting = SimpleNamespace(rank=0, world_size=2, hosts=("here", "there"), keeps_store=True, store=store)
    meeting.connect = lambda: store
    note = {"number": 1, "place": -1, "doing": "looking for a checkpoint", "waits": False, "lost": False}
    store.set("note/1", json.dumps(note | {"left": left, "why": "its own reason"}))
    watch = Watch(meeting, limit=4.0, warn_after=2.0)
    watch.patience = 0.8
    time.sleep(0.6)  # it is heard of before anybody waits for it
    stopped = watch.explain(dist.DistError("gloo: connection closed by peer"))
    watch.leave(0, "")
    assert stopped.exit_code == code
    assert str(stopped).startswith(f"Rank 1 on there has ended with exit code {left} (its own reason), and the others")


def two_ranks(limit, **said):
    """(the store of both, the watch of the first, whose verdict does not end this process, what the second says)."""
    store = dist.HashStore()
    meeting = SimpleNamespace(rank=0, world_size=2, hosts=("here", "there"), keeps_store=True, store=store)
    meeting.connect = lambda: store
    note = {"place": -1, "doing": "indexing shards", "waits": False, "lost": False, "left": None, "why": ""} | said
    store.set("note/1", json.dumps(note | {"number": 0, "moves": 0}))
    watch = Watch(meeting, limit=limit, warn_after=limit / 2)
    watch.explains = True
    return store, watch, note


def test_a_rank_whose_data_keep_coming_is_not_given_up_before_they_stop():
    """It indexes its shards, which takes longer than the others wait for a rank that does nothing."""
    store, watch, note = two_ranks(limit=0.8)
    with attendance.collective(gathers=True):
        for number in range(1, 30):
            store.set("note/1", json.dumps(note | {"number": number, "moves": min(number, 18)}))
            if number == 18:
                assert watch.verdict is None
            time.sleep(0.1)
        watch.decided.wait(3.0)
    watch.leave(0, "")
    assert watch.verdict["text"].startswith("Rank 1 on there has been indexing shards for ")


def test_data_that_come_excuse_nobody_whom_a_collective_waits_for():
    """It has torch's own limit, after which nobody is named."""
    store, watch, note = two_ranks(limit=0.8, doing="waiting for data of step 5")
    with attendance.collective():
        for number in range(1, 20):
            store.set("note/1", json.dumps(note | {"number": number, "moves": number}))
            if watch.decided.wait(0.1):
                break
    watch.leave(0, "")
    assert watch.verdict["text"].startswith("Rank 1 on there has been waiting for data of step 5 for 1 s")


def test_a_rank_that_has_just_come_is_not_given_up_for_the_time_that_it_was_excused():
    """The others are in the next collective before its own note says that it came."""
    store, watch, note = two_ranks(limit=0.8)
    with attendance.collective(gathers=True):
        for number in range(1, 15):
            store.set("note/1", json.dumps(note | {"number": number, "moves": number}))
            time.sleep(0.1)
    with attendance.collective():
        watch.decided.wait(0.4)
        assert watch.verdict is None
    watch.leave(0, "")


def test_a_rank_that_is_killed_while_others_gather_has_died_long_before_the_limit():
    """No connection breaks there: its notes stop."""
    store, watch, note = two_ranks(limit=8)
    watch.patience = watch.silence = 1.2
    with attendance.collective(gathers=True):
        for number in range(1, 8):
            store.set("note/1", json.dumps(note | {"number": number, "moves": number}))
            time.sleep(0.2)
        assert watch.verdict is None
        watch.decided.wait(4.0)
    watch.leave(0, "")
    assert watch.verdict["text"].startswith("Rank 1 on there has died; when last heard of it was indexing shards")


def test_ranks_gather_without_a_limit_as_often_as_they_like():
    store, come = dist.HashStore(), []
    meetings = [Meeting(rank, 2, ("", 0), store, False, (), MappingProxyType({})) for rank in range(2)]
    for nth in (1, 2):
        first = threading.Thread(target=lambda nth=nth: (meetings[0].gather(nth), come.append(nth)))
        first.start()
        time.sleep(0.3)
        assert come == list(range(1, nth))
        meetings[1].gather(nth)
        first.join(5)
        assert come == list(range(1, nth + 1))
