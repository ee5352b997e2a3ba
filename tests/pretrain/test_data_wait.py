from dataclasses import replace

import pytest

from prelude.pretrain.data_wait import DataWaitWatch
from prelude.pretrain.monitors import StepRecord
from prelude.pretrain.schedules import Progress

RECORD = StepRecord(0, 1000, 0, 0, {}, 0, 0, 0, 321, 0, 0, 0, 0, 0)


def told(waits: list[float], every: int = 10, num_workers: int = 2) -> list[str]:
    watch = DataWaitWatch(num_workers, num_cores=8)
    watch.start(Progress(0, 1000, 10.0))
    found = []
    for nth, wait in enumerate(waits, start=1):
        watch.record(replace(RECORD, step=nth * every, data_wait=wait))
        found += watch.found()
    return [report.text for report in found]


@pytest.mark.parametrize("waits", [[0.9, 0.05, 0.05], [0.3, 0.3], [0.0, 0.2, 0.05, 0.2, 0.05], [0.1] * 9])
def test_a_start_or_a_moment_of_waiting_is_no_reason_to_warn(waits):
    assert told(waits) == []


def test_waiting_that_lasts_is_told_once_with_what_to_do():
    (text,) = told([0.9, 0.2, 0.4, 0.4, 0.4, 0.4])
    assert "30% of the time of the last 20 steps" in text
    assert "data.num_workers=8" in text and "--short-side" in text
    (text,) = told([0.9, 0.2, 0.4], num_workers=8)
    assert "data.num_workers" not in text and "8 cores" in text


def test_every_step_may_be_logged():
    assert told([0.2] * 20, every=1) == []
    assert len(told([0.2] * 21, every=1)) == 1
