"""Binary data sets, stacks of arrays, and shards that are packed again."""

import errno
import gzip
import io
import json

import numpy as np
import pytest
from packed_shards import left_out, read_shards, read_tar
from PIL import Image

from prelude.data.errors import RunStopped, UserError
from prelude.data.packing import stacks
from prelude.data.packing.open import open_source
from prelude.data.packing.source import SourceOptions
from prelude.data.packing.stacks import StackSource
from prelude.data.shapes import write_shards
from prelude.data.shards import ShardIndex


def pixels_by_number(folder, split="train") -> dict[int, np.ndarray]:
    return {
        int(s["source"].rpartition("/")[2]): np.asarray(Image.open(io.BytesIO(s["png"])))
        for s in read_shards(folder, split)
    }


def labels_by_number(folder, split="train") -> dict[int, int]:
    return {int(s["source"].rpartition("/")[2]): int(s["cls"]) for s in read_shards(folder, split)}


def noise(*shape, dtype=np.uint8):
    return np.random.default_rng(sum(shape)).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


@pytest.mark.parametrize("label_bytes", [1, 2])
def test_cifar(write_files, packed, label_bytes):
    images, labels = noise(7, 3, 32, 32), [3, 0, 1, 2, 3, 1, 0]
    coarse = [b"\7"] * (label_bytes - 1)
    rows = [b"".join([*coarse, bytes([n]), image.tobytes()]) for n, image in zip(labels, images, strict=True)]
    train = {"data_batch_1.bin": b"".join(rows[:4]), "data_batch_2.bin": b"".join(rows[4:])}
    if label_bytes == 2:
        train = {"train.bin": b"".join(rows)}
    names = {1: "batches.meta.txt", 2: "fine_label_names.txt"}[label_bytes]
    test = "test_batch.bin" if label_bytes == 1 else "test.bin"
    source = write_files("cifar", {**train, test: rows[0], names: b"plane\ncar\nbird\ncat\n\n"})
    with pytest.raises(UserError, match="splits test, train; write --split"):
        packed(source)
    folder, _ = packed(source, options={"split": "train"})
    assert labels_by_number(folder) == dict(enumerate(labels))
    for number, found in pixels_by_number(folder).items():
        assert np.array_equal(found, images[number].transpose(1, 2, 0))
    assert (folder / "classes.txt").read_text().split() == ["plane", "car", "bird", "cat"]
    packed(source, name="test", options={"split": "test"})
    assert labels_by_number(folder, "test") == {0: 3}


@pytest.mark.parametrize("names", [("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
                                   ("train-images.idx3-ubyte", "train-labels.idx1-ubyte")])  # fmt: skip
def test_mnist(write_files, packed, names):
    images, labels = noise(9, 28, 28), np.arange(9, dtype=np.uint8)
    content = [
        b"\0\0\x08" + bytes([a.ndim]) + np.array(a.shape, ">u4").tobytes() + a.tobytes() for a in (images, labels)
    ]
    if names[0].endswith(".gz"):
        content = [gzip.compress(c) for c in content]
    source = write_files("mnist", dict(zip(names, content, strict=True)))
    folder, _ = packed(source)
    assert labels_by_number(folder) == {n: n for n in range(9)}
    assert all(np.array_equal(found, images[n]) for n, found in pixels_by_number(folder).items())
    cut = write_files("cut", {names[0]: content[0][:-9], names[1]: content[1]})
    with pytest.raises(UserError, match="is damaged|cannot be read"):
        packed(cut, to="other")


@pytest.mark.parametrize(
    "shape, dtype",
    [((6, 8, 9), np.uint8), ((6, 8, 9), np.uint16), ((6, 8, 9, 3), np.uint8), ((6, 3, 8, 9), np.uint8),
     ((6, 1, 8, 9), np.uint16)],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["npy", "zarr"])
def test_stacks(packed, tmp_path, shape, dtype, kind, monkeypatch):
    monkeypatch.setattr(stacks, "CACHE_BYTES", 100)
    images, labels = noise(*shape, dtype=dtype), np.array([5, 4, 3, 2, 1, 0])
    options = {}
    if kind == "npy":
        np.save(tmp_path / "x.npy", images)
        np.save(tmp_path / "y.npy", labels)
        options = {"label": (str(tmp_path / "y.npy"),)}
    else:
        zarr = pytest.importorskip("zarr")
        group = zarr.open_group(str(tmp_path / "x.zarr"), mode="w")
        group.create_array("images", shape=shape, chunks=(4, *shape[1:]), dtype=dtype)[:] = images
        group.create_array("digit", shape=(6,), dtype=labels.dtype)[:] = labels
        options = {"label": ("digit",)}
    folder, _ = packed(tmp_path / f"x.{kind}", options=options)
    assert labels_by_number(folder) == {n: 5 - n for n in range(6)}
    if images.ndim == 4 and shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    for number, found in pixels_by_number(folder).items():
        assert found.astype(dtype).tobytes() == images[number].tobytes()


@pytest.mark.parametrize("shape, dtype", [((5, 8, 9, 4), np.uint16), ((5, 6, 8, 9), np.uint8), ((5, 8, 9), np.float32)])
def test_stacks_that_png_cannot_hold_are_packed_as_arrays(packed, tmp_path, shape, dtype):
    images = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    np.save(tmp_path / "x.npy", images)
    folder, summary = packed(tmp_path / "x.npy")
    assert not summary["lost"]
    rows = [np.load(io.BytesIO(sample["npy"])) for sample in read_shards(folder)]
    rows.sort(key=lambda row: row.tobytes())
    expected = [image[:, :, None] if image.ndim == 2 else image for image in images]
    expected = [image.transpose(1, 2, 0) if image.shape[0] == 6 else image for image in expected]
    assert [row.dtype for row in rows] == [dtype] * 5
    assert [row.tolist() for row in rows] == [image.tolist() for image in sorted(expected, key=lambda i: i.tobytes())]


@pytest.mark.parametrize(
    "array, sentence",
    [
        (np.zeros((4, 8, 8, 8), np.uint8), "write an array of numbers"),
        (np.zeros((4, 8, 8), np.complex64), "write an array of numbers"),
        (np.zeros((4, 3, 8, 3), np.uint8), "two axes that may be the channels"),
        (np.zeros(4), "write an array of numbers"),
        (np.array([{}], object), "cannot be read as .npy"),
    ],
)
def test_stacks_that_cannot_be_held_are_refused(packed, tmp_path, array, sentence):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=sentence):
        packed(tmp_path / "x.npy")


def test_an_archive_of_arrays_is_refused_as_images_and_as_labels(packed, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 8, 8), np.uint8))
    np.savez(tmp_path / "y.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.zeros(4, int))
    with pytest.raises(UserError, match="y.npz cannot be read as .npy .*; save one array with np.save"):
        packed(tmp_path / "x.npy", options={"label": (str(tmp_path / "y.npz"),)})
    renamed = (tmp_path / "y.npz").rename(tmp_path / "y.npy")
    with pytest.raises(UserError, match="y.npy cannot be read as .npy .*; save one array with np.save"):
        packed(renamed)
    renamed.write_bytes(b"PK\3\4 of which the rest is lost")
    with pytest.raises(UserError, match="y.npy cannot be read as .npy"):
        packed(renamed)


def test_pickles_are_refused(packed, write_files):
    with pytest.raises(UserError, match="pickles, whose reading can run code"):
        packed(write_files("py", {"data_batch_1": b"\x80\x02", "batches.meta": b"\x80\x02"}))


# ---- shards


def test_a_disk_that_fails_stops_the_packing_of_a_store_and_damage_does_not(packed, tmp_path, monkeypatch):
    zarr = pytest.importorskip("zarr")
    images = noise(6, 8, 9, dtype=np.uint8)
    zarr.create_array(str(tmp_path / "x.zarr"), shape=images.shape, chunks=(2, 8, 9), dtype=np.uint8)[:] = images
    raised, read = (
        [RuntimeError("error during blosc decompression"), OSError(errno.EIO, "I/O error")],
        StackSource._block,
    )

    def failing(self, block):
        if block == 1:
            raise raised[0]
        return read(self, block)

    monkeypatch.setattr(StackSource, "_block", failing)
    assert packed(tmp_path / "x.zarr")[1]["lost"] == {"damaged chunk": 2}
    raised.pop(0)
    with pytest.raises(RunStopped, match=r"x.zarr cannot be read \(Input/output error\); mend the disk"):
        packed(tmp_path / "x.zarr", to="again")


@pytest.fixture
def shards(tmp_path, write_tar, picture):
    """Two shards with the same keys in both, masks and texts."""
    for shard in range(2):
        members = []
        for n in range(5):
            number = shard * 5 + n
            members += [
                (f"{n:03d}.jpg", picture(number, "JPEG", 30, 40)), (f"{n:03d}.mask.npy", b"mask %d" % number),
                (f"{n:03d}.txt", b"kind %d\n" % (number % 3)), (f"{n:03d}.json", b'{"patient": "p%d"}' % (number % 4)),
            ]  # fmt: skip
        members += [
            ("005.txt", b"no image"),
            ("006.jpg", b"garbage"),
            (f"lone.{shard}.jpg", picture(90 + shard, "JPEG")),
        ]
        write_tar(tmp_path / "old" / f"{shard}.tar", members)
    return tmp_path / "old"


def test_shards_are_packed_again_with_every_member(shards, packed):
    folder, summary = packed(shards, per_shard=3)
    samples = read_shards(folder)
    assert len(samples) == 12 and len({s["key"] for s in samples}) == 12
    old = {f"{path.name}/{key}": members for path in shards.iterdir() for key, members in read_tar(path).items()}
    for sample in samples:
        name = sample["source"]
        if "lone" not in name:
            assert {k: v for k, v in sample.items() if k not in ("key", "shard", "source")} == old[name]
    assert left_out(folder) == {
        f"{n}.tar/{key}": (reason, True)
        for n in range(2)
        for key, reason in (("005", "no image"), ("006", "not an image"))
    }
    again, _ = packed(folder, to="again", seed=5)  # keys that are unique and plain stay
    assert {s["key"]: s["jpg"] for s in read_shards(again)} == {s["key"]: s["jpg"] for s in samples}


@pytest.mark.parametrize("name", ["1.png", "cats/1.jpg", "data/x.parquet"])
def test_images_that_lie_beside_shards_are_not_ignored(shards, packed, picture, name):
    (shards / name).parent.mkdir(exist_ok=True)
    (shards / name).write_bytes(picture(1))
    with pytest.raises(UserError, match=rf"holds tar shards and, beside them, {name}; write '{shards}/\*.tar'"):
        packed(shards)
    assert len(read_shards(packed(f"{shards}/*.tar")[0])) == 12


def test_what_lies_beside_shards_and_is_no_image_is_nothing_to_ask(shards, packed):
    for name in ("classes.txt", "train.pack.json", "train.index.npz", "features.npy", "README.md"):
        (shards / name).write_bytes(b"x")
    assert len(read_shards(packed(shards)[0])) == 12


@pytest.mark.parametrize(
    "pattern", ["{}-000000.tar", "{}/000.tar", "deep/{}/000.tar", "dev/imagenet1k-{}-0000.tar", "cc3m-{}/0.tar"]
)
def test_one_split_of_shards_is_taken_and_several_are_asked_for(tmp_path, write_tar, picture, packed, pattern):
    for n, split in enumerate(("train", "val")):
        write_tar(tmp_path / "tt" / pattern.format(split), [("a b.png", picture(n)), ("c.png", picture(8 + n))])
    for source in (tmp_path / "tt", tmp_path / "tt" / pattern.format("*")):
        with pytest.raises(UserError, match=r"tt\S* holds the splits train, val; write --split with one of them"):
            packed(source)
    keys = set()
    for n, split in enumerate(("train", "val")):
        folder, _ = packed(tmp_path / "tt", name=split, options={"split": split})
        samples = read_shards(folder, split)
        assert {s["png"] for s in samples} == {picture(n), picture(8 + n)}
        keys.update(s["key"] for s in samples if s["key"] != "c")
    assert len(keys) == 2  # made of whole paths
    joined = "::".join(str(tmp_path / "tt" / pattern.format(split)) for split in ("train", "val"))
    assert len(read_shards(packed(joined, to="joined")[0])) == 4  # on purpose


def test_shards_of_which_one_is_called_like_a_split_are_packed_as_they_are(tmp_path, write_tar, picture, packed):
    for n, name in enumerate(("test", "dogs", "cats")):
        write_tar(tmp_path / "old" / f"{name}.tar", [(f"{n}.png", picture(n))])
    assert len(read_shards(packed(tmp_path / "old")[0])) == 3
    assert len(read_shards(packed(tmp_path / "old", to="one", options={"split": "test"})[0])) == 1


def test_shards_of_no_split_do_not_hide_those_of_two(tmp_path, write_tar, picture, packed):
    for n, name in enumerate(("train-0", "test-0", "unlabeled-0")):
        write_tar(tmp_path / "stl" / f"{name}.tar", [(f"{n}.png", picture(n))])
    with pytest.raises(UserError, match="stl holds the splits test, train; write --split with one of them"):
        packed(tmp_path / "stl")
    opened = open_source(str(tmp_path / "stl"), SourceOptions(split="train"))
    assert opened.names == ["train-0.tar/0"]
    assert "without 1 shard that tells no split, such as" in opened.notes[0]
    assert len(open_source(str(tmp_path / "stl"), SourceOptions(whole=True)).names) == 3


def test_shards_in_folders_beside_others_are_found(tmp_path, write_tar, picture):
    for n, name in enumerate(("a.tar", "more/b.tar")):
        write_tar(tmp_path / "mixed" / name, [(f"{n}.png", picture(n))])
    assert open_source(str(tmp_path / "mixed"), SourceOptions()).names == ["a.tar/0", "more/b.tar/1"]
    assert open_source(str(tmp_path / "mixed"), SourceOptions(whole=True)).names == ["a.tar/0"]
    write_tar(tmp_path / "elsewhere" / "c.tar", [("2.png", picture(2))])
    (tmp_path / "mixed" / "old.tar").mkdir()
    (tmp_path / "mixed" / "more" / ".hidden.tar").write_bytes(b"no tar")
    write_tar(tmp_path / "mixed" / ".new" / "d.tar", [("3.png", picture(3))])
    links = {
        "latest": ".",
        "again": "../mixed",
        "more/up": "../..",
        "current": "more",
        "x": "../elsewhere",
        "y": ".new",
    }
    for link, to in (links | {"z": "../elsewhere", "newest.tar": "a.tar", "../elsewhere/x": "../mixed"}).items():
        (tmp_path / "mixed" / link).symlink_to(to)
    names = open_source(str(tmp_path / "mixed"), SourceOptions()).names
    assert names == ["a.tar/0", "more/b.tar/1", "x/c.tar/2", "y/d.tar/3"]  # once each, whatever leads back
    (tmp_path / "mixed" / "more" / "d.tar").symlink_to("nowhere")
    with pytest.raises(UserError, match="/d.tar is a link to nothing; remove it"):
        open_source(str(tmp_path / "mixed"), SourceOptions())


def test_links_that_make_splits_of_shards_are_these_splits(tmp_path, write_tar, picture):
    for n in range(2):
        write_tar(tmp_path / "s" / "all" / f"{n}.tar", [(f"{n}.png", picture(n))])
    for n, split in enumerate(("train", "test")):
        (tmp_path / "s" / split).mkdir()
        (tmp_path / "s" / split / f"{n}.tar").symlink_to(f"../all/{n}.tar")
    with pytest.raises(UserError, match="holds the splits test, train; write --split"):
        open_source(str(tmp_path / "s"), SourceOptions())
    assert open_source(str(tmp_path / "s"), SourceOptions(split="test")).names == ["test/1.tar/1"]
    assert len(open_source(str(tmp_path / "s"), SourceOptions(split="all")).names) == 2
    for n, split in enumerate(("train", "test")):
        write_tar(tmp_path / "f" / f"part{n}" / "0.tar", [(f"{n}.png", picture(n))])
        (tmp_path / "f" / split).symlink_to(f"part{n}")
    assert open_source(str(tmp_path / "f"), SourceOptions(split="test")).names == ["test/0.tar/1"]


def test_a_folder_of_shards_may_have_any_name(tmp_path, write_tar, picture):
    write_tar(tmp_path / "v{1,2}[3]*" / "a.tar", [("0.png", picture(0))])
    assert open_source(str(tmp_path / "v{1,2}[3]*"), SourceOptions()).names == ["a.tar/0"]


@pytest.mark.parametrize("label, field", [("txt", "txt"), ("json:patient", "json")])
def test_texts_and_json_fields_become_classes(shards, packed, label, field):
    folder, summary = packed(shards, options={"label": (label,), "group": "patient"}, val_share=0.3)
    classes = (folder / "classes.txt").read_text().splitlines()
    groups = {}
    for split in ("train", "val"):
        for sample in read_shards(folder, split):
            if "json" in sample:
                patient = json.loads(sample["json"])["patient"]
                text = sample["txt"].decode().strip() if field == "txt" else patient
                assert classes[int(sample["cls"])] == text
                groups.setdefault(patient, set()).add(split)
    assert len(groups) == 4 and all(len(splits) == 1 for splits in groups.values())
    assert summary["unlabelled"] == 2
    other, _ = packed(shards, to="other", options={"label": (label,), "group": "json:patient"}, val_share=0.3)
    for split in ("train", "val"):
        assert [s["key"] for s in read_shards(other, split)] == [s["key"] for s in read_shards(folder, split)]
    with pytest.raises(UserError, match="has the field 'pateint' in a .json member"):
        packed(shards, to="third", options={"group": "pateint"})


def test_a_field_within_a_field_is_a_label(tmp_path, write_tar, picture, packed):
    said = [{"patient": {"sex": sex}} for sex in ("f", "m", "f")]
    members = [(f"{n}.png", picture(n, "PNG")) for n in range(3)]
    members += [(f"{n}.json", json.dumps(one).encode()) for n, one in enumerate(said)]
    write_tar(tmp_path / "old" / "0.tar", sorted(members))
    folder, _ = packed(tmp_path / "old" / "0.tar", options={"label": ("json:patient.sex",)})
    assert (folder / "classes.txt").read_text().splitlines() == ["f", "m"]


def test_the_image_is_taken_by_name(tmp_path, write_tar, picture, packed):
    names = ("left.png", "right.png", "png", "jpg")
    content = {name: picture(n, "JPEG" if name == "jpg" else "PNG") for n, name in enumerate(names)}
    write_tar(tmp_path / "old" / "0.tar", [(f"1.{name}", c) for name, c in content.items()])
    folder, _ = packed(tmp_path / "old" / "0.tar", options={"image": "right.png"})
    index = ShardIndex(str(folder / "train-000000.tar"))
    offset, size = index.images[0]
    assert (folder / "train-000000.tar").read_bytes()[offset : offset + size] == content["right.png"]
    (sample,) = read_shards(folder)
    assert set(content.values()) <= set(sample.values())


def test_the_embedded_shapes_are_recoded_and_split(tmp_path, packed):
    write_shards(tmp_path / "shapes", "train", 60, image_size=32)
    folder, summary = packed(tmp_path / "shapes" / "train-*.tar", short_side=16, val_share=0.25)
    assert {name: split["images"] for name, split in summary["splits"].items()} == {"train": 45, "val": 15}
    assert {Image.open(io.BytesIO(s["jpg"])).size for s in read_shards(folder, "val")} == {(16, 16)}
