import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from prelude.data import kept_index
from prelude.data.errors import UserError
from prelude.data.shards import ShardIndex, expand_shards


def relative(paths, root):
    return [os.path.relpath(path, root) for path in paths]


@pytest.fixture
def folder(tmp_path):
    """Empty files with the names that break careless code."""
    for name in ("0.tar", "1.tar", "2.tar", "b c#1.tar", "100%.tar", "a?b.tar", "{x}.tar", "[y]/1.tar", "[y]/2.tar"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).touch()
    return tmp_path / "d"


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("D/{0..2}.tar", ["0.tar", "1.tar", "2.tar"]),
        ("D/{0,2}.tar::D/1.tar", ["0.tar", "2.tar", "1.tar"]),
        (["D/2.tar", "D/{0..1}.tar"], ["2.tar", "0.tar", "1.tar"]),
        ("D/?.tar", ["0.tar", "1.tar", "2.tar"]),
        ("file://D/0.tar", ["0.tar"]),
        ("D/b c#1.tar", ["b c#1.tar"]),
        ("D/100%.tar", ["100%.tar"]),
        ("D/a?b.tar", ["a?b.tar"]),  # a file that is so named, and not a pattern
        ("D/{x}.tar", ["{x}.tar"]),
        ("D/[y]/*.tar", ["[y]/1.tar", "[y]/2.tar"]),
        ("D/[y]/{1..2}.tar", ["[y]/1.tar", "[y]/2.tar"]),
        ("${WDS_FOLDER}/0.tar", ["0.tar"]),
        ("${FOLDER}/0.tar", ["0.tar"]),
    ],
)
def test_patterns(folder, monkeypatch, pattern, expected):
    monkeypatch.setenv("WDS_FOLDER", str(folder))
    monkeypatch.setenv("WDS_WDS_FOLDER", str(folder))
    fill = lambda text: text.replace("D/", f"{folder}/")  # noqa: E731
    found = expand_shards(fill(pattern) if isinstance(pattern, str) else [fill(p) for p in pattern])
    assert relative(found, folder) == expected


@pytest.mark.parametrize(
    "url", ["pipe:cat x.tar", "sftp://host/{0..1}.tar", "ais://bucket/0.tar", "pipe:aws s3 cp s3://b/{0..1}.tar -"]
)
def test_streams_are_left_to_webdataset(url):
    assert len(expand_shards(url, allow_commands=True)) == 1 + ("{" in url)
    with pytest.raises(UserError, match="is not a local file and cannot be indexed"):
        ShardIndex(url)


@pytest.mark.parametrize(
    "pattern, sentence",
    [
        ("D/7.tar", r"D/7.tar does not exist on HOST; correct data.shards="),
        ("D/{0..3}.tar", r"D/3.tar does not exist on HOST"),
        ("D/*.zip", r"No file matches '.*\*.zip' on HOST"),
        ("D/", r"is a folder of shards; write '.*/\*.tar'"),
        ("${UNSET}/0.tar", r"cannot be expanded \(missing environment variable WDS_UNSET\)"),
        ("D/{0..1.tar", r"cannot be expanded|does not exist"),
        ("D/{000..9999999999}.tar", r"names 10,000,000,000 files"),
        ("D/{0..99999}/{0..99999}.tar", r"names 10,000,000,000 files"),
        ([], r"data.shards is empty"),
        ("", r"does not exist"),
    ],
)
def test_what_cannot_be_found_is_refused_in_one_sentence(folder, pattern, sentence):
    pattern = pattern.replace("D/", f"{folder}/") if pattern else pattern
    with pytest.raises(UserError, match=sentence.replace("HOST", socket.gethostname()).replace("D/", ".*/")) as caught:
        expand_shards(pattern)
    assert "\n" not in str(caught.value)


def test_shards_without_an_image_are_refused(tmp_path, write_tar):
    path = write_tar(tmp_path / "x.tar", [("1.txt", b"x")])
    with pytest.raises(UserError, match="without a single image.*no image, 1"):
        ShardIndex(str(path))


def test_an_unreadable_shard_is_refused(write_shards, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(kept_index, "index_every_label", refuse)
    with pytest.raises(UserError, match="000.tar cannot be read on .* \\(Permission denied\\)"):
        ShardIndex(write_shards([2]))


def test_ids_run_through_the_shards_in_order(write_shards):
    paths = write_shards([3, 0, 1, 4])
    index = ShardIndex(paths, "cls")
    assert index.num_samples == 8 and index.num_shards == 4 and index.counts.tolist() == [3, 0, 1, 4]
    assert [index.key(n) for n in range(8)] == [f"{n:06}" for n in range(8)]
    assert [paths.index(index.shard_of(n)) for n in range(8)] == [0, 0, 0, 2, 3, 3, 3, 3]


def test_the_label_changes_neither_ids_nor_fingerprint(write_shards):
    index = ShardIndex(write_shards([3, 2]))
    labelled = index.with_label(".CLS")
    assert labelled.label == "cls" and len(labelled.labels) == 5
    assert labelled.fingerprint == index.fingerprint and np.array_equal(labelled.images, index.images)
    assert labelled.with_label("cls") is labelled


def test_a_moved_data_set_is_the_same_and_a_changed_one_is_not(tmp_path, write_shards, write_tar):
    paths = write_shards([3, 2])
    before = ShardIndex(paths).fingerprint
    shutil.copytree(tmp_path / "shards", tmp_path / "moved")
    moved = sorted(map(str, (tmp_path / "moved").iterdir()))
    assert ShardIndex(moved).fingerprint == before
    assert ShardIndex(moved[::-1]).fingerprint != before
    os.rename(moved[0], tmp_path / "moved" / "renamed.tar")
    assert ShardIndex([str(tmp_path / "moved" / "renamed.tar"), moved[1]]).fingerprint != before
    assert ShardIndex(write_shards([2, 3], folder="other")).fingerprint != before


def test_problems_are_listed_by_shard(tmp_path, write_tar):
    good = write_tar(tmp_path / "0.tar", [("1.jpg", b"x")])
    bad = write_tar(tmp_path / "1.tar", [("1.jpg", b"x"), ("2.txt", b"x"), ("3.jpg", b"")])
    index = ShardIndex([str(good), str(bad)])
    assert index.num_problems == 2 and list(index.problems) == [str(bad)]
    assert [(p.reason, p.where) for p in index.problems[str(bad)]] == [("no image", "2"), ("empty image", "3.jpg")]


# ---- the cache


def same(a: ShardIndex, b: ShardIndex) -> bool:
    return np.array_equal(a.images, b.images) and np.array_equal(a.labels, b.labels) and a.problems == b.problems


def test_a_tar_is_walked_once(write_shards, write_tar, tmp_path, monkeypatch):
    paths = write_shards([3, 2]) + [str(write_tar(tmp_path / "bad.tar", [("x.txt", b"")]))]
    first = ShardIndex(paths, "cls")
    monkeypatch.setattr(kept_index, "index_every_label", lambda *_: pytest.fail("walked again"))
    assert same(ShardIndex(paths, "cls"), first) and first.num_problems == 1


def test_a_tar_that_was_written_again_is_walked_again(write_shards, write_tar):
    paths = write_shards([3])
    ShardIndex(paths)
    status = os.stat(paths[0])
    write_shards([2])
    assert os.stat(paths[0]).st_size == status.st_size  # tars are padded: the size alone says nothing
    os.utime(paths[0], ns=(0, status.st_mtime_ns + 1))
    assert ShardIndex(paths).num_samples == 2


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not a zip", None])
def test_a_spoilt_cache_is_built_again(write_shards, cache, damage):
    paths = write_shards([3])
    first = ShardIndex(paths, "cls")
    kept = {path.suffix: path for path in (cache / "index").rglob("*") if path.is_file()}
    assert kept.keys() == {".npz", ".images", ".labels", ".hash"}
    for spoilt in ([".labels"], [".images"], [".hash"], [".npz", ".images"]):
        for suffix in spoilt:
            content = kept[suffix].read_bytes()[:-10] if damage is None else damage
            kept[suffix].unlink()  # nothing is ever written into a file that somebody may have mapped
            kept[suffix].write_bytes(content)
        found = ShardIndex(paths, "cls")
        assert same(found, first) and found.fingerprint == first.fingerprint


def test_a_cache_that_cannot_be_written_is_no_failure(write_shards, monkeypatch, caplog):
    paths = write_shards([3, 2])
    monkeypatch.setenv("PRELUDE_CACHE", f"{paths[0]}/within/a/file")
    assert ShardIndex(paths).num_samples == 5
    assert [record.message for record in caplog.records if "not kept" in record.message]


def test_many_may_build_the_cache_at_once(write_shards, cache):
    paths = write_shards([3] * 6)
    with ThreadPoolExecutor(6) as threads:
        built = list(threads.map(lambda _: ShardIndex(paths), range(6)))
    assert all(same(index, built[0]) for index in built)
    assert {path.suffix for path in (cache / "index").rglob("*")} == {"", ".npz", ".images", ".hash"}
