import gc
import multiprocessing
import pickle
import time
from dataclasses import fields

import pytest
import torch

from prelude.data.batch import View, ViewPlan
from prelude.data.errors import UserError
from prelude.data.loader import Loader, one_pass
from prelude.data.shards import ShardIndex

PLAN = ViewPlan((View((6, 6)), View((4, 5), scale=(0.05, 0.3), flip=0.3)))
STILL = ViewPlan((View((10, 12), crop="center", flip=0.0),))  # the whole image, pixel for pixel


@pytest.fixture
def index(write_shards):
    return ShardIndex(write_shards([7, 0, 1, 12, 5, 9]), "cls")


# ---- labels


@pytest.mark.parametrize(
    "extension, contents, expected",
    [
        ("cls", [b"3", b"-1"], torch.tensor([3, -1])),
        ("json", [b"[1, 0, 1]", b"[0, 0, 1]"], torch.tensor([[1, 0, 1], [0, 0, 1]])),
        ("json", [b"0.5", b"1.0"], torch.tensor([0.5, 1.0])),
        ("target.json", [b"7", b"8"], torch.tensor([7, 8])),
    ],
)
def test_labels_are_numbers(tmp_path, write_tar, image, extension, contents, expected):
    members = [m for n, c in enumerate(contents) for m in ((f"{n}.ppm", image(n)), (f"{n}.{extension}", c))]
    index = ShardIndex(str(write_tar(tmp_path / "x.tar", members)), extension)
    (batch,) = one_pass(index, STILL, batch_size=4, label=extension)
    assert torch.equal(batch.labels, expected) and batch.labels.dtype == expected.dtype


@pytest.mark.parametrize(
    "extension, content, sentence",
    [
        ("json", b'{"labels": ["a"]}', "neither a number nor numbers"),
        ("txt", b"\xff\xfe", "neither a number nor numbers"),
        ("cls", b"18446744073709551616", "does not fit into 64 bits; write whole numbers from -2\\^63"),
        ("json", b"[1, -9223372036854775809]", "does not fit into 64 bits"),
        ("pkl", pickle.dumps(3), r"cannot be read from .pkl members; write them as .cls"),
        ("xyz", b"3", r"cannot be read from .xyz members"),
        ("", b"", r"No sample .* has a .cls member"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path, write_tar, image, extension, content, sentence):
    path = write_tar(tmp_path / "x.tar", [("1.ppm", image(1)), (f"1.{extension or 'other'}", content)])
    with pytest.raises(UserError, match=sentence):
        Loader(ShardIndex(str(path)), STILL, seed=0, micro_batch=1, label=extension or "cls")


# ---- one pass


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_one_pass_has_every_sample_once_in_order(index, world_size, num_workers):
    ids = []
    for rank in range(world_size):
        batches = list(
            one_pass(index, STILL, batch_size=4, rank=rank, world_size=world_size, num_workers=num_workers, label="cls")
        )
        assert all(len(batch) == 4 for batch in batches[:-1])
        assert all(batch.labels.tolist() == batch.sample_ids.tolist() for batch in batches)
        ids += [i for batch in batches for i in batch.sample_ids.tolist()]
    assert ids == list(range(34))


def test_one_pass_can_be_repeated(index):
    passes = one_pass(index, PLAN, batch_size=10, seed=3)
    first, second = ([values_of(batch) for batch in passes] for _ in range(2))
    assert first == second and passes.bad.num_read == 68


def values_of(batch):
    values = (getattr(batch, field.name) for field in fields(batch))
    return [value.tolist() for value in values if torch.is_tensor(value)]


def test_a_pass_that_is_left_early_leaves_no_worker(index):
    before = set(multiprocessing.active_children())
    for _ in one_pass(index, STILL, batch_size=2, num_workers=2):
        break
    gc.collect()
    end = time.monotonic() + 20
    while set(multiprocessing.active_children()) - before:
        assert time.monotonic() < end
        time.sleep(0.02)
