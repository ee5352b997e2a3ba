"""How fast a run is, and how much of its time goes into waiting for data."""

import time


class Meter:
    """Images a second and the share of time spent waiting for data, since the last reading."""

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

    def read(self) -> tuple[float, float]:
        elapsed = time.perf_counter() - self.since
        speed, data_wait = self.steps * self.global_batch / elapsed, self.waited / elapsed
        self._reset()
        return speed, data_wait

    def _reset(self) -> None:
        self.since, self.waited, self.steps = time.perf_counter(), 0.0, 0
