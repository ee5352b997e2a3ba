"""Speed, the share of waiting and the time that is left, by a clock that the test moves."""

from types import SimpleNamespace

import pytest
from engine_cases import NUM_SAMPLES, Regression, batch_at, config_of
from in_memory import MemoryLoader, NoStore, Recorder

from prelude.pretrain import distributed, meter
from prelude.pretrain.engine import Engine
from prelude.pretrain.meter import Meter, Reading


@pytest.fixture
def clock(monkeypatch):
    """`clock(seconds)`: so many pass."""
    now = [1000.0]
    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


def test_a_reading_is_of_the_time_since_the_one_before_and_an_average_of_all(clock):
    measured = Meter(global_batch=12)
    for seconds in (1.0, 0.5):
        with measured.waiting_for_data():
            clock(seconds)
    clock(2.5)
    measured.step_done()
    assert measured.read() == Reading(images_per_second=3.0, step_seconds=4.0, data_wait=0.375)
    clock(4.0)
    measured.step_done()
    measured.step_done()
    assert measured.read() == Reading(images_per_second=6.0, step_seconds=2.0, data_wait=0.0)
    assert measured.seconds_per_step() == pytest.approx(8 / 3)
    clock(1.0)  # a picture is drawn, or a checkpoint copied
    assert measured.seconds_per_step() == 3.0


def test_a_run_tells_its_speed_its_share_of_waiting_and_when_it_ends(clock, tmp_path):
    """A step takes two seconds and its data one; the first ones are waited for before the first step, and there are
    none after the last."""

    class Slow(Regression):
        def forward(self, batch, progress):
            clock(2.0)
            return super().forward(batch, progress)

    class SlowLoader(MemoryLoader):
        def __iter__(self):
            for batch in super().__iter__():
                clock(1.0)
                yield batch

    distributed.start()
    config, recorder = config_of({"train": {}, "log": {"every_steps": 2}}, tmp_path), Recorder()
    Engine(config, Slow(), SlowLoader(8, NUM_SAMPLES, batch_at), NoStore(), [recorder]).run()
    distributed.stop()
    told = [(r.step, r.images_per_second, r.step_seconds, r.data_wait, r.eta_seconds) for r in recorder.records]
    assert told == [
        (2, 16 / 7, 3.5, 3 / 7, 4 * 7 / 2),
        (4, 16 / 6, 3.0, 2 / 6, 2 * 13 / 4),
        (6, 16 / 5, 2.5, 1 / 5, 0.0),
    ]
