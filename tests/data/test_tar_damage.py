"""What damage costs: as little as it must, and as much as is told."""

import io
import random
import tarfile

import numpy as np
import pytest

from prelude.data.batch import View, ViewPlan
from prelude.data.errors import UserError
from prelude.data.loader import Loader, build_loader, one_pass
from prelude.data.shards import ShardIndex
from prelude.data.tar_index import index_tar

BLOCK = 512
PLAN = ViewPlan((View((6, 6)),))
SAMPLE = 3 * BLOCK + 2 * BLOCK  # an image of two blocks and its label, with their headers


@pytest.fixture
def shard(tmp_path, write_tar):
    """shard(count, name) -> (path, images): samples of `SAMPLE` bytes each."""

    def write(count=100, name="x.tar", format=tarfile.USTAR_FORMAT):
        images = [random.Random(n).randbytes(1000) for n in range(count)]
        pairs = [
            (f"{n:04}.{ext}", images[n] if ext == "jpg" else b"%d" % n) for n in range(count) for ext in ("jpg", "cls")
        ]
        return write_tar(tmp_path / name, pairs, format), images

    return write


def found(path, index):
    whole = path.read_bytes()
    return [whole[offset : offset + size] for offset, size in index.images[:].tolist()]


def labels_of(path, index):
    whole = path.read_bytes()
    return [whole[offset : offset + size] if offset >= 0 else None for offset, size in index.labels[:].tolist()]


def with_size(tar: bytearray, header: int, size: int) -> None:
    """Claims another size in a header, with a right checksum."""
    tar[header + 124 : header + 136] = b"%011o\0" % size
    tar[header + 148 : header + 156] = b" " * 8
    tar[header + 148 : header + 156] = b"%06o\0 " % sum(tar[header : header + BLOCK])


# ---- sizes that are wrong


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("size", [10**8, 41_000, 99 * SAMPLE - BLOCK - 7])
def test_a_size_that_is_too_large_costs_one_sample(shard, size, format):
    """Beyond the end, into the middle of another image, into the end marker."""
    path, images = shard(format=format)
    tar = bytearray(path.read_bytes())
    with_size(tar, 3 * SAMPLE, size)
    path.write_bytes(tar)
    index = index_tar(str(path), "cls")
    assert found(path, index) == images[:3] + images[4:]
    assert labels_of(path, index) == [b"%d" % n for n in range(100) if n != 3]
    assert {problem.reason for problem in index.problems} == {"wrong size", "no image"}


def test_a_size_that_is_too_small_costs_one_sample(shard):
    path, images = shard()
    tar = bytearray(path.read_bytes())
    with_size(tar, 3 * SAMPLE, 100)
    path.write_bytes(tar)
    index = index_tar(str(path))
    assert found(path, index) == images[:3] + [images[3][:100]] + images[4:]
    assert [problem.reason for problem in index.problems] == ["bad header"]


def test_a_size_in_an_extended_header_that_is_too_large_costs_one_sample(tmp_path, write_tar):
    path = write_tar(tmp_path / "x.tar", [(f"{'n' * 120}{n}.jpg", b"x") for n in range(9)], tarfile.GNU_FORMAT)
    tar = bytearray(path.read_bytes())
    with_size(tar, 4 * 4 * BLOCK, 2**30)  # the long name's own header
    path.write_bytes(tar)
    index = index_tar(str(path))
    assert len(index.images) == 8  # what is left of its name has no extension
    assert [problem.reason for problem in index.problems] == ["wrong size"]


def test_a_nested_tar_is_one_member_whatever_comes_after_it(tmp_path, write_tar):
    inner = write_tar(tmp_path / "inner.tar", [(f"{n}.jpg", b"inside") for n in range(5)]).read_bytes()
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("a.tar", inner), ("b.jpg", b"2"), ("z.tar", inner)])
    tar = bytearray(path.read_bytes())
    tar[3 * BLOCK + len(inner) + 200] ^= 255  # the header of b.jpg
    path.write_bytes(tar)
    assert found(path, index_tar(str(path))) == [b"1"]


@pytest.mark.parametrize("change", [-700, -BLOCK, -3, 1, 100, 5000])
@pytest.mark.parametrize("where", [700, BLOCK + 300, 3 * BLOCK + 5])
def test_bytes_that_are_missing_or_too_many_cost_their_neighbours_only(shard, where, change):
    path, images = shard()
    tar, at = path.read_bytes(), 50 * SAMPLE + where
    path.write_bytes(tar[:at] + random.Random(0).randbytes(max(change, 0)) + tar[at - min(change, 0) :])
    index = index_tar(str(path), "cls")
    kept = found(path, index)
    assert len(set(images) & set(kept)) >= 98 and len(kept) <= 100
    assert index.problems
    for image, label in zip(kept, labels_of(path, index), strict=True):
        if image in images and label is not None:
            assert images[int(label)] == image


def test_after_a_damaged_old_header_the_walk_goes_on(tmp_path, write_tar):
    """v7 headers have no magic to look for."""
    path = write_tar(tmp_path / "x.tar", [(f"{n}.jpg", b"%d" % n) for n in range(9)])
    tar = bytearray(path.read_bytes())
    for header in range(0, 9 * 2 * BLOCK, 2 * BLOCK):
        tar[header + 257 : header + BLOCK] = bytes(BLOCK - 257)
        with_size(tar, header, 1)
    tar[4 * 2 * BLOCK + 150] ^= 1
    path.write_bytes(tar)
    assert found(path, index_tar(str(path))) == [b"%d" % n for n in range(9) if n != 4]


# ---- what is told


def lost(*paths) -> int:
    return ShardIndex([str(path) for path in paths]).num_lost


@pytest.mark.parametrize("rest", ["garbage", "zeros"])
def test_bytes_that_no_member_covers_are_samples_lost(shard, rest):
    path, images = shard(400)
    tar = bytearray(path.read_bytes())
    end = 20 * SAMPLE + 100
    tar[end:] = random.Random(1).randbytes(len(tar) - end) if rest == "garbage" else bytes(len(tar) - end)
    path.write_bytes(tar)
    assert found(path, index_tar(str(path))) == images[:20]
    assert lost(path) == pytest.approx(380, abs=8)
    with pytest.raises(UserError, match="3[78]. samples .* lost or damaged, beside 20 sound ones"):
        build_loader(str(path), PLAN, seed=0, micro_batch=1, max_bad_share=0.9)
    assert build_loader(str(path), PLAN, seed=0, micro_batch=1, max_bad_share=0.96).num_samples == 20


@pytest.mark.parametrize("cut", [20 * SAMPLE + 700, 20 * SAMPLE])
def test_what_was_cut_off_is_what_other_shards_have_more(shard, cut):
    """Between two members no header tells; the others' end markers do."""
    paths = [shard(400, f"{n}.tar")[0] for n in range(4)]
    paths[1].write_bytes(paths[1].read_bytes()[:cut])
    assert lost(*paths) == 380
    with pytest.raises(UserError, match="380 samples .* beside 1220 sound ones"):
        build_loader([str(path) for path in paths], PLAN, seed=0, micro_batch=1, max_bad_share=0.2)


def test_a_shard_that_is_none_costs_all_that_others_have(shard, tmp_path):
    paths = [shard(50, f"{n}.tar")[0] for n in range(3)]
    for content in (b"", b"<html>404</html>" * 60, bytes(9000), b"\x89"):
        paths[2].write_bytes(content)
        assert lost(*paths) == (0 if content == bytes(9000) else 50)  # a tar without members has an end marker


def test_without_end_markers_nothing_is_lost_and_it_is_said_once(shard, caplog):
    paths = [shard(30 - 10 * n, f"{n}.tar")[0] for n in range(2)]
    for path in paths:
        path.write_bytes(path.read_bytes().rstrip(b"\0")[: 30 * SAMPLE])
    paths = [str(path) for path in paths]
    for path in paths:
        with open(path, "r+b") as file:
            file.truncate((30 if path.endswith("0.tar") else 20) * SAMPLE)
    index = ShardIndex(paths)
    assert index.num_samples == 50 and index.num_lost == index.num_problems == 0 and not index.problems
    Loader(index, PLAN, seed=0, micro_batch=1)
    (said,) = [record.message for record in caplog.records if "without an end marker" in record.message]
    assert said.startswith("2 shards")


def test_an_end_marker_of_any_usual_length_is_no_loss(shard):
    path, _ = shard(10)
    tar = path.read_bytes()[: 10 * SAMPLE]
    for record in (BLOCK, 10_240, 64 * BLOCK, 2**20):
        whole = tar + bytes(2 * BLOCK)
        path.write_bytes(whole + bytes(-len(whole) % record))
        index = index_tar(str(path))
        assert index.ended and not index.problems


def test_each_image_under_one_key_is_a_loss(tmp_path, write_tar):
    members = [(f"IMG.2023.{n:03}.jpg", b"x") for n in range(50)] + [("one.jpg", b"x")]
    index = index_tar(str(write_tar(tmp_path / "x.tar", members)))
    (problem,) = index.problems
    assert len(index.images) == 1 and problem.lost == 50 and "first dot" in problem.where


# ---- names and neighbours


def test_what_desktops_leave_behind_is_passed_over(tmp_path, write_tar, image):
    members = []
    for n in range(4):
        for ext, content in (("ppm", image(n)), ("cls", b"%d" % n)):
            members += [(f"a/b/._{n}.{ext}", b"\0\5\x16\7"), (f"a/b/{n}.{ext}", content)]
    droppings = (
        "a/.DS_Store",
        "__MACOSX/a/b/._0.ppm",
        "__MACOSX/a/9.ppm",
        "a/b/Thumbs.db",
        "a/desktop.ini",
        "a/.x/.y.ppm",
    )
    droppings += ("a/b/@eaDir/0.ppm", "a/.AppleDouble/1.ppm", "a/.ipynb_checkpoints/0-checkpoint.ppm")
    path = write_tar(tmp_path / "x.tar", members + [(name, b"x") for name in droppings])
    index = ShardIndex(str(path), "cls")
    assert found(path, index) == [image(n) for n in range(4)] and not index.problems
    assert labels_of(path, index) == [b"%d" % n for n in range(4)]


def test_a_data_set_below_a_hidden_folder_is_one(tmp_path, write_tar):
    path = write_tar(
        tmp_path / "x.tar", [("home/me/.cache/set/1.jpg", b"1"), ("./train/2.jpg", b"2"), ("../3.jpg", b"3")]
    )
    assert found(path, index_tar(str(path))) == [b"1", b"2", b"3"]


@pytest.mark.parametrize("seed", range(6))
def test_members_of_a_sample_need_not_be_neighbours(tmp_path, write_tar, seed):
    """By kind, either kind first, or shuffled: pairs are those of the names."""
    images, labels = ([(f"d/{n:03}.{ext}", f"{ext}{n}".encode()) for n in range(30)] for ext in ("jpg", "cls"))
    members = images + labels if seed == 0 else labels + images
    if seed > 1:
        random.Random(seed).shuffle(members)
    path = write_tar(tmp_path / "x.tar", members)
    index = index_tar(str(path), "cls")
    assert not index.problems and (np.diff(index.images[:, 0]) > 0).all()
    in_order = [content for name, content in members if name.endswith("jpg")]
    assert found(path, index) == in_order
    assert labels_of(path, index) == [content.replace(b"jpg", b"cls") for content in in_order]


def test_two_data_sets_in_one_tar_lend_each_other_no_labels(tmp_path, write_tar):
    members = [("1.jpg", b"one"), ("2.jpg", b"two"), ("1.png", b"another one"), ("1.cls", b"7"), ("2.mask.png", b"m")]
    path = write_tar(tmp_path / "x.tar", members)
    index = index_tar(str(path), "cls")
    assert found(path, index) == [b"one", b"two"] and labels_of(path, index) == [None, None]
    assert [(problem.reason, problem.where) for problem in index.problems] == [("duplicate key", "1")]


def test_names_with_dots_have_their_labels(tmp_path, write_tar):
    members = [
        ("track 0.0 (v1.2).jpg", b"a"), ("track 0.0 (v1.2).cls", b"1"),
        ("b.left.jpg", b"b"), ("b.cls", b"2"),
        ("c.left.jpg", b"c"), ("c.right.cls", b"3"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "x.tar", members)
    index = index_tar(str(path), "cls")
    assert found(path, index) == [b"a", b"b", b"c"] and labels_of(path, index) == [b"1", b"2", None]


def test_a_label_that_nobody_has_is_refused_with_the_rule_of_the_dot(tmp_path, write_tar, image):
    index = ShardIndex(str(write_tar(tmp_path / "x.tar", [("a.1.ppm", image(1)), ("a.2.cls", b"1")])), "cls")
    with pytest.raises(UserError, match="first dot"):
        one_pass(index, PLAN, batch_size=1, label="cls")


# ---- labels


@pytest.mark.parametrize("spoilt", [b"", b"x", b"[1, 2]", b"1.5", b"\xff\xfe", b"9" * 5000, b"99999999999999999999"])
@pytest.mark.parametrize("extension", ["cls", "json"])
def test_a_spoilt_label_costs_its_sample_wherever_it_stands(tmp_path, write_tar, image, spoilt, extension):
    for where in (0, 4):
        pairs = [[(f"{n}.ppm", image(n)), (f"{n}.{extension}", spoilt if n == where else b"%d" % n)] for n in range(9)]
        path = write_tar(tmp_path / f"{where}.tar", [member for pair in pairs for member in pair])
        passes = one_pass(ShardIndex(str(path), extension), PLAN, batch_size=9, label=extension)
        (batch,) = passes
        assert batch.labels.tolist() == [n for n in range(9) if n != where]
        assert dict(passes.bad.counts) == {(str(path), f"bad .{extension} label"): 1}


def test_a_label_that_claims_more_memory_than_it_has_is_spoilt(tmp_path, write_tar, image):
    def npy(shape):
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": shape})
        return file.getvalue() + bytes(8)

    members = [("0.ppm", image(0)), ("0.npy", npy((10**11,))), ("1.ppm", image(1)), ("1.npy", npy(()))]
    passes = one_pass(ShardIndex(str(write_tar(tmp_path / "x.tar", members)), "npy"), PLAN, batch_size=2, label="npy")
    assert [batch.sample_ids.tolist() for batch in passes] == [[1]]
