"""What a rank says of another that has ended, from the notes that both leave in a store."""

import json
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from prelude.pretrain.attendance import Watch


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
