"""The index of a data set on the disk: small, mapped, made once, and the same whoever opens it and however."""

import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from prelude.data import index_file, kept_index, locks, waiting, walking
from prelude.data.batch import View, ViewPlan
from prelude.data.errors import RunStopped, UserError
from prelude.data.index_file import Entry
from prelude.data.loader import Loader
from prelude.data.locks import alone
from prelude.data.places import Chained, Mapped, Taken, write_images, write_labels
from prelude.data.shards import ShardIndex
from prelude.data.tar_index import Problem, TarIndex, index_every_label

PLAN = ViewPlan((View((6, 6)),))


def table(*rows) -> np.ndarray:
    return np.array(rows, np.int64).reshape(-1, 2)


def places(seed: int, count: int, unit: int = 512, largest: int = 2**18) -> tuple[np.ndarray, np.ndarray]:
    """Images one after the other, each with a label behind it; of some the label is missing."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, largest, count)
    ends = np.cumsum(-(-sizes // unit) * unit + 3 * unit)
    images = np.stack([ends - (-(-sizes // unit) * unit + 2 * unit), sizes], 1)
    labels = np.stack([ends - unit, rng.integers(1, 9, count)], 1)
    labels[rng.random(count) < 0.1] = -1
    return images, labels


CASES = {
    "a tar": places(0, 1000),
    "bytes are missing in it": places(1, 50, unit=1),
    "10 TiB": tuple(np.where(part >= 0, part + (10 * 2**40, 0), -1) for part in places(2, 50)),
    "long labels": tuple(part + (0, extra) for part, extra in zip(places(3, 9), (0, 2**33), strict=True)),
    "labels before all images": (places(4, 9)[0] + (2**33, 0), table(*[(512 * n, 3) for n in range(9)])),
    "no label at all": (places(5, 9)[0], np.full((9, 2), -1)),
    "nothing": (table(), table()),
}


@pytest.mark.parametrize("case", CASES)
def test_a_table_on_the_disk_is_the_array_that_was_written(case, tmp_path):
    images, labels = CASES[case]
    cut = len(images) // 3
    of_shards = lambda whole: lambda: iter([whole[:cut], whole[:0], whole[cut:]])  # noqa: E731
    write_images(f"{tmp_path}/i", of_shards(images), lambda: ["about"])
    kept_images = Mapped(f"{tmp_path}/i")
    write_labels(f"{tmp_path}/l", of_shards(labels), kept_images, lambda: None)
    kept_labels = Mapped(f"{tmp_path}/l", kept_images)
    assert kept_images.about == ["about"] and sorted(os.listdir(tmp_path)) == ["i", "l"]
    rows = np.random.default_rng(0).permutation(len(images))[:7]
    for kept, whole in ((kept_images, images), (kept_labels, labels)):
        twice = Chained([kept, whole])
        for found, expected in (
            (kept, whole),
            (twice, np.concatenate([whole, whole])),
            (Taken(twice, np.sort(rows)), whole[np.sort(rows)]),
            (pickle.loads(pickle.dumps(twice)), np.concatenate([whole, whole])),
        ):
            assert len(found) == len(expected)
            assert np.array_equal(found, expected) and found[:].dtype == np.int64
            for key in (slice(2, -1, 3), slice(0, 0), expected[:, 1] > 0, (slice(None), 1), ([], 0)):
                assert np.array_equal(found[key], expected[key]), key
            for number in (0, -1) if len(expected) else ():
                assert found[number].tolist() == expected[number].tolist()
        if len(images):
            assert np.array_equal(kept[rows], whole[rows])
            with pytest.raises(IndexError):
                kept[len(images)]


def test_an_index_takes_at_most_16_bytes_a_sample_with_a_label(tmp_path, cache, monkeypatch):
    images, labels = places(6, 20_000, largest=2**20)
    shard = tmp_path / "0.tar"
    with open(shard, "wb") as file:
        file.truncate(int(images.sum(1).max()) + 4096)  # of zeros that no disk holds
    found = {"": TarIndex(images, table(), (), True, "x", ""), "cls": TarIndex(images, labels, (), True, "x", "y")}
    monkeypatch.setattr(kept_index, "index_every_label", lambda *_: found)
    index = ShardIndex(str(shard), "cls")
    assert np.array_equal(index.images, images) and np.array_equal(index.labels, labels)
    assert sum(path.stat().st_size for path in cache.rglob("*")) <= 16 * len(images)


def walks_of(monkeypatch) -> list[str]:
    walked = []
    walk = lambda path, image: walked.append(path) or index_every_label(path, image)  # noqa: E731
    monkeypatch.setattr(kept_index, "index_every_label", walk)
    monkeypatch.setattr(kept_index, "index_tar", lambda path, *_: walked.append(path))
    return walked


def test_only_a_shard_that_has_changed_is_walked_again(write_shards, write_tar, image, monkeypatch):
    paths = write_shards([3, 2, 4])
    before = ShardIndex(paths)
    write_tar(Path(paths[1]), [("000003.ppm", image(77)), ("000003.cls", b"5")])
    walked = walks_of(monkeypatch)
    after = ShardIndex(paths)
    assert walked == [paths[1]] and after.counts.tolist() == [3, 1, 4] and after.fingerprint != before.fingerprint
    assert ShardIndex(paths[1:]).counts.tolist() == [1, 4] and walked == [paths[1]]


def test_other_labels_and_other_sets_need_no_walk(write_tar, image, tmp_path, monkeypatch):
    for number in range(3):
        members = [(f"{number}.ppm", image(number)), (f"{number}.cls", b"1"), (f"{number}.json", b'{"a": 2}')]
        write_tar(tmp_path / f"{number}.tar", members[: 3 - number % 2])
    paths = [f"{tmp_path}/{number}.tar" for number in range(3)]
    index = ShardIndex(paths)
    walked = walks_of(monkeypatch)
    labelled = index.with_label("json:a")
    assert [size for _, size in labelled.labels[:].tolist()] == [8, -1, 8]
    assert labelled.subset(np.array([1, 2])).with_label("cls").labels[:, 1].tolist() == [1, 1]
    joined = ShardIndex.joined({"a": ShardIndex(paths[:2]), "b": ShardIndex(paths[2:])}, {"a": 1, "b": 2})
    assert np.array_equal(joined.with_label("cls").labels, index.with_label("cls").labels) and not walked


def test_the_fingerprint_is_a_hash_of_names_places_and_contents(write_shards):
    """As it has always been: what was saved with it is the same data for ever."""
    paths = write_shards([3, 0, 2])
    index, digest = ShardIndex(paths), hashlib.blake2b(digest_size=16)
    for path in paths:
        found = index_every_label(path)[""]
        digest.update(json.dumps([os.path.basename(path), len(found.images), found.content]).encode())
        digest.update(found.images.astype("<i8").tobytes())
    assert index.fingerprint == digest.hexdigest() == ShardIndex(paths).fingerprint


def test_each_shard_is_walked_once_by_whoever_comes_first(write_shards, monkeypatch):
    paths, walked = write_shards([2] * 5), walks_of(monkeypatch)
    with ThreadPoolExecutor(4) as threads:
        built = list(threads.map(lambda _: ShardIndex(paths).fingerprint, range(4)))
    assert sorted(walked) == paths and len(set(built)) == 1


def test_who_comes_later_waits_for_who_is_at_it(tmp_path):
    order = []

    def second() -> None:
        with alone(f"{tmp_path}/lock"):
            order.append("second")

    with alone(f"{tmp_path}/lock"):
        other = threading.Thread(target=second)
        other.start()
        other.join(0.3)
        order.append("first")
    other.join()
    assert order == ["first", "second"] and not os.listdir(tmp_path)


def test_where_there_are_no_locks_processes_share_the_walk_and_it_is_told(write_shards, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    monkeypatch.setattr(walking, "num_cores", lambda: 1)
    paths, walked, numbers = write_shards([2] * 6), [], iter(range(2))
    monkeypatch.setattr(kept_index, "_own_place", lambda *_: 3 * next(numbers))  # as two processes would begin
    meeting = threading.Barrier(2)

    def walk(path, image):
        walked.append(path)
        if path in (paths[0], paths[3]) and walked.count(path) == 1:
            meeting.wait(20)  # both are at it
        return index_every_label(path, image)

    monkeypatch.setattr(kept_index, "index_every_label", walk)
    with ThreadPoolExecutor(2) as threads:
        built = list(threads.map(lambda _: ShardIndex(paths).num_samples, range(2)))
    assert built == [12, 12] and sorted(set(walked)) == paths
    assert len(walked) <= 9  # of 12 that two would walk apart; one that is under way there is not known yet
    assert sum("without locks" in record.message for record in caplog.records) in (1, 2)  # threads may both be first


def test_processes_begin_at_places_of_their_own_where_locks_do_not_keep_them_apart(monkeypatch):
    begun = set()
    for pid in range(8):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        begun.add((kept_index._own_place(10_000, False), kept_index._own_place(10_000, True)))
    apart, alike = map(set, zip(*begun, strict=True))
    assert len(apart) == 8 and len(alike) == 1 and max(apart | alike) < 10_000 and kept_index._own_place(0, True) == 0


def test_drafts_that_killed_processes_left_are_removed_from_the_cache(write_shards, cache):
    folder = cache / "index"
    old, young = [[folder / name.format(age) for name in ("{}.tmp", "shards/.tmp-{}")] for age in ("old", "young")]
    (folder / "shards").mkdir(parents=True)
    for path in (*old, *young):
        path.write_bytes(b"1")
    for path in old:
        os.utime(path, (1e9, 1e9))
    ShardIndex(write_shards([2]))
    assert all(path.exists() for path in young) and not any(path.exists() for path in old)


@pytest.mark.parametrize("dies", [False, True])
def test_many_processes_walk_and_one_that_dies_costs_time_alone(write_shards, monkeypatch, dies):
    paths, parent = write_shards([2] * 6), os.getpid()
    expected = [index_every_label(path)[""].images.tolist() for path in paths]
    monkeypatch.setattr(walking, "ALONE_SECONDS", -1)
    monkeypatch.setattr(walking, "num_cores", lambda: 3)
    monkeypatch.setattr(kept_index, "_own_place", lambda *_: 0)  # the one that dies is the last of its process
    here = []

    def walk(path, image):
        if os.getpid() == parent:
            here.append(path)
        elif dies and path == paths[4]:
            os._exit(9)
        return index_every_label(path, image)

    monkeypatch.setattr(kept_index, "index_every_label", walk)
    index = ShardIndex(paths)
    assert np.split(index.images[:], index.ends[:-1])[4].tolist() == expected[4] and index.num_samples == 12
    assert here == ([paths[4]] if dies else [])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_shard_may_take_longer_than_the_patience_of_who_waits_for_it(write_shards, monkeypatch, patience, processes):
    """As long as headers are read, by whichever process: of the one that walks, and of the one that waits for it."""
    paths = write_shards([2] * 2)
    monkeypatch.setattr(walking, "ALONE_SECONDS", -1)
    monkeypatch.setattr(walking, "num_cores", lambda: processes)
    patience.timeout_seconds = 1.5

    def walk(path, image):
        for _ in range(5):
            time.sleep(0.5)
            waiting.moved()
        return index_every_label(path, image)

    monkeypatch.setattr(kept_index, "index_every_label", walk)
    others = waiting.in_threads(lambda _: ShardIndex(paths).num_samples, range(2), str)
    assert list(others) == [4, 4]


def test_a_shard_that_other_processes_cannot_read_is_named(write_shards, monkeypatch):
    paths = write_shards([2] * 4)
    monkeypatch.setattr(walking, "ALONE_SECONDS", -1)
    monkeypatch.setattr(walking, "num_cores", lambda: 2)

    def walk(path, image):
        if path == paths[2]:
            raise PermissionError(13, "Permission denied")
        return index_every_label(path, image)

    monkeypatch.setattr(kept_index, "index_every_label", walk)
    with pytest.raises(UserError, match="002.tar cannot be read on .* \\(Permission denied\\)"):
        ShardIndex(paths)


DAMAGE = {
    "a bit of the numbers": lambda content: content[:-20] + bytes([content[-20] ^ 4]) + content[-19:],
    "a bit in the middle": lambda content: (
        content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
    ),
    "lost": lambda content: bytes(len(content)),
    "random": lambda content: np.random.default_rng(len(content)).bytes(len(content)),
    "cut": lambda content: content[: len(content) // 2],
    "grown": lambda content: content + b"x",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_kept_file_that_is_spoilt_is_made_anew(damage, write_shards, cache):
    paths = write_shards([3, 4])
    whole = ShardIndex(paths, "cls")
    images, labels, prints = whole.images[:], whole.labels[:], (whole.fingerprint, whole.label_fingerprint())
    files = [path for path in (cache / "index").iterdir() if path.is_file()]
    assert {path.suffix for path in files} == {".images", ".labels", ".hash"}
    for path in files:
        content = path.read_bytes()
        aside = path.with_name("aside")  # who has the file open keeps it
        aside.write_bytes(DAMAGE[damage](content))
        aside.replace(path)
    for _ in range(2):
        index = ShardIndex(paths, "cls")
        assert np.array_equal(index.images, images) and np.array_equal(index.labels, labels)
        assert (index.fingerprint, index.label_fingerprint()) == prints


def written_into(path: Path, damage: str) -> None:
    """In the place where it is mapped, as a copy that overwrites, or a disk that loses blocks, would."""
    content = DAMAGE[damage](path.read_bytes())
    with open(path, "r+b") as file:
        file.write(content)
        file.truncate(len(content))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("suffix", [".images", ".labels"])
def test_a_kept_file_that_is_spoilt_while_it_is_read_is_named_and_no_shard_is(damage, suffix, write_shards, cache):
    index = ShardIndex(write_shards([30, 40]), "cls")
    loader = Loader(index, PLAN, seed=0, micro_batch=4, label="cls")
    next(loader)
    (path,) = (cache / "index").glob(f"*{suffix}")
    os.utime(path)  # a look at it is no harm
    next(loader)
    written_into(path, damage)
    with pytest.raises(RunStopped, match=f"{path}, the kept index of the shards, .* run the same command again"):
        next(loader)
    assert not loader.bad.num_bad
    loader.close()
    with pytest.raises(RunStopped, match=str(path)):
        pickle.dumps(index)
    assert np.array_equal(ShardIndex(index.paths, "cls").images[:], np.concatenate([
        index_every_label(shard)[""].images for shard in index.paths
    ]))  # fmt: skip


def test_a_worker_that_finds_the_kept_index_spoilt_says_so(write_shards, cache):
    loader = Loader(ShardIndex(write_shards([30, 40])), PLAN, seed=0, micro_batch=4, num_workers=1)
    next(loader)
    (path,) = (cache / "index").glob("*.images")
    written_into(path, "cut")
    with pytest.raises(RunStopped, match=f"{path}, the kept index"):
        for _ in range(8):  # some are made ahead
            next(loader)
    loader.close()


def test_the_cache_may_be_deleted_while_it_is_read(write_shards, cache):
    index = ShardIndex(write_shards([3, 4]), "cls")
    images, labels = index.images[:], index.labels[:]
    shutil.rmtree(cache)
    sent = pickle.loads(pickle.dumps(index))
    for one in (index, sent):
        assert np.array_equal(one.images, images) and np.array_equal(one.labels, labels)
    assert sent.with_label("cls") is sent and ShardIndex(index.paths).fingerprint == index.fingerprint


def test_what_is_sent_to_a_worker_does_not_grow_with_the_data(write_shards):
    def sent(num_samples: int) -> int:
        index = ShardIndex(write_shards([num_samples], folder=str(num_samples)), "cls")
        loader = Loader(index, PLAN, seed=0, micro_batch=2)
        return len(pickle.dumps(wds.DataPipeline(*loader.stages())))

    assert sent(3000) < sent(30) + 64  # numbers with more digits


def test_index_files_of_the_first_version_are_read():
    images, labels = places(7, 20)
    shards = [{
        "name": "0.tar", "size": 2**40, "sha256": "ab", "count": 20, "problems": [["no image", "x", 1]], "ended": True,
        "content": "c", "labels": {"": "n", "cls": "l"},
    }]  # fmt: skip
    about = json.dumps({"version": 1, "extensions": ["cls"], "shards": shards}).encode()
    file = io.BytesIO()
    np.savez_compressed(file, about=np.frombuffer(about, np.uint8), images=images, labels0=labels)
    for content in (file.getvalue(), index_file.write(index_file.read(file.getvalue()))):
        entry = index_file.read(content)["0.tar"]
        assert np.array_equal(entry.indexes["cls"].images, images)
        assert np.array_equal(entry.indexes["cls"].labels, labels)
        assert entry.index("json").labels.tolist() == [[-1, -1]] * 20
        assert entry.indexes[""].problems == (Problem("no image", "x"),) and entry.sha256 == "ab"


def test_labels_that_no_sample_has_are_alike_in_a_store_and_on_a_disk(write_shards):
    """The fingerprint of labels goes on with shards that have moved to a bucket."""
    path = write_shards([3])[0]
    entry = Entry(os.path.getsize(path), "", index_every_label(path))
    kept = index_file.read(index_file.write({"000.tar": entry}))["000.tar"].index("json")
    found = kept_index.index_tar(path, "json")
    assert kept.label_content == found.label_content and np.array_equal(kept.labels, found.labels)
