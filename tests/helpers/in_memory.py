"""What an engine is handed, without shards or disk: a loader over images in memory, no store, a monitor that keeps."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from prelude.data.batch import Batch
from prelude.pretrain import distributed
from prelude.pretrain.monitors import Monitor


class MemoryLoader:
    """The loader's rule of positions: rank r of W takes r, r + W, ... of each global batch."""

    bad = SimpleNamespace(num_bad=0, num_read=0)

    def __init__(self, micro_batch: int, num_samples: int, batch_at: Callable[[Tensor], Batch]):
        self.micro_batch, self.num_samples, self.batch_at, self.consumed = micro_batch, num_samples, batch_at, 0

    def __iter__(self):
        world = distributed.world_size()
        while True:
            positions = self.consumed + torch.arange(self.micro_batch) * world + distributed.rank()
            self.consumed += self.micro_batch * world
            yield self.batch_at(positions)

    def state_dict(self):
        return {"consumed": self.consumed}

    def load_state_dict(self, state, allow_changed_data):
        self.consumed = state["consumed"]


class NoStore:
    def newest(self):
        return None

    def save(self, step, engine, meta): ...

    def has_ended(self):
        return False

    def finish(self):
        return None

    def wait(self): ...


class Recorder(Monitor):
    def __init__(self):
        self.records = []

    def record(self, record):
        self.records.append(record)
