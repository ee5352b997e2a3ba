"""Several data sets in a real run: killed in mid-epoch and resumed at another size, it has seen what was computed."""

import signal

import numpy as np
import pytest
from runs import Run, deepspeed

from prelude.data.mixed_order import MixedOrder
from prelude.data.order import Shuffle
from prelude.data.shapes import write_shards
from prelude.data.shards import Part
from prelude.launch import pretrain

NUM_STEPS = 18  # ceil(3 epochs x (60 + 35) samples / 16)
RECORDING = "objective.name=recording:RecordingMAE"


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    write_shards(folder / "large", "train", num_samples=60, seed=1, image_size=16)
    write_shards(folder / "small", "train", num_samples=70, seed=2, image_size=16)
    mix = {"large.shards": folder / "large" / "train-*.tar", "large.weight": 1,
           "small.shards": folder / "small" / "train-*.tar", "small.weight": 3, "small.select.share": 0.5}  # fmt: skip
    return [RECORDING, "data.shards=null", *(f"data.mix.{key}={value}" for key, value in mix.items())]


def test_killed_and_resumed_at_another_size_it_sees_what_was_computed(recipe, settings, tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "run"
    first = Run(deepspeed(2), recipe, run_dir, *settings, "checkpoint.every_steps=3")
    first.at_step(8).signal_group(signal.SIGKILL).wait()
    assert not (run_dir / "checkpoints" / f"step-{NUM_STEPS:08d}").exists()
    monkeypatch.setenv("RECORD_TO", str(run_dir))
    assert pretrain.main(["--config", str(recipe), f"run_dir={run_dir}", *settings]) == 0

    said = capsys.readouterr().err
    assert "mixed: large 25 % (60 samples, 0.396 times an epoch); small 75 % (35 samples, 2.04 times an epoch)" in said
    records = first.records()  # a position that both starts drew must agree in crop, flip, mask and pixels
    assert sorted(records) == list(range(NUM_STEPS * 16))
    parts = [Part("large", 1, 0, 60, 1, ""), Part("small", 3, 60, 95, 1, "")]
    order = MixedOrder(parts, np.array([60, 35]), 0, Shuffle(window=64))
    assert [records[p]["sample"] for p in range(NUM_STEPS * 16)] == order.samples_at(np.arange(NUM_STEPS * 16)).tolist()
    assert len({record["pixels"] for record in records.values()}) > 150
