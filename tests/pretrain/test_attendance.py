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


def test_a_rank_whose_data_keep_coming_is_not_given_up_before_they_stop():
    """It indexes its shards, which takes longer than the others wait for a rank that does nothing."""
    store = dist.HashStore()
    meeting = SimpleNamespace(rank=0, world_size=2, hosts=("here", "there"), keeps_store=True, store=store)
    meeting.connect = lambda: store
    note = {"place": -1, "doing": "indexing shards", "waits": False, "lost": False, "left": None, "why": ""}
    store.set("note/1", json.dumps(note | {"number": 0, "moves": 0}))
    watch = Watch(meeting, limit=0.8, warn_after=0.4)
    watch.explains = True  # its verdict does not end this process
    with attendance.collective():
        for number in range(1, 30):
            store.set("note/1", json.dumps(note | {"number": number, "moves": min(number, 18)}))
            if number == 18:
                assert watch.verdict is None
            time.sleep(0.1)
        watch.decided.wait(3.0)
    watch.leave(0, "")
    assert watch.verdict["text"].startswith("Rank 1 on there has been indexing shards for ")


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
