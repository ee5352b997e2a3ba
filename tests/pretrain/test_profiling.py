import gzip
import json

import pytest
import torch
from engine_cases import NUM_SAMPLES, Regression, batch_at, config_of
from in_memory import MemoryLoader, NoStore, Recorder

from prelude.pretrain import distributed
from prelude.pretrain.engine import Engine
from prelude.pretrain.profiling import StepProfile
from prelude.pretrain.utilisation import Utilisation


def traces(run_dir) -> list[dict]:
    files = sorted((run_dir / "tensorboard").glob("*.pt.trace.json.gz"))
    return [json.loads(gzip.decompress(file.read_bytes())) for file in files]


def steps_in(trace: dict) -> int:
    return len({event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep#")})


@pytest.mark.parametrize("taken, recorded", [(20, 4), (5, 2), (2, 0)])
def test_the_steps_after_the_first_three_are_recorded_and_a_run_that_ends_leaves_what_there_is(
    tmp_path, taken, recorded
):
    profile = StepProfile(tmp_path, 4)
    for _ in range(taken):
        with profile:
            torch.ones(8).add_(1)
    profile.close()
    assert [steps_in(trace) for trace in traces(tmp_path)] == ([recorded] if recorded else [])


def test_nothing_is_recorded_unless_asked_for(tmp_path):
    for _ in range(9):
        with StepProfile(tmp_path, 0):
            pass
    assert not list(tmp_path.iterdir())


def test_a_run_writes_its_trace_and_tells_how_much_of_its_device_it_uses(tmp_path):
    distributed.start()
    config = config_of({"train": {"profile_steps": 2}}, tmp_path)
    recorder = Recorder()
    engine = Engine(
        config, Regression(), MemoryLoader(8, NUM_SAMPLES, batch_at), NoStore(), [recorder], peak_flops=lambda *_: 1e9
    )
    engine.run()
    distributed.stop()
    (trace,) = traces(tmp_path)
    assert steps_in(trace) == 2
    assert any("addmm" in event.get("name", "") for event in trace["traceEvents"])
    an_image = 2 * (192 * 4 + 4 * 1) + 2 * (192 * 4 + 4 * 1 + 4 * 1)  # forward; weights' gradients, the head's input's
    for record in recorder.records:
        assert record.mfu == pytest.approx(record.images_per_second * an_image / 1e9)
        assert record.step_seconds == pytest.approx(8 / record.images_per_second)


def test_where_lengths_change_the_flops_of_an_image_are_a_mean_that_follows():
    class Changing(Regression):
        lengths_change = True

    used, batch = Utilisation(1e9), batch_at(torch.arange(8))
    used.look_at(Changing(), config_of({"train": {}}, "unused"), "fp32")

    def step(length: int) -> float:
        with used.counting(batch):
            torch.ones(length, 8) @ torch.ones(8, 8)
        return used.flops_an_image / (2 * 8 * 8 / len(batch))

    assert [step(length) for length in (2, 4, 6)] == pytest.approx([2, 3, 4])
    for _ in range(13):
        step(4)
    assert step(1000) == pytest.approx(4)  # enough are known; one in a while is counted anew
    later = [step(20) for _ in range(64 * 16)]
    assert later[0] < 5 and later == sorted(later) and later[-1] == pytest.approx(20)


def test_where_lengths_stay_the_first_micro_batch_is_counted_and_no_other():
    used, batch = Utilisation(1e9), batch_at(torch.arange(8))
    used.look_at(Regression(), config_of({"train": {}}, "unused"), "fp32")
    for length in (2, *[400] * 70):
        with used.counting(batch):
            torch.ones(length, 8) @ torch.ones(8, 8)
    assert used.flops_an_image == pytest.approx(2 * 2 * 8 * 8 / len(batch))
