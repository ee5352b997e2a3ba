"""What somebody else does to a file of features in the midst of an evaluation; a signal would kill a child."""

import json
import subprocess
import sys
import zlib

import numpy as np
import pytest

from prelude.data.shapes import write_shards
from prelude.evaluators.features import snapshot as module
from prelude.evaluators.features.snapshot import snapshot

EVALUATION = """
import json, os, sys
from pathlib import Path
from prelude.evaluators.features import snapshot
from prelude.evaluators.frozen.linear_probe import linear_probe
from prelude.evaluators.judging import evaluate
from prelude.evaluators.labelled import Labelled

folder, how, memory = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
if memory == "small":
    snapshot.fits = lambda num_bytes: False

def spoiling(train, test, **settings):
    for path in folder.glob("bank/*/values.f32"):
        if how == "zeroed":
            path.write_bytes(bytes(path.stat().st_size))
        elif how == "cut":
            os.truncate(path, 0)
    return linear_probe(train, test, **settings)

shards = [f"{folder}/shapes/{part}-*.tar" for part in ("train", "test")]
(result,) = evaluate(["pixels:16"], [spoiling], Labelled(*shards, "cls"), bank=folder / "bank", out=folder / "out")
print(json.dumps([result.outcome.numbers["top1"].value, result.outcome.details["grid"]]))
"""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("snapshot")
    for part, count in (("train", 200), ("test", 60)):
        write_shards(folder / "shapes", part, count, image_size=16, samples_per_shard=100)
    return folder


def evaluated(shapes, how, memory):
    command = [sys.executable, "-c", EVALUATION, str(shapes), how, memory]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("memory", ["large", "small"])
@pytest.mark.parametrize("how", ["cut", "zeroed"])
def test_a_bank_that_is_spoilt_in_mid_evaluation_changes_nothing(shapes, how, memory):
    assert evaluated(shapes, how, memory) == evaluated(shapes, "whole", "large")


def values_in(path, shape=(3000, 7)):
    values = np.random.default_rng(0).standard_normal(shape).astype("<f4")
    values.tofile(path)
    return values, zlib.crc32(values.tobytes())


@pytest.fixture(params=[True, False], ids=["memory", "nameless file"])
def either(request, monkeypatch):
    monkeypatch.setattr(module, "fits", lambda num_bytes: request.param)
    monkeypatch.setattr(module, "PIECE", 1000)


def test_it_is_the_array_with_an_offset_or_without_and_leaves_no_file(tmp_path, either):
    values, checksum = values_in(tmp_path / "values")
    whole = snapshot(tmp_path / "values", "<f4", (3000, 7), checksum=checksum)
    later = snapshot(tmp_path / "values", "<f4", (2000, 7), offset=28 * 1000)
    assert (whole == values).all() and (later == values[1000:]).all()
    whole[:] = 0  # is private
    assert (snapshot(tmp_path / "values", "<f4", (3000, 7)) == values).all()
    assert [path.name for path in tmp_path.iterdir()] == ["values"]


def test_other_values_and_an_early_end_are_refused(tmp_path, either):
    _, checksum = values_in(tmp_path / "values")
    with pytest.raises(ValueError, match="not those that were written"):
        snapshot(tmp_path / "values", "<f4", (3000, 7), checksum=checksum ^ 1)
    with pytest.raises(ValueError, match="ends after 84,000 of 84,028 bytes"):
        snapshot(tmp_path / "values", "<f4", (3001, 7))


def test_a_process_takes_at_most_half_of_what_is_free_and_of_all(monkeypatch):
    monkeypatch.setattr(module, "host_memory", lambda: 100.0)
    for free, held, most in ((60, 0, 30), (90, 10, 40), (90, 60, -1), (0, 0, 0)):
        monkeypatch.setattr(module, "_free_and_held", lambda told=(free, held): told)
        assert module.fits(most) or most < 0
        assert not module.fits(most + 1)
