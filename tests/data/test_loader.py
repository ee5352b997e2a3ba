import gc
import json
import multiprocessing
import os
import pickle
import random
import signal
import time

import numpy as np
import psutil
import pytest
import torch
import webdataset as wds

from prelude.data import source
from prelude.data.batch import View, ViewPlan
from prelude.data.class_names import with_class_names
from prelude.data.errors import RunStopped, UserError
from prelude.data.loader import Loader, build_loader
from prelude.data.order import Shuffle
from prelude.data.shards import ShardIndex
from prelude.data.source import EndlessSource

PLAN = ViewPlan((View((6, 6)), View((4, 5), scale=(0.05, 0.3), flip=0.3)))
SHUFFLE = Shuffle(streams=3, span=4, window=8)
STILL = ViewPlan((View((10, 12), crop="center", flip=0.0),))  # the whole image, pixel for pixel


@pytest.fixture
def index(write_shards):
    return ShardIndex(write_shards([7, 0, 1, 12, 5, 9]), "cls")


def loader_of(index, micro_batch=4, plan=PLAN, **changes):
    return Loader(index, plan, **dict(seed=5, micro_batch=micro_batch, shuffle=SHUFFLE, label="cls") | changes)


def rows_of(batch):
    """Each sample of a batch as plain values, with its position first."""
    columns = [batch.positions, batch.sample_ids, batch.seeds, batch.labels, batch.boxes, batch.flips, *batch.views]
    return [tuple(json.dumps(column[row].tolist()) for column in columns) for row in range(len(batch))]


def by_position(batches):
    rows = [row for batch in batches for row in rows_of(batch)]
    return sorted(rows, key=lambda row: int(row[0]))


def take(loader, count):
    return [next(loader) for _ in range(count)]


@pytest.fixture
def reference(index):
    """The first 240 samples of the order, from the simplest loader that there is: seven epochs."""
    return by_position(take(loader_of(index, micro_batch=8), 30))


# ---- what a batch is


def test_batches_are_uint8_views_with_everything_that_is_known_of_a_sample(index, image):
    batch = next(loader_of(index))
    assert [tuple(view.shape) for view in batch.views] == [(4, 3, 6, 6), (4, 3, 4, 5)]
    assert all(view.dtype == torch.uint8 for view in batch.views)
    assert batch.boxes.shape == (4, 2, 4) and batch.boxes.dtype == torch.int32
    assert batch.flips.shape == (4, 2) and batch.flips.dtype == torch.bool
    for name in ("seeds", "sample_ids", "positions", "labels"):
        assert getattr(batch, name).dtype == torch.int64 and getattr(batch, name).shape == (4,)
    assert batch.labels.tolist() == batch.sample_ids.tolist()
    assert batch.positions.tolist() == [0, 1, 2, 3]
    assert batch.views[0].permute(0, 2, 3, 1).is_contiguous()  # pixels lie as they were decoded


def test_pixels_are_those_of_the_sample(index, image):
    for batch in take(loader_of(index, plan=STILL), 9):
        for pixels, number in zip(batch.views[0], batch.sample_ids.tolist(), strict=True):
            stored = np.frombuffer(image(number)[-360:], np.uint8).reshape(10, 12, 3)
            assert (pixels.permute(1, 2, 0).numpy() == stored).all()


def test_without_a_label_there_is_none(index):
    assert next(loader_of(index, label="")).labels is None


# ---- the order


def test_every_epoch_holds_every_sample_once(index, reference):
    ids = [int(row[1]) for row in reference]
    for epoch in range(240 // 34):
        assert sorted(ids[epoch * 34 : (epoch + 1) * 34]) == list(range(34))


@pytest.mark.parametrize("world_size, num_workers", [(1, 0), (1, 1), (1, 3), (2, 0), (2, 3), (3, 2)])
def test_ranks_and_workers_change_nothing(index, reference, world_size, num_workers):
    loaders = [
        loader_of(index, micro_batch=3, rank=rank, world_size=world_size, num_workers=num_workers)
        for rank in range(world_size)
    ]
    steps = 36 // (3 * world_size)
    batches = [next(loader) for _ in range(steps) for loader in loaders]
    assert by_position(batches) == reference[:36]
    assert len({json.dumps(loader.state_dict()) for loader in loaders}) == 1
    for loader in loaders:
        loader.close()


def test_more_ranks_than_samples(write_shards):
    index = ShardIndex(write_shards([2, 1]), "cls")
    batches = [next(loader_of(index, micro_batch=1, rank=rank, world_size=8)) for rank in range(8)]
    ids = [batch.sample_ids.item() for batch in batches]
    assert sorted(ids[:3]) == sorted(ids[3:6]) == [0, 1, 2]


# ---- resuming


def test_a_chain_of_interruptions_is_one_run(index, reference):
    """Ranks, micro-batch and workers change at every interruption; ids, crops and pixels do not."""
    for seed in range(4):
        rng, rows, state = random.Random(seed), [], None
        while len(rows) < 100:
            world_size, micro_batch = rng.choice([1, 2, 3, 4, 8]), rng.randint(1, 5)
            num_workers = 2 if world_size == 3 else 0
            loaders = [
                loader_of(index, micro_batch, rank=rank, world_size=world_size, num_workers=num_workers)
                for rank in range(world_size)
            ]
            for loader in loaders:
                if state:
                    loader.load_state_dict(state)
            for _ in range(rng.randint(1, 4)):
                rows += by_position(next(loader) for loader in loaders)
            state = json.loads(json.dumps(loaders[-1].state_dict()))
            for loader in loaders:
                loader.close()
        assert rows[:240] == reference[: len(rows)]


def test_the_cursor_counts_what_was_handed_over_and_not_what_was_prefetched(index):
    loader = loader_of(index, num_workers=2)
    assert loader.state_dict()["samples"] == 0
    take(loader, 3)
    time.sleep(0.3)  # the workers are ahead by now
    assert loader.state_dict()["samples"] == 12
    loader.close()
    assert next(loader).positions.tolist() == [12, 13, 14, 15]
    loader.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_that_is_running_can_be_sent_back(index, num_workers):
    loader = loader_of(index, num_workers=num_workers)
    take(loader, 2)
    state = loader.state_dict()
    after = by_position(take(loader, 2))
    loader.load_state_dict(state)
    assert by_position(take(loader, 2)) == after
    loader.close()


def test_the_state_is_small_and_plain(index):
    state = loader_of(index).state_dict()
    assert len(json.dumps(state)) < 400
    assert set(state) == {
        "version", "exact", "seed", "samples", "num_samples", "fingerprint", "streams", "window", "span", "views",
        "label",
    }  # fmt: skip


def test_a_resumed_run_reads_no_more_than_its_first_batch(index, monkeypatch):
    loader = loader_of(index, label="")
    state = loader.state_dict() | {"samples": 10**9}
    reads = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *arguments: reads.append(arguments) or pread(*arguments))
    loader.load_state_dict(state)
    next(loader)
    assert len(reads) == 4


@pytest.mark.parametrize(
    "change",
    [
        dict(seed=6),
        dict(shuffle=Shuffle(4, 4, 8)),
        dict(shuffle=Shuffle(3, 5, 8)),
        dict(shuffle=Shuffle(3, 4, 9)),
        dict(plan=STILL),
    ],
)
def test_another_order_is_refused_on_resume(index, change):
    loader = loader_of(index)
    take(loader, 2)
    other = loader_of(index, **change)
    with pytest.raises(UserError, match=r"\w+ \S+ -> \S+.*resume.allow_changed_data=true") as caught:
        other.load_state_dict(loader.state_dict())
    assert "\n" not in str(caught.value)
    other.load_state_dict(loader.state_dict(), allow_changed_data=True)
    assert other.samples == (8 if "plan" in change else 34)


def test_changed_data_are_refused_and_can_be_accepted(index, write_shards):
    loader = loader_of(index)
    take(loader, 10)
    grown = loader_of(ShardIndex(write_shards([7, 0, 1, 12, 5, 9, 3], folder="grown"), "cls"))
    with pytest.raises(UserError, match=r"fingerprint \w+ -> \w+, num_samples 34 -> 37"):
        grown.load_state_dict(loader.state_dict())
    grown.load_state_dict(loader.state_dict(), allow_changed_data=True)
    assert grown.samples == 74  # the start of its next epoch
    ids = [i for batch in take(grown, 10) for i in batch.sample_ids.tolist()]
    assert sorted(ids[:37]) == list(range(37))


def test_labels_that_say_something_else_are_never_accepted(tmp_path, write_tar, image):
    """A head has learned classes by their numbers."""
    members = []
    for n in range(8):
        label = {"site": "ab"[n % 2], "sex": "fm"[n // 4]}
        members += [(f"{n}.jpg", image(n)), (f"{n}.json", json.dumps(label).encode())]
    write_tar(tmp_path / "a.tar", members)

    def loader(field, *names):
        (index,) = with_class_names([ShardIndex(str(tmp_path / "a.tar"), f"json:{field}")], names)
        return loader_of(index, label=f"json:{field}")

    state = loader("site", "a", "b").state_dict()
    loader("site", "a", "b").load_state_dict(state)
    for other in (loader("sex", "f", "m"), loader("site", "0", "a", "b")):
        with pytest.raises(UserError, match="labels are not those that the checkpoint learned .*another run_dir"):
            other.load_state_dict(state, allow_changed_data=True)
    older = {key: value for key, value in state.items() if key not in ("label", "classes")}
    assert older != state
    loader("site", "a", "b").load_state_dict(older)


def test_a_state_of_another_version_is_never_accepted(index):
    loader = loader_of(index)
    with pytest.raises(UserError, match="version 0 -> 1"):
        loader.load_state_dict(loader.state_dict() | {"version": 0}, allow_changed_data=True)


TRAIN = """
import json, os, sys
from prelude.data import source
from prelude.data.batch import View, ViewPlan
from prelude.data.loader import build_loader
from prelude.data.workers import start_workers_by
shards, out, method, num_workers = [*sys.argv[1:], "auto", "3"][:4]
start_workers_by(method)
loader = build_loader(shards, ViewPlan((View((6, 6)),)), seed=5, micro_batch=4, num_workers=int(num_workers))
for batch in loader:
    with open(out + "/seen.jsonl", "a") as seen:
        seen.write(json.dumps([batch.positions.tolist(), batch.sample_ids.tolist()]) + "\\n")
    with open(out + "/state.tmp", "w") as file:
        json.dump(loader.state_dict(), file)
    os.replace(out + "/state.tmp", out + "/state.json")
"""


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("method, num_workers, num_others", [("auto", 3, 0), ("forkserver", 1, 2), ("spawn", 1, 1)])
def test_killed_without_warning_and_resumed_there_is_no_repeat_and_no_gap(
    method, num_workers, num_others, write_shards, tmp_path, run_python
):
    """num_others: that Python starts beside the workers."""
    pattern = os.path.dirname(write_shards([20, 30, 40])[0]) + "/*.tar"
    process = run_python(TRAIN, pattern, tmp_path, method, num_workers)
    seen = tmp_path / "seen.jsonl"
    wait_for(lambda: process.poll() is not None or seen.exists() and len(seen.read_text().splitlines()) >= 9)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()  # while workers prefetch
    process.wait()

    state = json.loads((tmp_path / "state.json").read_text())
    lines = [json.loads(line) for line in seen.read_text().splitlines()][: state["samples"] // 4]
    loader = build_loader(pattern, ViewPlan((View((6, 6)),)), seed=5, micro_batch=6, num_workers=1)
    loader.load_state_dict(state)
    lines += [[batch.positions.tolist(), batch.sample_ids.tolist()] for batch in take(loader, 10)]
    loader.close()
    positions, ids = ([value for line in lines for value in line[part]] for part in (0, 1))
    assert positions == list(range(len(positions)))
    epochs = [sorted(ids[n : n + 90]) for n in range(0, len(ids) - 89, 90)]
    assert all(epoch == list(range(90)) for epoch in epochs)
    assert len(workers) == num_workers + num_others
    wait_for(lambda: not any(worker.is_running() and worker.status() != "zombie" for worker in workers), 20)


# ---- workers


def children():
    return multiprocessing.active_children()


def test_a_dead_worker_is_an_error_and_not_a_wait(index):
    before = set(children())
    loader = loader_of(index, num_workers=2)
    next(loader)
    os.kill(next(iter(set(children()) - before)).pid, signal.SIGKILL)
    with pytest.raises(RunStopped, match="A data worker died .*OOM killer.* write a smaller data.num_workers"):
        take(loader, 10)
    loader.close()


def test_signals_that_end_a_run_do_not_end_its_workers(index):
    before = set(children())
    loader = loader_of(index, num_workers=2)
    next(loader)
    for process in set(children()) - before:
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(process.pid, name)
    take(loader, 20)
    loader.close()
    wait_for(lambda: not set(children()) - before, 10)


def test_a_script_that_fails_with_workers_running_comes_to_an_end(write_shards, run_python):
    code = TRAIN.partition("for batch")[0] + "next(loader); raise SystemExit(7)"
    process = run_python(code, write_shards([20])[0], "-")
    assert process.wait(timeout=120) == 7, process.communicate()


def test_the_pipeline_can_be_sent_to_a_spawned_worker(index):
    loader = loader_of(index)
    stages = pickle.loads(pickle.dumps(loader.stages()))
    arrays = next(iter(wds.DataPipeline(*stages)))
    assert arrays["sample_ids"].tolist() == next(loader).sample_ids.tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_global_generator_is_drawn_from(index, num_workers):
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    loader = loader_of(index, num_workers=num_workers)
    take(loader, 3)
    loader.close()
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all() and random.getstate() == python_state


def test_the_source_is_a_webdataset_source(index):
    source = EndlessSource(index, SHUFFLE, 5, 0, 4, 0, 1)
    loader = wds.WebLoader(wds.DataPipeline(source, wds.map(lambda step: step)), batch_size=None, num_workers=2)
    steps = [step for step, _ in zip(loader, range(4), strict=False)]
    assert [step["__key__"] for step in steps] == ["000000000", "000000001", "000000002", "000000003"]
    assert all("__url__" in step for step in steps)


def test_nothing_grows_over_epochs(index):
    loader = loader_of(index, micro_batch=34, plan=ViewPlan((View((64, 64)),)))
    process = psutil.Process()

    def after_epochs(count):
        for _ in range(count):
            next(loader)
        gc.collect()
        return process.num_fds(), process.memory_info().rss

    after_epochs(10)
    fds, memory = after_epochs(10)
    more_fds, more_memory = after_epochs(30)
    assert more_fds == fds and more_memory - memory < 2**22  # batches that were kept would be 12 MB


def test_open_files_are_limited(index):
    loader = loader_of(index)
    loader.reader.files.limit = 2
    take(loader, 30)
    opened = [file.path for file in psutil.Process().open_files() if file.path in index.paths]
    assert 0 < len(opened) <= 2  # threads that decode have a pipe of their own


# ---- the door


def test_build_loader_takes_what_the_config_says(write_shards):
    paths = write_shards([4, 4])
    loader = build_loader(paths, PLAN, seed=1, micro_batch=2, label="cls", shuffle=SHUFFLE)
    assert loader.num_samples == 8 and loader.num_shards == 2 and loader.num_workers == 0
    ids = next(loader_of(ShardIndex(paths), micro_batch=3, seed=1, label="")).sample_ids.tolist()
    assert loader.preview(3) == [f"{n // 4:03}.tar:{n:06}" for n in ids]


def test_a_length_is_not_taken_for_data_that_are_counted(write_shards):
    with pytest.raises(UserError, match="data.num_samples=3 has no effect on shards that are files"):
        build_loader(write_shards([4]), PLAN, seed=1, micro_batch=2, num_samples=3)


def test_too_many_samples_that_cannot_be_indexed_are_refused(tmp_path, write_tar, image):
    members = [("1.ppm", image(1)), ("2.txt", b""), ("3.ppm", b""), ("4.ppm", image(4))]
    path = str(write_tar(tmp_path / "x.tar", members))
    assert build_loader(path, STILL, seed=0, micro_batch=1, max_bad_share=0.5).num_samples == 2
    with pytest.raises(UserError, match="2 samples .* damaged, beside 2 sound ones .*no image, 2.*data.max_bad_share"):
        build_loader(path, STILL, seed=0, micro_batch=1, max_bad_share=0.49)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("held", [0, 500, 2**20])
def test_how_many_images_wait_for_each_other_changes_nothing(held, threads, write_shards, monkeypatch):
    """Bad samples and labels among them."""
    index = ShardIndex(write_shards([20, 13], bad=(3, 4, 25)), "cls")
    loader = Loader(index, PLAN, seed=1, micro_batch=16, label="cls")
    expected = [next(loader) for _ in range(3)]
    loader.close()
    monkeypatch.setattr(source, "_HELD_BYTES", held)
    loader = Loader(index, PLAN, seed=1, micro_batch=16, label="cls")
    loader.reader.threads = threads
    for batch in expected:
        found = next(loader)
        for name in ("sample_ids", "seeds", "boxes", "flips", "labels"):
            assert torch.equal(getattr(found, name), getattr(batch, name)), name
        assert all(map(torch.equal, found.views, batch.views))
    loader.close()
