"""How fast a run is, and how much of its time goes into waiting for data."""

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    images_per_second: float
    step_seconds: float
    data_wait: float  # share of the time, 0..1


class Meter:
    """Speed and the share of time spent waiting for data, since the last reading."""

    def __init__(self, global_batch: int):
        self.global_batch = global_batch
        self.started, self.total_steps = time.perf_counter(), 0
        self._reset()

    def waiting_for_data(self) -> "Meter":
        return self

    def __enter__(self) -> None:
        self.entered = time.perf_counter()

    def __exit__(self, *_) -> None:
        self.waited += time.perf_counter() - self.entered

    def step_done(self) -> None:
        self.steps += 1
        self.total_steps += 1

    def seconds_per_step(self) -> float:
        """On average since the start, saving and pictures included: what an ETA is made of."""
        return (time.perf_counter() - self.started) / self.total_steps

    def read(self) -> Reading:
        elapsed, steps = time.perf_counter() - self.since, max(self.steps, 1)
        found = Reading(self.steps * self.global_batch / elapsed, elapsed / steps, self.waited / elapsed)
        self._reset()
        return found

    def _reset(self) -> None:
        self.since, self.waited, self.steps = time.perf_counter(), 0.0, 0
