"""Folders of images, packed and read in place."""

import errno
import hashlib
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
from packed_shards import image_of, left_out, read_shards

from prelude.data.batch import View, ViewPlan
from prelude.data.class_names import label_reader
from prelude.data.errors import UserError
from prelude.data.loader import Loader, one_pass
from prelude.data.open_files import OpenFiles
from prelude.data.packing.folder import FolderSource
from prelude.data.packing.open import open_source
from prelude.data.packing.source import SourceOptions
from prelude.data.packing.splits import split_in
from prelude.data.shards import ShardIndex, expand_shards

PLAN = ViewPlan((View((8, 8)),))
ODD_NAMES = [
    "cat/1.png", "dog/1.png", "cat/a b.png", "cat/x.1.png", "cat/x.2.png", "dog/ÜNÏ çode.PNG", "dog/日本.png",
    "dog/{0..3}.png", "cat/50% #1?.png", "cat/" + "n" * 200 + ".png", "dog/-.png", "cat/line\nbreak.png",
    "cat/b\udcff.png",
]  # fmt: skip


@pytest.fixture
def photos(write_files, picture):
    return write_files("photos", {name: picture(number) for number, name in enumerate(ODD_NAMES)})


def test_every_image_is_packed_with_its_bytes_its_class_and_a_plain_key(photos, packed):
    folder, summary = packed(photos, per_shard=5)
    samples = read_shards(folder)
    assert {s["source"]: s["png"] for s in samples} == {name: (photos / name).read_bytes() for name in ODD_NAMES}
    classes = (folder / "classes.txt").read_text().splitlines()
    assert classes == ["cat", "dog"]
    assert all(classes[int(s["cls"])] == s["source"].partition("/")[0] for s in samples)
    keys = [s["key"] for s in samples]
    assert len(set(keys)) == len(keys) and all(key.isascii() and "." not in key and len(key) < 64 for key in keys)
    assert summary["splits"]["train"]["images"] == len(ODD_NAMES) and not summary["lost"]
    assert [s["source"] for s in samples] != sorted(ODD_NAMES)
    sizes = [len([s for s in samples if s["shard"] == f"train-{n:06d}.tar"]) for n in range(3)]
    assert max(sizes) - min(sizes) <= 1


def test_keys_do_not_change_with_the_seed_or_with_what_lies_beside(photos, packed, picture):
    before = {s["source"]: s["key"] for s in read_shards(packed(photos, to="one")[0])}
    (photos / "cat" / "0.png").write_bytes(picture(99))
    after = {s["source"]: s["key"] for s in read_shards(packed(photos, to="two", seed=7)[0])}
    assert before.items() < after.items()


def test_what_is_not_packed_is_told_by_name(photos, packed, write_files, picture):
    write_files("photos", {
        "cat/.DS_Store": b"x", "cat/._1.png": b"x", "cat/notes.txt": b"x", "cat/none.jpg": b"",
        "cat/bad.jpg": b"\xff\xd8\xff", "cat/cut.png": picture(1)[:200], "dog/Thumbs.db": b"x",
        "__MACOSX/1.png": b"x", "dog/raw.heic": b"x",
    })  # fmt: skip
    os.symlink("nowhere.jpg", photos / "dog" / "broken.jpg")
    os.symlink("..", photos / "dog" / "loop")
    os.mkfifo(photos / "dog" / "pipe.jpg")
    os.symlink("1.png", photos / "dog" / "link.png")
    folder, summary = packed(photos)
    found = left_out(folder)
    lost = {name for name, (_, is_lost) in found.items() if is_lost}
    assert lost == {"cat/none.jpg", "cat/bad.jpg", "cat/cut.png", "dog/broken.jpg", "dog/pipe.jpg"}
    rest = {"cat/.DS_Store", "cat/._1.png", "cat/notes.txt", "dog/Thumbs.db", "__MACOSX", "dog/raw.heic", "dog/loop"}
    assert found.keys() - lost == rest
    assert found["cat/none.jpg"] == ("empty image", True)
    assert sum(summary["lost"].values()) == 5
    packed_names = {s["source"] for s in read_shards(folder)}
    assert packed_names == {*ODD_NAMES, "dog/link.png"}
    listed = {os.path.relpath(os.path.join(d, f), photos) for d, _, files in os.walk(photos) for f in files}
    assert listed <= packed_names | found.keys() | {"__MACOSX/1.png"}  # nothing is lost silently


class _Listing:
    def __init__(self, entries):
        self.entries = iter(entries)

    def __iter__(self):
        return self.entries

    def __next__(self):
        return next(self.entries)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("asked", ["listing", "status"])
def test_a_folder_on_a_disk_that_fails_is_not_packed_in_part(photos, packed, monkeypatch, asked):
    def fail(path):
        raise OSError(errno.EIO, "Input/output error", path)

    class Entry:
        def __init__(self, entry):
            self.entry = entry

        def __getattr__(self, name):
            return getattr(self.entry, name)

        def stat(self, **how):
            return fail(self.path) if asked == "status" and self.name == "dog" else self.entry.stat(**how)

    def scandir(path, real=os.scandir):
        return fail(path) if asked == "listing" and str(path).endswith("dog") else _Listing(map(Entry, real(path)))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"dog cannot be read \(Input/output error\)"):
        packed(photos)


@pytest.mark.parametrize("label, classes", [(["top"], ["x", "y"]), (["parent"], ["a", "b", "c"]), (["none"], None)])
def test_deeper_folders_are_classes_by_the_rule_that_is_asked_for(write_files, picture, packed, label, classes):
    names = ["x/a/1.png", "x/b/1.png", "y/a/1.png", "y/c/1.png"]
    source = write_files("deep", {name: picture(n) for n, name in enumerate(names)})
    folder, _ = packed(source, options={"label": tuple(label)})
    if classes is None:
        assert not (folder / "classes.txt").exists() and all("cls" not in s for s in read_shards(folder))
        return
    assert (folder / "classes.txt").read_text().splitlines() == classes
    part = {"top": 0, "parent": 1}[label[0]]
    assert all(classes[int(s["cls"])] == s["source"].split("/")[part] for s in read_shards(folder))


def test_what_is_not_clear_is_asked(write_files, picture, packed):
    deep = write_files("deep", {"x/a/1.png": picture(1), "y/2.png": picture(2)})
    with pytest.raises(UserError, match="--label parent .*--label top .*--label none"):
        packed(deep)
    assert not (deep.parent / "shards").exists()
    beside = write_files("beside", {"x/1.png": picture(1), "2.png": picture(2)})
    with pytest.raises(UserError, match="'2.png'"):
        packed(beside)


def test_train_and_val_from_two_folders_number_classes_alike(write_files, picture, packed):
    train = write_files("t", {f"{c}/1.png": picture(n) for n, c in enumerate("abc")})
    val = write_files("v", {"c/1.png": picture(9)})
    packed(train)
    folder, _ = packed(val, name="val")
    assert [s["cls"] for s in read_shards(folder, "val")] == [b"2"]
    stranger = write_files("s", {"d/1.png": picture(9)})
    with pytest.raises(UserError, match="the class 'd'"):
        packed(stranger, name="test")


def test_given_classes_that_number_others_than_the_folder_has_are_refused(write_files, picture, packed, tmp_path):
    folder, _ = packed(write_files("t", {f"{c}/1.png": picture(n) for n, c in enumerate("ab")}))
    more = write_files("v", {f"{c}/1.png": picture(n) for n, c in enumerate("abc")})
    with pytest.raises(UserError, match="numbers the classes otherwise than .*classes.txt"):
        packed(more, name="val", options={"classes": ("b", "a", "c")})
    assert not list(folder.glob("val-*.tar"))
    packed(more, name="val", options={"classes": ("a", "b", "c")})
    assert {s["cls"] for s in read_shards(folder, "val")} == {b"0", b"1", b"2"}
    assert (folder / "classes.txt").read_text().split() == ["a", "b", "c"]


@pytest.mark.parametrize("pattern", ["{split}/{name}/1.png", "{name}/{split}2017/1.png", "{name}/{split}_1.png"])
def test_one_split_of_images_is_taken_and_several_are_asked_for(write_files, picture, packed, pattern):
    splits, classes = ("train", "test"), ("a", "b")
    names = [pattern.format(split=split, name=name) for split in splits for name in classes]
    source = write_files("tiny", {name: picture(n) for n, name in enumerate(names)} | {f"{names[0]}.jpg": b""})
    for label in ((), ("parent",), ("top",), ("none",)):
        with pytest.raises(UserError, match="tiny holds the splits test, train; write --split with one of them"):
            packed(source, options={"label": label})
    for split in splits:
        folder, summary = packed(source, name=split, options={"split": split})
        found = {s["source"]: (folder / "classes.txt").read_text().split()[int(s["cls"])]
                 for s in read_shards(folder, split)}  # fmt: skip
        assert found == {pattern.format(split=split, name=name): name for name in classes}
        assert sum(summary["lost"].values()) == (split == "train")
    with pytest.raises(UserError, match="holds the splits test, train; write"):
        packed(source, to="no", options={"split": "val"})


def test_classes_may_be_called_like_splits(write_files, picture, packed):
    source = write_files("tests", {f"{c}/{c}_{n}.png": picture(n) for n, c in enumerate(("test", "val", "cat"))})
    folder, _ = packed(source)
    assert (folder / "classes.txt").read_text().split() == ["cat", "test", "val"]
    one = write_files("one", {"train/a/1.png": picture(1), "train/b/1.png": picture(2)})
    folder, _ = packed(one, to="of one", options={"split": "train"})  # one split is all that there is
    assert (folder / "classes.txt").read_text().split() == ["a", "b"]
    with pytest.raises(UserError, match="--split test has no effect on .*/a, which names no split; .*--name test"):
        packed(one / "train" / "a", options={"split": "test"})


@pytest.mark.parametrize("names", [("train", "test tube", "cat"), ("Train ride", "Dev meetup", "Rome")])
def test_folders_that_only_begin_like_splits_are_no_splits(write_files, picture, packed, names):
    source = write_files("albums", {f"{name}/{n}.png": picture(n) for n, name in enumerate(names)})
    folder, _ = packed(source)
    assert (folder / "classes.txt").read_text().splitlines() == sorted(names)


@pytest.mark.parametrize(
    "pattern, folders, asked, taken",
    [
        ("train_data/{}/1.png", ("train", "test", "unlabeled"), "train", [0]),
        ("train/x/{}/1.png", ("train2017", "test2017", "unlabeled2017"), "train", [0]),
        ("{}/1.png", ("training/a", "validation/a", "training/train_interior"), "training", [0, 2]),
        ("train/{}/1.png", ("a", "train_interior"), "train", [0, 1]),  # where all tell it, before where one does
    ],
)
def test_the_folders_that_make_several_splits_decide_which_is_which(
    write_files, picture, pattern, folders, asked, taken
):
    names = [pattern.format(name) for name in folders]
    source = write_files("one", {name: picture(n) for n, name in enumerate(names)})
    if len(taken) < len(names):
        with pytest.raises(UserError, match="holds the splits .*, .*; write --split"):
            open_source(str(source), SourceOptions())
    opened = open_source(str(source), SourceOptions(split=asked, label=("none",)))
    assert sorted(opened.names) == sorted(names[n] for n in taken)


@pytest.mark.parametrize(
    "train, test, beside",
    [
        ("train", "test", ("unlabeled/a/1.png",)), ("train", "test", ("sample.png",)), ("Training", "Testing", ()),
        ("Training", "Test", ()), ("deep/train", "deep/val", ("deep/sample.png", "other/a/b/1.png")),
        ("train_images", "test_images", ("sample/1.png",)), ("training set", "test", ("misc/1.png",)),
    ],
)  # fmt: skip
def test_what_lies_beside_train_and_test_makes_them_no_one_split(write_files, picture, packed, train, test, beside):
    names = [*(f"{split}/{name}/1.png" for split in (train, test) for name in "ab"), *beside]
    source = write_files("tiny", {name: picture(n) for n, name in enumerate(names)})
    for label in ((), ("parent",), ("none",)):
        with pytest.raises(UserError, match="tiny holds the splits .*, .*; write --split with one of them"):
            packed(source, options={"label": label})
    split = split_in(train.rpartition("/")[2])
    opened = open_source(str(source), SourceOptions(split=split, label=("parent",)))
    assert opened.names == names[:2] and opened.labels.classes == ("a", "b")
    told = f"without {len(beside)} image{'s' * (len(beside) > 1)} that tell"
    assert any(note.startswith(told) for note in opened.notes) == bool(beside)


def test_what_is_noted_as_the_split_is_what_was_asked_for(write_files, picture, packed):
    source = write_files("tiny", {f"{split}/{n}.png": picture(n) for n, split in enumerate(("train", "train", "test"))})
    for name, settings in (("train", {"options": {"split": "train"}, "val_share": 0.5}), ("all", {})):
        folder, _ = packed(source if settings else source / "test", name=name, **settings)
        record = json.loads((folder / f"{name}.pack.json").read_text())
        assert record["split"] == settings.get("options", {}).get("split", "")
        packed(source if settings else source / "test", name=name, **settings)


def test_a_packing_of_several_splits_that_was_begun_before_goes_on(write_files, picture, packed, tmp_path):
    source = write_files("tiny", {f"{split}/1.png": picture(n) for n, split in enumerate(("train", "test"))})
    write_files("shards", {"train.pack.json": b"{}"})
    with pytest.raises(UserError, match="of another packing .*another source"):  # and no word of splits
        packed(source)
    wanted = {
        "version": 1, "images": 2, "source": FolderSource(str(source), SourceOptions(whole=True)).stamp(),
        "order": hashlib.blake2b(np.random.default_rng(0).permutation(2).astype("<i8").tobytes(), digest_size=16)
        .hexdigest(), "per-shard": 1000, "seed": 0, "val-share": 0.0,
    }  # fmt: skip
    record = {"source": str(source), "packing": wanted}
    for noted in ({}, {"split": "train"}):  # the start of the shards' names, which was noted in the split's place
        (tmp_path / "shards" / "train-000000.tar").unlink(missing_ok=True)
        (tmp_path / "shards" / "train.pack.json").write_text(json.dumps(record | noted))
        packed(source)
        folder, summary = packed(source)
        assert summary["splits"]["train"]["images"] == 2 and summary["classes"] == 2


# ---- in place


def content_of(index: ShardIndex) -> set:
    """(image, label) of every sample, read as training reads them."""
    files = OpenFiles(index.paths)
    shards = [index.paths.index(index.shard_of(n)) for n in range(index.num_samples)]
    rows = zip(shards, index.images[:].tolist(), index.labels[:].tolist(), strict=True)
    return {(files.read(s, *image), files.read(s, *label)) for s, image, label in rows}


def test_a_folder_read_in_place_has_the_samples_of_its_shards(photos, packed):
    folder, _ = packed(photos, per_shard=4)
    in_place, in_shards = ShardIndex(str(photos), "cls"), ShardIndex(str(folder / "train-*.tar"), "cls")
    assert in_place.num_samples == in_shards.num_samples == len(ODD_NAMES)
    names = (folder / "classes.txt").read_text().splitlines()
    numbered = {(image, b"%d" % names.index(label.decode())) for image, label in content_of(in_place)}
    assert numbered == content_of(in_shards)
    assert len(content_of(in_place)) == len(ODD_NAMES)
    assert {in_place.key(n) for n in range(in_place.num_samples)} == set(ODD_NAMES)


def test_labels_beside_images_may_have_any_case(write_files, picture):
    names = {"1.jpg": "1.TXT", "2.JPG": "2.txt", "3.jpg": "3.Txt"}
    files = {image: picture(n, "JPEG") for n, image in enumerate(names)}
    source = write_files("beside", files | {label: label.encode() for label in names.values()} | {"2.TXT": b"not it"})
    index = ShardIndex(str(source), "txt")
    assert content_of(index) == {(files[image], label.encode()) for image, label in names.items()}


@pytest.mark.parametrize(
    "numbers",
    [
        {"dog": 1, "cat": 0}, {"-1": 0, "cat": 1, "dog": 2}, {"cat ": 0, "dog": 1},
        {str(n): n for n in range(10)}, {str(n): n for n in range(11)},
        {"1": 1, "2": 2, "3": 3}, {f"{n:02}": n for n in range(12)}, {"1.0": 0, "2.0": 1},
    ],
    ids=["names", "a negative number among names", "a space", "0 to 9", "0 to 10", "1 to 3", "00 to 11", "versions"],
)  # fmt: skip
def test_a_folder_in_place_and_its_shards_number_classes_alike(write_files, picture, packed, numbers):
    images = {folder: picture(n) for n, folder in enumerate(numbers)}
    source = write_files("numbered", {f"{folder}/1.png": image for folder, image in images.items()})
    shards, _ = packed(source)
    for index in (ShardIndex(str(source), "cls"), ShardIndex(str(shards / "train-*.tar"), "cls")):
        reader = label_reader(index, "cls")
        found = {image: int(reader(label)) for image, label in content_of(index)}
        assert found == {images[folder]: number for folder, number in numbers.items()}


def test_a_packing_into_a_folder_with_numbers_of_names_keeps_to_them(write_files, picture, packed):
    """Earlier versions listed folders 0 to 10 as names, in the order of text."""
    names = sorted(str(n) for n in range(11))
    write_files("shards", {"classes.txt": "".join(f"{name}\n" for name in names).encode()})
    folder, _ = packed(write_files("numbered", {f"{n}/1.png": picture(n) for n in range(11)}), name="val")
    found = {s["source"].partition("/")[0]: int(s["cls"]) for s in read_shards(folder, "val")}
    assert found == {name: number for number, name in enumerate(names)}
    assert (folder / "classes.txt").read_text().splitlines() == names


def test_a_folder_in_place_trains_in_workers_and_resumes_exactly(photos):
    make = lambda workers: Loader(  # noqa: E731
        ShardIndex(str(photos)), PLAN, seed=3, micro_batch=4, num_workers=workers, label="cls"
    )
    one, two = make(0), make(2)
    batches = [next(one) for _ in range(8)]
    state = None
    for number, batch in enumerate(batches):
        other = next(two)
        assert batch.sample_ids.tolist() == other.sample_ids.tolist()
        assert batch.views[0].equal(other.views[0]) and batch.labels.equal(other.labels)
        if number == 3:
            state = two.state_dict()
    two.close()
    resumed = make(0)
    resumed.load_state_dict(state)
    assert next(resumed).sample_ids.tolist() == batches[4].sample_ids.tolist()
    first_epoch = sorted(sum((b.sample_ids.tolist() for b in batches), [])[: len(ODD_NAMES)])
    assert first_epoch == list(range(len(ODD_NAMES)))


def test_a_file_that_changes_after_it_was_listed_is_a_bad_sample_and_moves_no_other(photos, picture):
    index = ShardIndex(str(photos))
    (photos / "cat" / "1.png").write_bytes(picture(0) + b"more")
    (photos / "dog" / "1.png").unlink()
    (photos / "aaa.png").write_bytes(picture(50))
    loaded = one_pass(pickle.loads(pickle.dumps(index)), PLAN, batch_size=4)
    ids = [n for batch in loaded for n in batch.sample_ids.tolist()]
    bad = {n for n in range(index.num_samples) if index.key(n) in ("cat/1.png", "dog/1.png")}
    assert ids == [n for n in range(len(ODD_NAMES)) if n not in bad] and loaded.bad.num_bad == 2


def test_a_folders_fingerprint_changes_with_its_names_and_not_with_its_place(photos, tmp_path):
    before = ShardIndex(str(photos)).fingerprint
    (tmp_path / "elsewhere").mkdir()
    moved = photos.rename(tmp_path / "elsewhere" / "photos")
    assert ShardIndex(str(moved)).fingerprint == before
    (moved / "cat" / "1.png").rename(moved / "cat" / "0.png")
    assert ShardIndex(str(moved)).fingerprint != before


def test_folders_that_cannot_be_read_in_place_name_the_command(tmp_path, write_files, picture, photos):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"prelude shards pack {tmp_path}/empty --to DIR"):
        expand_shards(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="no .json file beside an image; .*7.json for 7.jpg"):
        ShardIndex(str(photos), "json")
    with pytest.raises(UserError, match=r"--label parent"):
        ShardIndex(str(write_files("deep", {"a/b/1.png": picture(1), "c/2.png": picture(2)})), "cls")


def test_a_shard_of_which_nothing_is_left_is_empty_and_in_nobodys_way(write_files, picture, packed):
    source = write_files("few", {"a/1.png": picture(1), "a/2.png": b"garbage", "a/3.png": picture(3)})
    folder, _ = packed(source, per_shard=1)
    index = ShardIndex(str(folder / "train-*.tar"))
    assert sorted(index.counts.tolist()) == [0, 1, 1] and not index.num_problems
    loader = Loader(index, PLAN, seed=0, micro_batch=2)
    assert all(sorted(next(loader).sample_ids.tolist()) == [0, 1] for _ in range(3))


def test_class_names_that_no_text_file_can_hold_are_refused(write_files, picture, packed):
    for number, name in enumerate(("a\nb", "x\udcff")):
        with pytest.raises(UserError, match="cannot be a line of classes.txt"):
            packed(write_files(f"odd{number}", {f"{name}/1.png": picture(1), "plain/1.png": picture(2)}))


def test_nothing_but_names_and_sizes_is_in_the_headers(photos, packed):
    folder, _ = packed(photos)
    with tarfile.open(folder / "train-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}
        assert {m.name.partition(".")[2] for m in tar} == {"png", "cls"}
    record = json.loads((folder / "train.pack.json").read_text())
    assert record["summary"]["splits"]["train"]["images"] == len(ODD_NAMES)
    assert all(image_of(s) for s in read_shards(folder))
