"""Masks as they lie in shards, and the door."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from prelude.data.batch import View
from prelude.data.errors import UserError
from prelude.data.shapes import MASKED, paint_with_masks, write_shards
from prelude.data.shards import ShardIndex
from prelude.evaluators.dense.judging import DenseJudging
from prelude.evaluators.dense.masks import every_sample, mask_labels, masks_of
from prelude.evaluators.labelled import Labelled
from prelude.launch import prelude
from prelude.launch.exit_codes import door

VIEW = View((16, 16), crop="center", flip=0.0)


@pytest.fixture
def numbers():
    return np.random.default_rng(0).integers(0, 5, (16, 16), dtype=np.uint8)


def test_numbers_are_read_from_grey_palettes_and_deep_masks_alike(masked_shard, png, numbers):
    palette = Image.fromarray(numbers, "P")
    palette.putpalette([value for i in range(5) for value in (40 * i, 255 - 40 * i, 7)])
    masks = [png(numbers), png(palette), png(numbers.astype(np.uint16)), None, b"no image", png(numbers > 2)]
    index = ShardIndex(masked_shard("a", masks), "png")
    assert mask_labels(index).known.tolist() == [True, True, True, False, True, True]
    found, unreadable, _ = masks_of(index, torch.tensor([0, 1, 2, 4, 5]), VIEW)
    assert unreadable == 1 and (found[3] == 255).all()
    assert all((found[i].numpy() == numbers).all() for i in range(3))
    assert (found[4].numpy() == (numbers > 2)).all()
    without, *_ = masks_of(index, torch.tensor([0]), VIEW, ignored=(0, 3))
    assert (without[0].numpy() == np.where(np.isin(numbers, (0, 3)), 255, numbers)).all()


def test_a_mask_is_cut_and_resized_as_the_view_is(masked_shard, png):
    wide = np.zeros((16, 40), np.uint8)
    wide[:, 12:20], wide[:, 20:28], wide[:4, 12:28] = 1, 2, 3  # the centre square
    index = ShardIndex(masked_shard("a", [png(wide)], size=(16, 40)), "png")
    (mask,), *_ = masks_of(index, torch.tensor([0]), View((8, 8), crop="center", flip=0.0))
    expected = np.full((8, 8), 1)
    expected[:, 4:], expected[:2] = 2, 3
    assert (mask.numpy() == expected).all()


def test_a_defect_between_the_pixels_of_a_view_is_not_lost(masked_shard, png):
    """64 pixels a side, seen at 8: the nearest pixels are those at 4, 12, 20, ..."""
    small, large, good = np.zeros((3, 64, 64), np.uint8)
    small[17:19, 50:52], large[8:24, 8:24], large[1, 1] = 1, 1, 1
    index = ShardIndex(masked_shard("a", list(map(png, (small, large, good))), size=(64, 64)), "png")
    found, _, unseen = masks_of(index, torch.arange(3), View((8, 8), crop="center", flip=0.0), of_defects=True)
    expected = [{(2, 6)}, {(1, 1), (1, 2), (2, 1), (2, 2)}, set()]
    assert [set(map(tuple, mask.nonzero().tolist())) for mask in found] == expected and unseen == 0


def test_an_image_with_defects_outside_of_the_view_only_is_neither_good_nor_defective(masked_shard, png, tmp_path):
    outside, both, good = np.zeros((3, 64, 128), np.uint8)
    outside[3, 3], both[3, 3], both[20, 70] = 1, 1, 1
    shard = masked_shard("a", list(map(png, (outside, both, good))), size=(64, 128))
    index = ShardIndex(shard, "png")
    view = View((8, 8), crop="center", flip=0.0)
    found, unreadable, unseen = masks_of(index, torch.arange(3), view, of_defects=True)
    assert (unreadable, unseen) == (0, 1) and (found[0] == 255).all()
    assert found[1].nonzero().tolist() == [[2, 4]] and not found[2].any()
    told: list[str] = []
    judging = DenseJudging([], Labelled(shard, shard, "png"), bank=tmp_path / "bank", of_defects=True, say=told.append)
    judging.features("pixels:8", ["pixels:8"], judging.opened("pixels:8", ["pixels:8"], 0))
    assert [text.startswith("1 image of ") and "outside of the centre square" in text for text in told] == [True, True]


def test_masks_of_shapes_come_back_as_they_were_painted(tmp_path):
    write_shards(tmp_path, "train", 25, samples_per_shard=10)
    index = ShardIndex(f"{tmp_path}/train-*.tar", "png")
    found, *_ = masks_of(index, torch.arange(25), View((32, 32), crop="center", flip=0.0))
    assert (found.numpy() == paint_with_masks("train", np.arange(25))[2]).all() and found.max() < len(MASKED)


def test_what_is_no_mask_is_refused(masked_shard, png, numbers):
    for name, mask, told in (
        ("colours", np.zeros((16, 16, 3), np.uint8), "3 channels"),
        ("large", numbers.astype(np.uint16) + 300, "holds class 30"),
        ("size", numbers[:8], "8x16 pixels, and its image 16x16"),
    ):
        index = ShardIndex(masked_shard(name, [png(mask)] * 3), "png")
        with pytest.raises(UserError, match=told):
            masks_of(index, torch.arange(3), VIEW)
    index = ShardIndex(masked_shard("itself", [png(numbers)]), "jpg")
    for labels_of in (mask_labels, every_sample):
        with pytest.raises(UserError, match="the images themselves; write --label .* mask.jpg"):
            labels_of(index)
    with pytest.raises(UserError, match="has a .mask.png member"):
        mask_labels(ShardIndex(masked_shard("none", [png(numbers)]), "mask.png"))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_shards(folder, "train", 24, image_size=16)
    write_shards(folder, "test", 12, image_size=16)
    return ["--train", f"{folder}/train-*.tar", "--test", f"{folder}/test-*.tar", "--num-workers", "0"]


def test_the_door(shapes, tmp_path, capsys):
    vit, convnet = "random:timm:test_vit.r160_in1k", "random:timm:test_resnet.r160_in1k"
    argv = [*shapes, "--out", str(tmp_path), "--ignore", "11", "12"]
    assert prelude.main(["segment", vit, "pixels:16", *argv]) == 0
    assert "mIoU %" in capsys.readouterr().out
    assert prelude.main(["segment", convnet, *argv, "--heads", "knn", "--k", "5"]) == 0
    found = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert sorted((one["evaluator"], one["chosen"]["features"]) for one in found) == [
        ("segment_knn", "map"), ("segment_knn", "patches8x8"), ("segment_knn", "tokens"),
        ("segment_linear", "patches8x8"), ("segment_linear", "tokens"),
    ]  # fmt: skip
    one = found[0]
    assert one["features"]["view"]["crop_share"] == 1 and one["data"]["label"] == "png"
    assert set(one["numbers"]) == {"miou", "pixel_accuracy"} and len(one["numbers"]["miou"]["interval"]) == 2
    (by_class,) = (kind["by_class"] for kind in one["details"]["by_features"].values())
    assert not {"11", "12", "255"} & set(by_class)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["--label", "cls"], "is an image"),
        (["--label", "mask.png"], "has a .mask.png member"),
        (["--features", "cls"], "says nothing of places"),
        (["--ignore", *map(str, range(1, 13))], "hold class 0 only"),
        (["--test", "nowhere.tar"], "nowhere.tar"),
    ],
)
def test_mistakes_are_told_in_a_sentence(changes, told, shapes, tmp_path, capsys):
    sources = ["random:timm:test_vit.r160_in1k"] if "--features" in changes else ["pixels:8"]
    argv = [*shapes[:2], *shapes[4:], *([] if "--test" in changes else shapes[2:4]), "--out", str(tmp_path), *changes]
    assert door(lambda: prelude.main(["segment", *sources, *argv])) == 2
    *_, error = capsys.readouterr().err.strip().splitlines()
    assert told in error and error.startswith("error: ")
