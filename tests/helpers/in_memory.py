"""What an engine is handed, without shards or disk: a loader over images in memory, no store, a monitor that keeps."""

from prelude.launch.made_up_data import MemoryLoader
from prelude.pretrain.monitors import Monitor

__all__ = ["MemoryLoader", "NoStore", "Recorder"]


class NoStore:
    def newest(self):
        return None

    newest_for_all = newest

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
