import gzip
import io
import random
import tarfile

import numpy as np
import pytest
import webdataset as wds

from prelude.data.errors import UserError
from prelude.data.tar_index import index_tar, keys_by_offset

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
BLOCK = 512


def contents(path, places):
    with open(path, "rb") as file:
        whole = file.read()
    return [whole[offset : offset + size] for offset, size in places]


def reasons(index):
    return sorted(problem.reason for problem in index.problems)


@pytest.fixture
def sound(tmp_path, write_tar):
    """(path, images): ten samples with image and label in one tar."""
    images = [f"image {n} ".encode() * 100 for n in range(10)]
    members = [(f"{n:03}.{ext}", images[n] if ext == "jpg" else b"%d" % n) for n in range(10) for ext in ("jpg", "cls")]
    return write_tar(tmp_path / "sound.tar", members), images


# Where the members of `sound` begin: an image takes 1 + 2 blocks, a label 1 + 1.
def header_of(n):
    return n * 5 * BLOCK


@pytest.mark.parametrize("format", FORMATS)
def test_the_index_agrees_with_tarfile_and_webdataset(format, tmp_path, write_tar):
    rng = random.Random(format)
    members = []
    for n in range(60):
        folder = "/".join("d" * rng.randint(1, 60) for _ in range(rng.choice([0, 0, 1, 3])))
        name = f"{folder}/{n:04}".lstrip("/")
        if format != tarfile.USTAR_FORMAT:
            name += rng.choice(["", "_é", "_" + "long" * rng.randint(20, 60)])
        members += [
            (f"{name}.{rng.choice(['jpg', 'JPEG', 'png'])}", rng.randbytes(rng.choice([1, 511, 512, 513, 3000])))
        ]
        members += [(f"{name}.cls", b"7")] * rng.randint(0, 1)
    path = write_tar(tmp_path / "x.tar", members, format)
    index = index_tar(str(path), "cls")

    with tarfile.open(path) as tar:
        expected = [(m.offset_data, m.size) for m in tar if not m.name.endswith(".cls")]
    assert index.images.tolist() == [list(place) for place in expected]
    assert not index.problems

    stream = list(wds.DataPipeline(wds.SimpleShardList([str(path)]), wds.tarfile_to_samples()))
    image_of = [next(s[ext] for ext in ("jpg", "jpeg", "png") if ext in s) for s in stream]
    assert contents(path, index.images.tolist()) == image_of
    keys = keys_by_offset(str(path))
    assert [keys[offset] for offset, _ in index.images.tolist()] == [s["__key__"] for s in stream]
    assert [offset >= 0 for offset, _ in index.labels.tolist()] == ["cls" in s for s in stream]


def test_members_that_webdataset_passes_over_are_passed_over(tmp_path, write_tar):
    members = [("README", b"x"), (".hidden.jpg", b"x"), ("__meta__/1.jpg", b"x"), ("dir.d/1.jpg", b"yes"), ("a/", b"")]
    path = write_tar(tmp_path / "x.tar", members)
    index = index_tar(str(path))
    assert contents(path, index.images.tolist()) == [b"yes"] and not index.problems


def test_the_image_is_preferred_to_the_mask(tmp_path, write_tar):
    members = [
        ("1.png", b"mask"),
        ("1.jpg", b"image"),
        ("2.seg.png", b"mask"),
        ("2.png", b"image"),
        ("3.left.jpg", b"image"),
    ]
    path = write_tar(tmp_path / "x.tar", members)
    index = index_tar(str(path))
    assert contents(path, index.images.tolist()) == [b"image"] * 3 and not index.problems


def test_a_sound_shard_has_no_problems(sound):
    path, images = sound
    index = index_tar(str(path), "cls")
    assert contents(path, index.images.tolist()) == images
    assert contents(path, index.labels.tolist()) == [b"%d" % n for n in range(10)]
    assert not index.problems


@pytest.mark.parametrize(
    "cut, num_samples, expected",
    [
        (header_of(6) + 700, 6, ["cut short"]),  # within an image
        (header_of(6), 6, []),  # between two samples
        (header_of(6) + 100, 6, ["cut short"]),  # within a header
        (header_of(6) + 3 * BLOCK, 7, []),  # between an image and its label
        (0, 0, ["no end marker"]),
    ],
)
def test_a_truncated_tar_keeps_what_is_whole(sound, cut, num_samples, expected):
    path, images = sound
    path.write_bytes(path.read_bytes()[:cut])
    index = index_tar(str(path))
    assert contents(path, index.images.tolist()) == images[:num_samples]
    assert reasons(index) == expected
    assert not index.ended


def test_a_damaged_header_costs_its_member_and_not_the_rest(sound):
    path, images = sound
    tar = bytearray(path.read_bytes())
    tar[header_of(4) + 150] ^= 1  # the checksum
    path.write_bytes(tar)
    index = index_tar(str(path))
    assert contents(path, index.images.tolist()) == images[:4] + images[5:]
    assert reasons(index) == ["bad header", "no image"]  # the header, and the label that is left without an image


def test_a_hole_of_zeros_is_not_taken_for_the_end(sound):
    path, images = sound
    tar = bytearray(path.read_bytes())
    tar[header_of(4) : header_of(6)] = bytes(header_of(2))
    path.write_bytes(tar)
    index = index_tar(str(path))
    assert contents(path, index.images.tolist()) == images[:4] + images[6:]
    assert reasons(index) == ["zeros between members"]


def test_joined_tars_are_read_to_the_end(sound):
    path, images = sound
    renamed = path.read_bytes()
    path.write_bytes(renamed + renamed)
    index = index_tar(str(path))
    assert len(index.images) == 10
    assert reasons(index) == ["duplicate key"] * 10 + ["zeros between members"]


def test_random_damage_never_raises_and_never_invents_bytes(sound):
    path, _ = sound
    whole = path.read_bytes()
    for seed in range(150):
        rng = random.Random(seed)
        tar = bytearray(whole)
        for _ in range(rng.randint(1, 20)):
            tar[rng.randrange(header_of(10))] = rng.randrange(256)
        path.write_bytes(tar[: rng.randrange(len(tar))] if seed % 3 == 0 else tar)
        index = index_tar(str(path), "cls")
        assert all(offset + size <= len(tar) for offset, size in index.images.tolist())


@pytest.mark.parametrize(
    "members, num_samples, expected",
    [
        ([("1.jpg", b"x"), ("2.txt", b"x"), ("3.jpg", b"x")], 2, ["no image"]),
        ([("1.jpg", b"x"), ("2.jpg", b""), ("3.jpg", b"x")], 2, ["empty image"]),
        ([("1.jpg", b"x"), ("2.jpg", b"x"), ("1.jpg", b"y")], 2, ["duplicate key"]),
        ([("1.jpg", b"x"), ("1.jpg", b"y"), ("2.jpg", b"x")], 2, ["duplicate member"]),
        ([("a.1.jpg", b"x"), ("a.2.jpg", b"y"), ("b.jpg", b"x")], 1, ["several images under one key"]),
    ],
)
def test_every_sample_that_is_left_out_is_named(tmp_path, write_tar, members, num_samples, expected):
    index = index_tar(str(write_tar(tmp_path / "x.tar", members)))
    assert len(index.images) == num_samples and reasons(index) == expected


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_beyond_8_gib_are_passed(tmp_path, format):
    """Base-256 sizes in GNU tars, a record in PAX ones. The file is sparse and takes no space."""
    large = tarfile.TarInfo("1.bin")
    large.size = 9 * 2**30
    small = tarfile.TarInfo("2.jpg")
    small.size = 3
    path = tmp_path / "x.tar"
    with open(path, "wb") as file:
        file.write(large.tobuf(format))
        file.seek(large.size, io.SEEK_CUR)
        file.write(small.tobuf(format) + b"abc" + bytes(BLOCK - 3) + bytes(2 * BLOCK))
    index = index_tar(str(path))
    assert index.images[:, 1].tolist() == [3] and index.images[0, 0] > 9 * 2**30
    assert reasons(index) == ["no image"]  # 1.bin


def test_an_image_too_large_to_be_one_is_left_out(tmp_path):
    info = tarfile.TarInfo("1.jpg")
    info.size = 2**30
    path = tmp_path / "x.tar"
    with open(path, "wb") as file:
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(info.size + 3 * BLOCK)
    index = index_tar(str(path))
    assert len(index.images) == 0 and reasons(index) == ["image too large"]


def test_links_are_not_files(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("1.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    index = index_tar(str(path))
    assert len(index.images) == 0 and reasons(index) == ["a link and not a file"]


def test_a_compressed_tar_is_refused_with_the_way_out(sound):
    path, _ = sound
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(UserError, match="compressed with gzip.*uncompressed tar"):
        index_tar(str(path))


def test_tables_are_plain_integers(sound):
    index = index_tar(str(sound[0]))
    assert index.images.dtype == np.int64 and index.labels.shape == (0, 2)
