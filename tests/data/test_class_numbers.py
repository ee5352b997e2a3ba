import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from data.batch import View, ViewPlan
from data.class_numbers import class_numbers
from data.errors import UserError
from data.loader import Loader
from data.shapes import paint, write_shards
from data.shards import ShardIndex


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_shards(folder, "train", 50, image_size=16, samples_per_shard=20)
    return f"{folder}/train-*.tar"


def write(path, labels: list[bytes | None], extension="cls") -> str:
    jpeg = io.BytesIO()
    Image.new("RGB", (16, 16)).save(jpeg, "JPEG")
    with tarfile.open(path, "w") as tar:
        for i, label in enumerate(labels):
            for suffix, content in (("jpg", jpeg.getvalue()), (extension, label)):
                if content is not None:
                    info = tarfile.TarInfo(f"{i:03d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return str(path)


def test_every_sample_has_the_number_that_it_was_written_with(shards):
    _, labels = paint("train", np.arange(50), image_size=16)
    assert class_numbers(ShardIndex(shards, "cls")).tolist() == labels.tolist()


def test_missing_and_spoilt_labels_are_unknown(tmp_path):
    index = ShardIndex(write(tmp_path / "a.tar", [b"3", None, b"x1", b"0"]), "cls")
    assert class_numbers(index).tolist() == [3, -1, -1, 0]


def test_labels_that_are_no_class_numbers_are_refused(tmp_path):
    index = ShardIndex(write(tmp_path / "a.tar", [b"[0.5, 1]"], "json"), "json")
    with pytest.raises(UserError, match=r"float32 of shape \(2,\) instead of one class number"):
        class_numbers(index)
    with pytest.raises(UserError, match="class number -4"):
        class_numbers(ShardIndex(write(tmp_path / "b.tar", [b"1", b"-4"]), "cls"))
    with pytest.raises(UserError, match="write another label"):
        class_numbers(ShardIndex(write(tmp_path / "c.tar", [None, None]), "cls"))


def test_a_subset_is_a_data_set_of_its_own(shards):
    whole = ShardIndex(shards, "cls")
    ids = np.array([3, 19, 20, 41, 49])
    part = whole.subset(ids)
    assert part.num_samples == 5 and part.counts.tolist() == [2, 1, 2]
    assert [part.key(i) for i in range(5)] == [whole.key(i) for i in ids]
    assert [part.shard_of(i) for i in range(5)] == [whole.shard_of(i) for i in ids]
    assert class_numbers(part).tolist() == class_numbers(whole)[ids].tolist()
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
    assert labels.tolist() == class_numbers(whole)[ids][seen].tolist()
