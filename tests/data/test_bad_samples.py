import gzip
import json
import logging
import os
import tarfile

import numpy as np
import pytest
import torch

from prelude.data.bad_samples import MAX_LISTED, BadSamples
from prelude.data.batch import View, ViewPlan
from prelude.data.errors import RunStopped
from prelude.data.loader import Loader, one_pass
from prelude.data.order import Shuffle, substitute
from prelude.data.shards import ShardIndex
from prelude.data.tar_index import Problem

PLAN = ViewPlan((View((6, 6)),))
BAD = {1, 4, 5, 9, 17, 18, 22, 29, 30}  # of 30, three in ten


@pytest.fixture
def index(write_shards):
    return ShardIndex(write_shards([10, 0, 20], bad=BAD), "cls")


def loader_of(index, **changes):
    return Loader(index, PLAN, **dict(seed=5, micro_batch=5, shuffle=Shuffle(2, 4, 8), label="cls") | changes)


def take(loader, count):
    return [next(loader) for _ in range(count)]


def test_batches_stay_full_and_everyone_else_stays_in_place(index, write_shards):
    sound = loader_of(ShardIndex(write_shards([10, 0, 20], folder="sound"), "cls"))
    for batch, undamaged in zip(take(loader_of(index), 12), take(sound, 12), strict=True):
        assert len(batch) == 5 and torch.equal(batch.positions, undamaged.positions)
        for row, wanted in enumerate(undamaged.sample_ids.tolist()):
            delivered = batch.sample_ids[row].item()
            assert delivered not in BAD and batch.labels[row] == delivered
            if wanted not in BAD:
                assert delivered == wanted and torch.equal(batch.views[0][row], undamaged.views[0][row])


def test_a_substitute_is_decided_by_the_position_alone(index):
    one = [row for batch in take(loader_of(index), 12) for row in zip(batch.positions, batch.sample_ids, strict=True)]
    two = [loader_of(index, micro_batch=3, rank=rank, world_size=2, num_workers=rank) for rank in (0, 1)]
    rows = [row for loader in two for b in take(loader, 10) for row in zip(b.positions, b.sample_ids, strict=True)]
    assert sorted(map(list, one)) == sorted(map(list, rows))
    for loader in two:
        loader.close()


def test_counts_are_those_of_what_was_injected(index):
    loader = loader_of(index)
    batches = take(loader, 6)  # one epoch
    expected = 0
    order = loader_of(index).stages()[0].order
    for batch in batches:
        for position in batch.positions.tolist():
            sample, attempt = int(order.samples_at(position)), 0
            while sample in BAD:
                expected, attempt = expected + 1, attempt + 1
                sample = substitute(5, position, attempt, 30)
    assert loader.bad.num_bad == expected > 9
    assert loader.bad.num_read == 30 + expected
    assert sum(loader.bad.counts.values()) == expected
    assert {os.path.basename(shard) for shard, _ in loader.bad.counts} == {"000.tar", "002.tar"}


def test_bad_samples_are_listed_with_shard_and_key(index, tmp_path, caplog):
    loader = loader_of(index, bad_samples_log=tmp_path / "bad.jsonl")
    take(loader, 6)
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert len(lines) == loader.bad.num_bad
    assert all(set(line) == {"shard", "key", "reason", "position"} for line in lines)
    assert {int(line["key"]) for line in lines} == BAD - {30}
    assert all(("000.tar" in line["shard"]) == (int(line["key"]) < 10) for line in lines)
    assert {line["reason"] for line in lines} == {"not an image"}
    assert len([record for record in caplog.records if "cannot be read" in record.message]) == 2  # once a shard


def test_when_nothing_can_be_read_the_run_stops_and_names_a_sample(write_shards):
    index = ShardIndex(write_shards([8], bad=range(8)))
    for num_workers in (0, 1):
        for rank in (0, 1):
            loader = loader_of(index, label="", num_workers=num_workers, rank=rank, world_size=2)
            with pytest.raises(RunStopped, match=r"16 others in its place; one of them is 00000\d in .*000.tar"):
                next(loader)
            assert loader.samples == 0
            loader.close()


def test_a_shard_that_shrinks_or_vanishes_is_bad_samples_and_no_crash(write_shards):
    paths = write_shards([10, 10])
    loader = loader_of(ShardIndex(paths), label="")
    os.truncate(paths[0], 3000)
    os.remove(paths[1])
    with pytest.raises(RunStopped):
        take(loader, 4)
    assert {reason for _, reason in loader.bad.counts} >= {"cannot be read: No such file or directory"}

    loader = loader_of(ShardIndex(write_shards([10, 10], folder="again")), label="")
    os.truncate(loader.index.paths[0], 3000)
    take(loader, 8)
    assert {reason for _, reason in loader.bad.counts} == {"the shard has become shorter"}


def image_offsets(path: str) -> set[int]:
    with tarfile.open(path) as tar:
        return {member.offset_data for member in tar if member.name.endswith(".ppm")}


@pytest.mark.parametrize("becomes", ["nothing", "a gzip file"])
def test_samples_of_a_shard_that_cannot_be_asked_for_keys_are_listed_by_their_bytes(becomes, write_shards, tmp_path):
    paths = write_shards([10, 30])
    loader = loader_of(ShardIndex(paths), label="", bad_samples_log=tmp_path / "bad.jsonl")
    offsets, size = image_offsets(paths[0]), os.path.getsize(paths[0])
    os.remove(paths[0])
    if becomes == "a gzip file":
        with gzip.open(paths[0], "wb") as file:
            file.write(np.random.bytes(size))
    batches = take(loader, 8)  # one epoch
    assert all(len(batch) == 5 and (batch.sample_ids >= 10).all() for batch in batches)
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert len(lines) == loader.bad.num_bad and {line["shard"] for line in lines} == {paths[0]}
    assert {line["key"] for line in lines} == {f"byte {offset}" for offset in offsets}


def test_a_run_whose_shards_have_all_vanished_stops_in_a_sentence(write_shards, tmp_path):
    paths = write_shards([10, 10])
    for log in (None, tmp_path / "bad.jsonl"):
        loader = loader_of(ShardIndex(paths), label="", bad_samples_log=log)
        for path in paths:
            os.rename(path, f"{path}.away")
        with pytest.raises(RunStopped, match=r"one of them is byte \d+ in .*\.tar \(cannot be read: No such file"):
            next(loader)
        for path in paths:
            os.rename(f"{path}.away", path)


def test_a_sample_with_a_spoilt_or_missing_label_is_bad(tmp_path, write_tar, image):
    members = [("0.ppm", image(0)), ("0.cls", b"0"), ("1.ppm", image(1)), ("1.cls", b"one"), ("2.ppm", image(2))]
    index = ShardIndex(str(write_tar(tmp_path / "x.tar", members)), "cls")
    passes = one_pass(index, PLAN, batch_size=8, label="cls")
    (batch,) = passes
    assert batch.sample_ids.tolist() == [0]
    assert sorted(reason for _, reason in passes.bad.counts) == ["bad .cls label", "no .cls label"]
    assert len(list(one_pass(index, PLAN, batch_size=8))[0]) == 3  # without labels, nothing is bad


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_pass_leaves_bad_samples_out(index, num_workers):
    passes = one_pass(index, PLAN, batch_size=4, num_workers=num_workers, label="cls")
    ids = [i for batch in passes for i in batch.sample_ids.tolist()]
    assert ids == [n for n in range(30) if n not in BAD]
    assert passes.bad.num_bad == 8 and passes.bad.num_read == 30


def test_a_pass_of_only_bad_samples_is_empty(write_shards):
    passes = one_pass(ShardIndex(write_shards([5], bad=range(5))), PLAN, batch_size=2)
    assert list(passes) == [] and passes.bad.num_bad == 5


def test_what_the_index_left_out_is_logged_and_listed_by_the_first_rank(tmp_path, write_tar, image, caplog):
    path = str(write_tar(tmp_path / "x.tar", [("1.ppm", image(1)), ("2.txt", b""), ("3.txt", b"")]))
    index, listed = ShardIndex(path), tmp_path / "bad.jsonl"
    loader_of(index, label="", rank=1, world_size=2, bad_samples_log=listed)
    assert not listed.exists() and not caplog.records
    loader = loader_of(index, label="", bad_samples_log=listed)
    assert not listed.exists()  # the run may still be refused, and then leaves no trace
    next(loader)
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert lines == [{"shard": path, "key": key, "reason": "no image", "position": None} for key in "23"]
    assert [record.message for record in caplog.records] == [f"{path}: left out: 2 x no image"]
    assert loader.bad.num_bad == 0


def test_the_list_has_an_end(tmp_path):
    ledger = BadSamples(tmp_path / "bad.jsonl")
    for n in range(MAX_LISTED + 50):
        ledger.add("x.tar", "not an image", n, lambda n=n: str(n))
    ledger.add_unindexed({"y.tar": (Problem("no image", "k"),) * 500})
    ledger.add_read(1)
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [line["shard"] for line in lines] == ["x.tar"] * MAX_LISTED + ["y.tar"] * MAX_LISTED
    assert ledger.num_bad == MAX_LISTED + 50


def test_a_list_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    ledger = BadSamples(tmp_path / "missing" / "bad.jsonl")
    with caplog.at_level(logging.WARNING):
        ledger.add("x.tar", "not an image", 0, lambda: "k")
        ledger.add("x.tar", "not an image", 1, lambda: "k")
    assert ledger.num_bad == 2 and sum("not listed" in record.message for record in caplog.records) == 1


def test_a_list_that_is_a_link_leaves_what_it_leads_to_alone(tmp_path):
    (tmp_path / "precious").write_text("mine\n")
    (tmp_path / "bad.jsonl").symlink_to("precious")
    BadSamples(tmp_path / "bad.jsonl").add("x.tar", "not an image", 0, lambda: "k")
    assert (tmp_path / "precious").read_text() == "mine\n"


TWO_RANKS = """
import json, os, sys
import torch, torch.distributed as dist
from prelude.data.batch import View, ViewPlan
from prelude.data.loader import build_loader
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(os.environ["RANK"]), world_size=2)
loader = build_loader(
    sys.argv[1], ViewPlan((View((6, 6)),)), seed=0, micro_batch=5, rank=dist.get_rank(), world_size=2, num_workers=1
)
for step in range(12):
    batch = next(loader)
    total = torch.tensor([len(batch), loader.bad.num_bad])
    dist.all_reduce(total)  # would wait for ever if one rank had fewer steps
    assert total[0] == 10
print(json.dumps([loader.bad.num_bad, int(total[1]), loader.state_dict()]))
loader.close()
"""


def test_ranks_stay_in_step_when_one_meets_bad_samples(write_shards, tmp_path, run_python):
    """Two real processes; the bad samples lie at positions of rank 1 only, three in ten of them."""
    paths = write_shards([60])
    order = Loader(ShardIndex(paths), PLAN, seed=0, micro_batch=1).stages()[0].order
    of_rank_1 = [int(order.samples_at(position)) for position in range(1, 60, 2)]
    write_shards([60], bad=set(of_rank_1[::3]))
    processes = [run_python(TWO_RANKS, paths[0], tmp_path / "meet", RANK=str(rank)) for rank in (0, 1)]
    results = []
    for process in processes:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        results.append(json.loads(out))
    assert results[0][2] == results[1][2] and results[0][2]["samples"] == 120
    assert results[0][1] == results[1][1] == results[0][0] + results[1][0]
    assert results[1][0] >= 10
