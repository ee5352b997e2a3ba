"""A part of an index is a data set of its own."""

import numpy as np
import pytest

from prelude.data.batch import View, ViewPlan
from prelude.data.loader import Loader
from prelude.data.shapes import write_shards
from prelude.data.shards import ShardIndex
from prelude.evaluators.features.labels import class_numbers


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_shards(folder, "train", 50, image_size=16, samples_per_shard=20)
    return f"{folder}/train-*.tar"


def test_a_subset_is_a_data_set_of_its_own(shards):
    whole = ShardIndex(shards, "cls")
    ids = np.array([3, 19, 20, 41, 49])
    part = whole.subset(ids)
    assert part.num_samples == 5 and part.counts.tolist() == [2, 1, 2]
    assert [part.key(i) for i in range(5)] == [whole.key(i) for i in ids]
    assert [part.shard_of(i) for i in range(5)] == [whole.shard_of(i) for i in ids]
    assert class_numbers(part).values.tolist() == class_numbers(whole).values[ids].tolist()
    assert len({whole.fingerprint, part.fingerprint, whole.subset(ids[1:]).fingerprint}) == 3
    assert whole.num_samples == 50
    assert whole.subset(np.arange(50)).fingerprint == whole.fingerprint


def test_a_loader_over_a_subset_brings_each_of_its_samples_once_an_epoch(shards):
    whole = ShardIndex(shards, "cls")
    ids = np.array([3, 19, 20, 41, 49, 7, 8, 11])
    ids.sort()
    loader = Loader(whole.subset(ids), ViewPlan((View((8, 8)),)), seed=0, micro_batch=4, label="cls")
    batches = [next(loader), next(loader)]
    seen = np.concatenate([batch.sample_ids.numpy() for batch in batches])
    labels = np.concatenate([batch.labels.numpy() for batch in batches])
    assert sorted(seen) == list(range(8))
    assert labels.tolist() == class_numbers(whole).values[ids][seen].tolist()
