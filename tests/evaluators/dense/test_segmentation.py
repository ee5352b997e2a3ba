"""Segmentation of frozen features against scikit-learn and loops."""

import dataclasses
import io
import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, jaccard_score
from webdataset import TarWriter

from prelude.data.errors import UserError
from prelude.data.shapes import write_shards
from prelude.evaluators.dense import places as module
from prelude.evaluators.dense import segmentation
from prelude.evaluators.dense.drawing import GAP, TILE, class_colours
from prelude.evaluators.dense.masks import IGNORED
from prelude.evaluators.dense.overlap import Overlap
from prelude.evaluators.dense.places import predicted, shares
from prelude.evaluators.dense.segmentation import Classes, segment_knn, segment_linear
from prelude.evaluators.dense.share_loss import ShareLoss
from prelude.evaluators.frozen.convex import Space
from prelude.evaluators.judging import judge_all
from prelude.evaluators.labelled import Labelled
from prelude.launch import prelude
from prelude.launch.exit_codes import door
from prelude.launch.segment_maps import SegmentJudging


def shares_by_hand(masks, grid, num_classes):
    number, height, width = masks.shape
    found = np.zeros((number, *grid, num_classes))
    total = np.zeros(grid)
    for y in range(height):
        for x in range(width):
            row, column = int((y + 0.5) / height * grid[0]), int((x + 0.5) / width * grid[1])
            total[row, column] += 1
            for i in range(number):
                if masks[i, y, x] != 255:
                    found[i, row, column, int(masks[i, y, x])] += 1
    return (found / total[:, :, None]).reshape(-1, num_classes)


def test_shares_are_those_of_a_loop(monkeypatch):
    monkeypatch.setattr(module, "ELEMENTS", 2 * 10 * 13 * 8)  # several chunks
    masks = torch.randint(4, (5, 10, 13), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    masks[0, 3:7, 2:9], masks[4] = 255, 255
    assert np.allclose(shares(masks, (3, 4), 4).numpy(), shares_by_hand(masks.numpy(), (3, 4), 4))


def test_overlap_is_that_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    true = torch.randint(4, (6, 5, 7), generator=generator).to(torch.uint8)
    found = torch.where(torch.rand(6, 5, 7, generator=generator) < 0.6, true, torch.randint(5, (6, 5, 7)))
    true[2, :2] = 255
    counted = (true != 255).numpy()
    y, guess = true.numpy()[counted], found.numpy()[counted]
    overlap = Overlap.joined([Overlap.of(found[:4], true[:4], 5), Overlap.of(found[4:], true[4:], 5)])
    expected = jaccard_score(y, guess, average=None, labels=[0, 1, 2, 3])
    numbers = overlap.numbers(seed=0)
    assert overlap.iou()[0, :4].numpy() == pytest.approx(expected) and overlap.iou()[0, 4].isnan()  # true nowhere
    assert numbers["miou"].value == pytest.approx(100 * expected.mean())
    assert numbers["pixel_accuracy"].value == pytest.approx(100 * accuracy_score(y, guess))
    low, high = numbers["miou"].interval
    assert low < numbers["miou"].value < high and 2 < numbers["miou"].se < 8


def test_intervals_are_of_images_and_not_of_pixels():
    """Half of the images wholly right, half wholly wrong: as uncertain as a share of 40 coins."""
    true = torch.zeros(40, 8, 8, dtype=torch.uint8)
    true[:, :4] = 1
    found = torch.where(torch.arange(40)[:, None, None] % 2 == 0, true, 1 - true)
    number = Overlap.of(found, true, 2).numbers(seed=0)["pixel_accuracy"]
    assert number.value == 50 and number.se == pytest.approx(100 * (0.25 / 40) ** 0.5, rel=0.1)


def test_the_head_is_the_optimum_that_scikit_learn_finds(places):
    train = places(30, seed=1)
    wanted = shares(train.labels, train.grid, 3)
    wanted[:7] *= 0.25  # places with few pixels that count
    space = Space.of(train.each)
    for decay in (1e-3, 0.1):
        head = space.fit(ShareLoss(wanted), (decay,))
        assert head.converged == [True]
        standardised = ((train.each - train.each.mean(0)) / train.each.std(0, correction=0)).double().numpy()
        total = wanted.sum().item()
        oracle = LogisticRegression(C=1 / (decay * total), tol=1e-10, max_iter=5000).fit(
            np.concatenate([standardised] * 3),
            np.repeat([0, 1, 2], len(standardised)),
            sample_weight=wanted.double().T.flatten().numpy(),
        )
        expected = oracle.predict_proba(standardised)
        assert np.abs(head.logits(train.each)[0].softmax(1).numpy() - expected).max() < 0.01


def test_masks_are_predicted_from_logits_that_are_enlarged_bilinearly(places, monkeypatch):
    monkeypatch.setattr(module, "ELEMENTS", 3 * 9 * 16 * 2)
    test = places(5, seed=2)
    weights = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    rows, found = zip(*predicted(lambda values: values @ weights, test, torch.tensor([4, 0, 2]), 3), strict=True)
    assert torch.cat(rows).tolist() == [4, 0, 2] and len(rows) > 1
    for row, mask in zip((4, 0, 2), torch.cat(found), strict=True):
        logits = (test.values[row].view(3, 4, 6) @ weights).permute(2, 0, 1)
        assert torch.equal(mask, F.interpolate(logits[None], (9, 16), mode="bilinear")[0].argmax(0))


def knn_by_hand(train, test, k, temperature):
    bank, queries = train.each.double().numpy(), test.each.double().numpy()
    bank, queries = (x - train.each.double().numpy().mean(0) for x in (bank, queries))
    bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))
    wanted = shares_by_hand(train.labels.numpy(), train.grid, 3)
    scores = []
    for query in queries:
        similar = bank @ query
        near = np.argsort(-similar)[:k]
        votes = np.exp(similar[near] / temperature)
        scores.append((votes[:, None] * wanted[near]).sum(0) / votes.sum())
    return torch.tensor(np.array(scores)).float()


def test_patches_vote_as_in_a_loop(places):
    train, test = places(20, seed=1), places(8, seed=2)
    outcome = segment_knn({"tokens": train}, {"tokens": test}, k=7)
    scores = knn_by_hand(train, test, 7, 0.07)
    parts = [mask for _, mask in predicted(lambda values: scores, test, torch.arange(8), 3)]
    expected = Overlap.of(torch.cat(parts), test.labels, 3).numbers(0)
    for name, number in outcome.numbers.items():
        assert number.value == pytest.approx(expected[name].value, abs=0.2)
    assert outcome.evaluator == "segment_knn" and 40 < expected["miou"].value < 95
    fewer = segment_knn({"tokens": train}, {"tokens": test}, k=7, num_patches=30)
    assert fewer.numbers["miou"].value < outcome.numbers["miou"].value + 5


@pytest.mark.parametrize("judge", [segment_linear, segment_knn])
def test_what_is_chosen_on_has_pixels_that_count(judge, places):
    """Most images are ignored all over, such as those whose masks cannot be read."""
    train, test = places(40, 1), places(10, 2)
    train.labels[:36] = IGNORED
    noise = torch.randn(train.values.shape, generator=torch.Generator().manual_seed(0))
    kinds = {"noise": dataclasses.replace(train, values=noise), "tokens": train}
    outcome = judge(kinds, {"noise": test, "tokens": test})
    found = outcome.details.get("grid") or [{"held_out_miou": outcome.details["held_out_miou"][kind]} for kind in kinds]
    assert np.isfinite([row["held_out_miou"] for row in found]).all() and outcome.chosen["features"] == "tokens"
    train.labels[:39] = IGNORED
    with pytest.raises(UserError, match="one image with a mask in which a pixel counts"):
        judge(kinds, {"noise": test, "tokens": test})


@pytest.mark.parametrize("judge", [segment_linear, segment_knn])
def test_the_kind_is_chosen_without_test_masks(places, as_places, judge):
    train, test = ({"tokens": places(count, seed)} for count, seed in ((40, 1), (10, 2)))
    for part in (train, test):
        noise = torch.randn(len(part["tokens"]), 12, 6, generator=torch.Generator().manual_seed(5))
        part["map"] = as_places(noise, part["tokens"].labels, (3, 4))
    outcome = judge(train, test)
    assert outcome.chosen["features"] == "tokens" and set(outcome.by_kind) == {"tokens", "map"}
    assert outcome.numbers["miou"].value > outcome.by_kind["map"]["miou"].value + 15
    mixed = {kind: dataclasses.replace(part, labels=part.labels.roll(3, 0)) for kind, part in test.items()}
    assert judge(train, mixed).chosen == outcome.chosen


@pytest.mark.parametrize("judge", [segment_linear, segment_knn])
def test_what_is_drawn_is_what_is_counted(places, judge):
    numbers = torch.tensor([7, 200, 3], dtype=torch.uint8)  # of the classes as masks have them
    renamed = [
        {"tokens": dataclasses.replace(part, labels=numbers[part.labels.long()])}
        for part in (places(40, 0), places(9, 1))
    ]
    drawn = {}
    outcome = judge(*renamed, drawn=drawn.__setitem__)
    ((_, predict),) = drawn.items()
    masks = renamed[1]["tokens"].labels
    some = torch.tensor([4, 1])
    every = predict(torch.arange(len(masks)))
    assert torch.equal(predict(some), every[some]) and every.dtype == torch.uint8
    right = (every == masks).double().mean().item()
    assert 100 * right == pytest.approx(outcome.numbers["pixel_accuracy"].value)


def test_the_door_draws_masks_in_colours_of_their_classes(tmp_path, capsys):
    write_shards(tmp_path, "train", 40, image_size=16)
    write_shards(tmp_path, "test", 12, image_size=16)
    sheet = tmp_path / "segmented.png"
    argv = ["segment", "pixels:8", "--train", f"{tmp_path}/train-000000.tar", "--test", f"{tmp_path}/test-000000.tar"]
    argv += ["--num-workers", "0", "--out", str(tmp_path / "out"), "--bank", str(tmp_path), "--pictures", str(sheet)]
    assert prelude.main(argv) == 0
    page = np.asarray(Image.open(sheet).convert("RGB"))
    # images and masks, then the source's name, the head's and the patches' predictions
    assert page.shape[0] == GAP + 4 * (TILE + GAP) + 15 + GAP
    known = {tuple(colour) for colour in class_colours(torch.arange(256, dtype=torch.uint8)[None])[0].tolist()}
    assert len(known) == 256
    for top in (GAP + TILE + GAP, GAP + 2 * (TILE + GAP) + 15 + GAP):  # of masks, and of what the head predicts
        left = page.shape[1] - GAP - 8 * (TILE + GAP)
        row = page[top : top + TILE, left : left + TILE]
        assert {tuple(colour) for colour in row.reshape(-1, 3).tolist()} <= known
    assert door(lambda: prelude.main(argv)) == 2
    assert "segmented.png exists" in capsys.readouterr().err
    plain, before = argv[: argv.index("--pictures")], set((tmp_path / "out").iterdir())
    assert prelude.main([*plain, "--ignore", "0", "--heads", "linear"]) == 0  # is told apart from what counts all
    (path,) = set((tmp_path / "out").iterdir()) - before
    assert json.loads(path.read_text())["data"]["ignored"] == [0]


COLOURS = ((250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250), (250, 0, 250))


def middles(tiles):
    return [one.getpixel((TILE // 2, TILE // 2)) for one in tiles]


def test_all_encoders_predict_the_images_that_the_first_has_chosen(tmp_path, png):
    """Images of one colour, each mostly of a class of its own; at 4 pixels other masks have most classes than at 16."""
    masks = np.empty((6, 16, 16), np.uint8)
    masks[:] = 10 + np.arange(6)[:, None, None]
    masks[:3, 0, [0, 5, 9]], masks[3:, 2, 2] = (1, 2, 3), 4
    with TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        for number, (colour, mask) in enumerate(zip(COLOURS, masks, strict=True)):
            image = io.BytesIO()
            Image.new("RGB", (16, 16), colour).save(image, "JPEG", quality=95)
            tar.write({"__key__": f"{number:04d}", "jpg": image.getvalue(), "png": png(mask)})
    labelled = Labelled(str(tmp_path / "a.tar"), str(tmp_path / "a.tar"), "png")
    judging = SegmentJudging([partial(segment_knn, k=1)], labelled, num_shown=3, bank=tmp_path / "bank")
    judge_all(["pixels:16", "pixels:4"], judging)
    assert [name for name, _ in judging.blocks] == ["pixels 16x16", "pixels 4x4"]
    own = class_colours(torch.arange(10, 13, dtype=torch.uint8)[None])[0].tolist()
    for _, rows in judging.blocks:
        assert [what for what, _ in rows] == ["images", "masks", "nearest patches"]
        images, _, found = (middles(tiles) for _, tiles in rows)
        assert np.abs(np.array(images) - COLOURS[:3]).max() < 20 and list(map(list, found)) == own


def test_an_image_that_a_later_encoder_cannot_read_is_left_blank_there():
    judging = SegmentJudging([], Labelled("a.tar", "a.tar", "png"), chosen=[7, 5, 9])
    readable, (one, other) = torch.tensor([2, 7, 9]), (Image.new("RGB", (TILE, TILE), c) for c in COLOURS[:2])
    rows = judging.rows(readable, lambda: pytest.fail("the images are chosen"))
    assert rows.tolist() == [1, 2]
    ((what, tiles),) = judging.in_columns(readable[rows], [("images", [one, other])])
    assert what == "images" and middles(tiles) == [COLOURS[0], (255, 255, 255), COLOURS[1]]


def test_an_encoder_that_can_read_none_of_them_is_not_in_the_picture():
    told = []
    judging = SegmentJudging([], Labelled("a.tar", "a.tar", "png"), chosen=[7, 5, 9], say=told.append)
    rows = judging.rows(torch.tensor([2, 3]), lambda: pytest.fail("the images are chosen"))
    judging.add("resnet18", torch.tensor([2, 3])[rows], lambda: pytest.fail("there is nothing to draw"))
    assert judging.blocks == [] and told == ["resnet18 can show none of the images of the picture, and is not in it."]


def test_classes_have_any_numbers_and_those_that_train_lacks_are_missed(places):
    train, test = places(30, seed=1), places(10, seed=2)
    plain = segment_linear({"tokens": train}, {"tokens": test})
    table = torch.arange(256, dtype=torch.uint8)
    table[:3] = torch.tensor([7, 254, 0], dtype=torch.uint8)
    other = [dataclasses.replace(part, labels=table[part.labels.long()]) for part in (train, test)]
    renamed = segment_linear({"tokens": other[0]}, {"tokens": other[1]}, names=("zero",))
    assert renamed.numbers["miou"].value == pytest.approx(plain.numbers["miou"].value, abs=0.5)
    assert set(renamed.details["by_features"]["tokens"]["by_class"]) == {"zero", "7", "254"}
    alike = segment_linear({"tokens": other[0]}, {"tokens": other[1]}, names=("zero",) * 8)
    assert set(alike.details["by_features"]["tokens"]["by_class"]) == {"zero", "zero (7)", "254"}
    table[2] = 9
    unseen = dataclasses.replace(test, labels=table[test.labels.long()])
    outcome = segment_linear({"tokens": other[0]}, {"tokens": unseen})
    assert outcome.details["by_features"]["tokens"]["by_class"]["9"]["iou"] == 0
    assert Classes(other[0], unseen).numbers == [0, 7, 254, 9]


def test_what_cannot_be_segmented_is_refused(places):
    train = places(10, seed=1)
    one = dataclasses.replace(train, labels=torch.zeros_like(train.labels))
    with pytest.raises(UserError, match="hold class 0 only"):
        segment_linear({"tokens": one}, {"tokens": train})
    with pytest.raises(UserError, match="no pixel that counts"):
        segment_knn({"tokens": train}, {"tokens": dataclasses.replace(train, labels=one.labels + 255)})
    alone = dataclasses.replace(train, values=train.values[:1], labels=train.labels[:1])
    with pytest.raises(UserError, match="one image with a mask"):
        segment_linear({"tokens": alone}, {"tokens": train})


def test_more_patches_than_decays_are_compared_on_change_the_choice_only(places, monkeypatch):
    train, test = places(40, seed=1), places(10, seed=2)
    whole = segment_linear({"tokens": train}, {"tokens": test}, weight_decays=(0.01,))
    monkeypatch.setattr(segmentation, "CHOOSE_ON", 60)
    few = segment_linear({"tokens": train}, {"tokens": test}, weight_decays=(0.01,))
    assert few.numbers["miou"].value == pytest.approx(whole.numbers["miou"].value, abs=0.5)
