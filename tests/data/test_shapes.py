"""The embedded data set: what a sample depends on, what is on disk, and what must not give the label away."""

import io
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from prelude.data import shapes
from prelude.data.errors import UserError
from prelude.data.shapes import CLASSES, MASKED, paint, paint_with_masks, write_shards


def test_a_sample_depends_on_its_index_alone():
    pictures, labels = paint("train", np.arange(30))
    for index in (0, 7, 29):
        alone, label = paint("train", np.array([index]))
        assert (alone[0] == pictures[index]).all() and label[0] == labels[index]
    turned, _ = paint("train", np.arange(30)[::-1])
    assert (turned[::-1] == pictures).all()


@pytest.mark.parametrize("other", [("test", 0), ("train", 1)])
def test_another_split_or_seed_shows_other_pictures(other):
    pictures, _ = paint("train", np.arange(20))
    others, _ = paint(other[0], np.arange(20), seed=other[1])
    assert all((a != b).mean() > 0.5 for a, b in zip(pictures, others, strict=True))


def test_no_two_pictures_are_alike():
    pictures, _ = paint("train", np.arange(400))
    assert len({picture.tobytes() for picture in pictures}) == 400


def test_ten_consecutive_samples_hold_each_class_once():
    _, labels = paint("test", np.arange(37, 47))
    assert sorted(labels) == list(range(len(CLASSES)))


def test_every_class_has_a_pattern_of_its_own():
    """The same draws under each label: a class whose pattern was another's would give the same picture."""
    draws = [shapes.Draws(0, 0, np.array([5])) for _ in CLASSES]
    axis = np.linspace(-0.5, 0.5, 32, dtype=np.float32)
    x, y = np.broadcast_arrays(axis[None, None, :], axis[None, :, None])
    cloths = [shapes._pattern(d, np.array([label]), x, y, 32)[0] for label, d in enumerate(draws)]
    for first in range(len(cloths)):
        assert cloths[first].min() == -1 and cloths[first].max() == 1
        for second in range(first):
            assert np.abs(cloths[first] - cloths[second]).mean() > 0.3


def test_colour_says_nothing_about_the_class():
    """Mean colours of the classes differ by no more than chance lets the means of 200 pictures differ."""
    pictures, labels = paint("train", np.arange(2000))
    means = pictures.reshape(2000, -1, 3).mean(1)  # (N, 3)
    of_class = np.stack([means[labels == label].mean(0) for label in range(len(CLASSES))])
    assert np.abs((of_class - means.mean(0)) / (means.std(0) / 200**0.5)).max() < 4


def test_the_picture_is_the_same_at_every_size():
    """Sizes share the draws, so that averaging a large picture gives the small one, edges aside."""
    large, _ = paint("train", np.arange(20), image_size=96)
    small, _ = paint("train", np.arange(20), image_size=32)
    averaged = large.reshape(20, 32, 3, 32, 3, 3).mean((2, 4))
    assert np.abs(averaged - small).mean() < 4


def test_masks_are_told_by_the_pictures():
    """Away from edges the ground is smooth, the cloth patterned, the bar of one colour, two strewn shapes of two."""
    pictures, labels, masks = paint_with_masks("train", np.arange(60), image_size=96)
    assert set(np.unique(masks)) == set(range(len(MASKED)))
    strewn, bar = MASKED.index("strewn"), MASKED.index("bar")
    for picture, label, mask in zip(pictures.astype(int), labels, masks, strict=True):
        assert set(np.unique(mask)) <= {0, label + 1, strewn, bar}
        near = np.lib.stride_tricks.sliding_window_view(np.pad(mask, 2, mode="edge"), (5, 5))
        inside = (near == mask[:, :, None, None]).all((2, 3))
        for number, most in ((bar, 1), (strewn, 2)):
            assert len(np.unique(picture[inside & (mask == number)], axis=0)) <= most
        steps = np.abs(np.diff(picture, axis=1)).max(-1)
        assert steps[(inside & (mask == 0))[:, 1:] & inside[:, :-1]].max(initial=0) <= 4
        assert np.ptp(picture[inside & (mask == label + 1)].mean(-1)) > 25


def test_a_mask_is_the_same_at_every_size():
    _, _, large = paint_with_masks("test", np.arange(20), image_size=160)
    _, _, small = paint_with_masks("test", np.arange(20), image_size=32)
    shares = np.stack([(large == number).reshape(20, 32, 5, 32, 5).mean((2, 4)) for number in range(len(MASKED))])
    clear = shares.max(0) > 0.6
    assert (shares.argmax(0) == small)[clear].mean() > 0.999 and clear.mean() > 0.95


def test_shards_hold_what_was_painted(tmp_path):
    shards = write_shards(tmp_path, "train", 25, samples_per_shard=10)
    assert [shard.name for shard in shards] == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    pictures, labels, masks = paint_with_masks("train", np.arange(25))
    samples = list(webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == [f"train-{index:06d}" for index in range(25)]
    for sample, picture, label, mask in zip(samples, pictures, labels, masks, strict=True):
        assert int(sample["cls"]) == label
        assert (np.asarray(Image.open(io.BytesIO(sample["png"]))) == mask).all()
        decoded = np.asarray(Image.open(io.BytesIO(sample["jpg"])), dtype=float)
        assert np.abs(decoded - picture).mean() < 6  # what JPEG costs


def test_shards_carry_no_trace_of_the_time_or_the_writer(tmp_path):
    first = write_shards(tmp_path / "a", "test", 12)
    second = write_shards(tmp_path / "b", "test", 12)
    assert [shard.read_bytes() for shard in first] == [shard.read_bytes() for shard in second]
    with tarfile.open(first[0]) as tar:
        assert {member.mtime for member in tar} == {0}


def test_what_is_there_is_left_alone(tmp_path):
    shards = write_shards(tmp_path, "train", 20, samples_per_shard=10)
    before = [shard.stat().st_mtime_ns for shard in shards]
    assert write_shards(tmp_path, "train", 20, samples_per_shard=10) == shards
    assert [shard.stat().st_mtime_ns for shard in shards] == before


def test_a_damaged_or_missing_shard_is_written_again(tmp_path):
    shards = write_shards(tmp_path, "train", 20, samples_per_shard=10)
    whole = [shard.read_bytes() for shard in shards]
    shards[0].write_bytes(whole[0][:1000])
    shards[1].unlink()
    write_shards(tmp_path, "train", 20, samples_per_shard=10)
    assert [shard.read_bytes() for shard in shards] == whole


def test_shards_of_somebody_else_are_left_alone(tmp_path):
    for name, record in (("train-000000.tar", None), ("train-000007.tar", "[]")):
        mine = tmp_path / name[6:12] / name
        mine.parent.mkdir()
        mine.write_bytes(b"photos of a year")
        if record:
            (mine.parent / "train.json").write_text(record)
        with pytest.raises(UserError, match="is there already and is no made-up data; write another folder"):
            write_shards(mine.parent, "train", 20)
        assert mine.read_bytes() == b"photos of a year" and len(list(mine.parent.glob("*.tar"))) == 1
    notes = tmp_path / "coco" / "train.json"
    notes.parent.mkdir()
    for content in ('{"images": [], "version": 1}', "not json"):
        notes.write_text(content)
        with pytest.raises(UserError, match="train.json is there already and is no made-up data"):
            write_shards(notes.parent, "train", 20)
        assert notes.read_text() == content


def test_a_place_that_takes_no_shards_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be written .*; make room there, or write another folder"):
        write_shards(tmp_path / "file", "train", 20)


def test_what_was_interrupted_is_made_to_its_end(tmp_path, monkeypatch):
    whole, written = shapes.keep, []

    def dies(path, content):
        if path.name == "train-000001.tar" and not written:
            written.append(path)
            raise KeyboardInterrupt
        whole(path, content)

    monkeypatch.setattr(shapes, "keep", dies)
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, "train", 30, samples_per_shard=10)
    assert len(write_shards(tmp_path, "train", 30, samples_per_shard=10)) == 3


def test_another_data_set_replaces_the_split_and_leaves_the_other_split(tmp_path):
    write_shards(tmp_path, "train", 30, samples_per_shard=10)
    (kept,) = write_shards(tmp_path, "test", 10)
    content = kept.read_bytes()
    shards = write_shards(tmp_path, "train", 20, seed=1, samples_per_shard=10)
    assert sorted(tmp_path.glob("train-*.tar")) == shards and len(shards) == 2
    assert kept.read_bytes() == content
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"split": "val"}, "train, test"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"image_size": 8}, "image_size=8"),
        ({"seed": -1}, "seed=-1"),
        ({"samples_per_shard": 0}, "samples_per_shard=0"),
    ],
)
def test_what_cannot_be_painted_is_refused(tmp_path, wrong, told):
    with pytest.raises(UserError, match=told):
        write_shards(**{"folder": tmp_path / "new", "split": "train", "num_samples": 10, **wrong})
    assert not (tmp_path / "new").exists()
