from collections import Counter

import numpy as np
import pytest
from webdataset import TarWriter

from prelude.data.batch import View, ViewPlan
from prelude.data.errors import UserError
from prelude.data.loader import one_pass
from prelude.data.shapes import write_shards
from prelude.data.shards import ShardIndex
from prelude.data.subset import balanced_subset

PLAN = ViewPlan((View((8, 8), crop="center", flip=0.0),))


def labels_of(index, samples) -> list[int]:
    batches = one_pass(index, PLAN, batch_size=7, label="cls", samples=samples)
    read = [(i, label) for batch in batches for i, label in zip(batch.sample_ids, batch.labels, strict=True)]
    assert [i for i, _ in read] == samples.tolist()
    return [int(label) for _, label in read]


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("shapes")
    write_shards(folder, "train", 120, image_size=16, samples_per_shard=50)
    return ShardIndex(f"{folder}/train-*.tar", "cls")


def test_classes_are_balanced_and_the_seed_alone_decides(index):
    samples = balanced_subset(index, "cls", 30, seed=1)
    assert len(samples) == 30 and (np.diff(samples) > 0).all()
    counts = Counter(labels_of(index, samples)).values()
    assert max(counts) - min(counts) <= 1
    assert np.array_equal(samples, balanced_subset(index, "cls", 30, seed=1))
    assert not np.array_equal(samples, balanced_subset(index, "cls", 30, seed=2))


def test_where_there_are_no_more_all_are_taken(index):
    assert np.array_equal(balanced_subset(index, "cls", 500, seed=0), np.arange(120))


def test_a_rare_class_is_made_up_for_and_what_has_no_label_is_left_out(tmp_path, index):
    with TarWriter(str(tmp_path / "a.tar")) as tar:
        for i in range(40):
            label = {0: b"7", 1: b"spoilt", 2: None}.get(i, b"3")
            tar.write({"__key__": f"{i:03d}", "jpg": b"x", **({"cls": label} if label else {})})
    samples = balanced_subset(ShardIndex(str(tmp_path / "a.tar"), "cls"), "cls", 20, seed=0)
    assert len(samples) == 20 and 0 in samples and 1 not in samples and 2 not in samples


def test_shards_without_labels_are_refused(index):
    with pytest.raises(UserError, match="label"):
        balanced_subset(index, "json", 10, seed=0)


def test_where_few_images_have_a_label_these_alone_are_drawn_among(tmp_path, index):
    with TarWriter(str(tmp_path / "a.tar")) as tar:
        for i in range(400):
            tar.write({"__key__": f"{i:03d}", "jpg": b"x", **({"cls": b"3"} if i % 40 == 0 else {})})
    samples = balanced_subset(ShardIndex(str(tmp_path / "a.tar"), "cls"), "cls", 5, seed=0)
    assert len(samples) == 5 and (samples % 40 == 0).all()
    every = balanced_subset(index, "cls", 5, seed=1)  # where all have one, the candidates are as they have always been
    assert set(every.tolist()) <= set(np.random.default_rng(1).permutation(120)[:50].tolist())
