"""Says when a run waits for its data, and what to do about it."""

from prelude.data.counting import counted
from prelude.pretrain.monitors import Monitor, Report, StepRecord
from prelude.pretrain.schedules import Progress

TOO_MUCH = 0.1  # of the time
_STEPS = 20  # in a row, before anything is said


class DataWaitWatch(Monitor):
    """Warns, once a start, when more than a tenth of the time went into waiting at each of the logged steps of the last
    twenty or more. The first one is left out: workers start, and caches are empty."""

    def __init__(self, num_workers: int, num_cores: int):
        """Of one rank."""
        self.num_workers, self.num_cores = num_workers, num_cores
        self.reports: list[Report] = []
        self.told = False
        self.before: int | None = None  # the step of the last record

    def start(self, progress: Progress) -> None:
        self.before, self.steps, self.waited = None, 0, 0.0

    def record(self, record: StepRecord) -> None:
        before, self.before = self.before, record.step
        if before is None or self.told:
            return
        if record.data_wait <= TOO_MUCH:
            self.steps, self.waited = 0, 0.0
            return
        steps = record.step - before
        self.steps, self.waited = self.steps + steps, self.waited + steps * record.data_wait
        if self.steps >= _STEPS:
            self.told = True
            self.reports.append(Report(record.step, "notice", self._sentence(self.waited / self.steps, record)))

    def found(self) -> list[Report]:
        reports, self.reports = self.reports, []
        return reports

    def _sentence(self, share: float, record: StepRecord) -> str:
        of = f"{self.num_workers} loader workers" if self.num_workers != 1 else "one loader worker"
        return (
            f"{share:.0%} of the time of the last {counted(self.steps, 'step')} went into waiting for data, at "
            f"{record.images_per_second:.0f} images/s with {of} a rank; {self._remedy()}"
        )

    def _remedy(self) -> str:
        smaller = "pack smaller images with `prelude shards pack SHARDS --to DIR --short-side PIXELS`"
        if self.num_workers < self.num_cores:
            return f"write data.num_workers={self.num_cores}, a rank's share of the cores, or {smaller}."
        return f"{smaller}, or give a rank more than its {counted(self.num_cores, 'core')}."
