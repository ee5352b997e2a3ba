"""What somebody else does to a file of features in the midst of an evaluation; a signal would kill a child."""

import json
import os
import zlib

import numpy as np
import pytest
from forked import code_of

from prelude.data.shapes import write_shards
from prelude.evaluators.features import snapshot as module
from prelude.evaluators.features.snapshot import snapshot
from prelude.evaluators.frozen.linear_probe import linear_probe
from prelude.evaluators.judging import evaluate
from prelude.evaluators.labelled import Labelled


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("snapshot")
    for part, count in (("train", 200), ("test", 60)):
        write_shards(folder / "shapes", part, count, image_size=16, samples_per_shard=100)
    return folder


def evaluated(folder, how, memory):
    """The outcome of a probe in a process of its own, to whose features somebody does that once they are opened."""
    told = folder / f"{how}-{memory}.json"
    assert code_of(lambda: told.write_text(json.dumps(_probed(folder, how, memory)))) == 0
    return json.loads(told.read_text())


def _probed(folder, how, memory):
    def spoiling(train, test, **settings):
        for path in folder.glob("bank/*/values.f32"):
            if how == "zeroed":
                path.write_bytes(bytes(path.stat().st_size))
            elif how == "cut":
                os.truncate(path, 0)
        return linear_probe(train, test, **settings)

    if memory == "small":
        module.fits = lambda num_bytes: False
    shards = [f"{folder}/shapes/{part}-*.tar" for part in ("train", "test")]
    (result,) = evaluate(["pixels:16"], [spoiling], Labelled(*shards, "cls"), bank=folder / "bank", out=folder / "out")
    return result.outcome.numbers["top1"].value, result.outcome.details["grid"]


@pytest.fixture(scope="module")
def whole(shapes):
    return evaluated(shapes, "whole", "large")


@pytest.mark.parametrize("memory", ["large", "small"])
@pytest.mark.parametrize("how", ["cut", "zeroed"])
def test_a_bank_that_is_spoilt_in_mid_evaluation_changes_nothing(shapes, whole, how, memory):
    assert evaluated(shapes, how, memory) == whole


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
