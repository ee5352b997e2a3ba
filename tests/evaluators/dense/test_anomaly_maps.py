"""Maps of anomalies against scikit-learn, scipy and loops."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

from prelude.checkpoints import store as stores
from prelude.checkpoints.manifest import STATE
from prelude.checkpoints.state.portable import PortableState
from prelude.data.errors import UserError
from prelude.data.shape_defects import write_defects
from prelude.data.shapes import write_shards
from prelude.evaluators.dense import anomaly_maps
from prelude.evaluators.dense.anomaly_maps import SIGMA, gaussian_maps, level_maps, numbers, smoothed
from prelude.evaluators.dense.drawing import GAP, TILE
from prelude.evaluators.dense.hidden_errors import errors_by_patch
from prelude.evaluators.judging import judge_all
from prelude.evaluators.labelled import Labelled
from prelude.launch import prelude
from prelude.launch.autoencoder import open_autoencoder
from prelude.launch.defect_maps import DefectJudging, refuse_unhidden
from prelude.launch.exit_codes import door
from prelude.objectives import options_for
from prelude.objectives.building import build_objective
from prelude.objectives.masking import random_mask
from prelude.pretrain.recipes import validate_config


@pytest.fixture
def parts(as_places):
    """Normal train images, of which one is not, and test images of which every second has a strange place."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 6, 6, generator=generator)
    train, test = (
        torch.einsum("nle,lef->nlf", torch.randn(count, 12, 6, generator=generator), mixing) for count in (60, 30)
    )
    masks = torch.zeros(30, 9, 16, dtype=torch.uint8)
    masks[1::2, 3:6, 4:8] = 1
    test[1::2, 5] += 2.5  # the place in the second row and column
    of_train = torch.zeros(60, 9, 16, dtype=torch.uint8)
    of_train[7, 0, 0], train[7] = 1, 1e6
    return as_places(train, of_train, (3, 4), "a"), as_places(test, masks, (3, 4), "b")


def test_distances_are_those_of_scikit_learn_at_each_place(parts):
    train, test = parts
    normal = anomaly_maps.normal_images({"tokens": train})
    assert normal.tolist() == [i for i in range(60) if i != 7]
    found = level_maps(train, test, normal, 0, "cpu")
    expected = np.zeros((30, 12))
    of_train, of_test = (part.values.view(len(part), 12, 6).double().numpy() for part in parts)
    for place in range(12):
        oracle = LedoitWolf().fit(of_train[normal.numpy(), place])
        expected[:, place] = np.sqrt(oracle.mahalanobis(of_test[:, place]))
    expected = F.interpolate(torch.tensor(expected).view(30, 1, 3, 4).float(), (9, 16), mode="bilinear")[:, 0]
    assert torch.allclose(found, expected, rtol=1e-4)


def test_smoothing_is_that_of_scipy():
    maps = torch.randn(3, 20, 30, generator=torch.Generator().manual_seed(0))
    expected = [gaussian_filter(one.numpy(), 4 / 224 * 20, mode="nearest", truncate=4.0) for one in maps]
    assert np.abs(smoothed(maps).numpy() - np.stack(expected)).max() < 0.02
    large = torch.randn(1, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = gaussian_filter(large[0].numpy(), SIGMA * 224, mode="nearest", truncate=4.0)
    assert np.abs(smoothed(large)[0].numpy() - expected).max() < 1e-5


def test_areas_are_those_of_scikit_learn_and_the_interval_is_of_images(parts):
    _, test = parts
    maps = torch.randn(30, 9, 16, generator=torch.Generator().manual_seed(1)) + 1.5 * (test.labels == 1)
    masks = test.labels.clone()
    masks[:, 8] = 255
    found = numbers(maps, masks, seed=0)
    counted = (masks != 255).numpy()
    expected = roc_auc_score(masks.numpy()[counted] == 1, maps.numpy()[counted])
    assert found["pixel_auroc"].value == pytest.approx(100 * expected)
    low, high = found["pixel_auroc"].interval
    assert low < found["pixel_auroc"].value < high and 0.3 < found["pixel_auroc"].se < 3
    largest = np.where(counted, maps.numpy(), -np.inf).max((1, 2))
    assert found["image_auroc"].value == pytest.approx(100 * roc_auc_score(np.arange(30) % 2 == 1, largest))
    binned = anomaly_maps._binned_auc(maps, masks)(torch.ones(1, 30, dtype=torch.float64)).item()
    assert binned == pytest.approx(expected, abs=1e-3)


def test_an_image_whose_mask_cannot_be_read_is_neither_normal_nor_a_defect(parts):
    train, test = parts
    maps = torch.randn(30, 9, 16, generator=torch.Generator().manual_seed(1))
    masks = test.labels.clone()
    masks[:6] = 255
    found, without = numbers(maps, masks, seed=0), numbers(maps[6:], masks[6:], seed=0)
    assert {name: number.value for name, number in found.items()} == pytest.approx(
        {name: number.value for name, number in without.items()}
    )
    of_train = dataclasses.replace(train, labels=train.labels.clone())
    of_train.labels[:3] = 255
    normal = anomaly_maps.normal_images({"tokens": of_train})
    assert normal.tolist() == [i for i in range(3, 60) if i != 7]


def test_strange_places_are_found_and_levels_are_added(parts, as_places):
    train, test = parts
    noise = [as_places(torch.randn(len(part), 12, 3), part.labels, (3, 4)) for part in parts]
    maps = {}
    outcome = gaussian_maps(
        {"map1": train, "map2": noise[0]}, {"map1": test, "map2": noise[1]}, drawn=maps.__setitem__
    )  # fmt: skip
    alone = outcome.details["by_features"]
    assert alone["map1"]["pixel_auroc"].value > 75 > 60 > alone["map2"]["pixel_auroc"].value
    assert alone["map2"]["pixel_auroc"].value < outcome.numbers["pixel_auroc"].value
    assert outcome.details["num_normal_train"] == 59 and maps["Gaussian"].shape == (30, 9, 16)
    normal = anomaly_maps.normal_images({"": train})
    expected = smoothed(sum(level_maps(*both, normal, 0, "cpu") for both in ((train, test), noise)))
    assert torch.equal(maps["Gaussian"], expected)


def test_what_shows_no_defect_is_refused(parts):
    train, test = ({"tokens": part} for part in parts)
    clean = {"tokens": dataclasses.replace(parts[1], labels=torch.zeros(30, 9, 16, dtype=torch.uint8))}
    with pytest.raises(UserError, match="No test image has a defect"):
        gaussian_maps(train, clean)
    with pytest.raises(UserError, match="defects all over"):
        gaussian_maps(train, {"tokens": dataclasses.replace(parts[1], labels=clean["tokens"].labels + 1)})
    with pytest.raises(UserError, match="No train image is without a defect"):
        gaussian_maps({"tokens": dataclasses.replace(parts[0], labels=parts[0].labels * 0 + 1)}, test)


def test_every_patch_is_hidden_as_often_as_any_other():
    images, seeds = torch.rand(3, 1, 4, 4), torch.tensor([5, 6, 7])
    calls = []

    def fill(images, noise):
        hidden = random_mask(noise, 4).removed  # 12 of 16 patches
        calls.append(hidden)
        return hidden, (100 * len(calls) + hidden).float()

    found = errors_by_patch(fill, images, seeds, 16, 8)
    count, total = torch.zeros(3, 16), torch.zeros(3, 16)
    for number, hidden in enumerate(calls, start=1):
        for row, patches in enumerate(hidden.tolist()):
            for patch in patches:
                count[row, patch] += 1
                total[row, patch] += 100 * number + patch
    assert (count == 6).all() and torch.allclose(found, total / count)
    assert not torch.equal(calls[0][0].sort().values, calls[0][1].sort().values)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """What a run of MAE leaves, as far as this evaluation looks at it."""
    folder = tmp_path / "run"
    values = {
        "run_dir": str(folder),
        "data": {"shards": "x"},
        "encoder": {
            "name": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 4,
            "kwargs": {"embed_dim": 24, "depth": 1, "num_heads": 2},
        },
        "objective": {"name": "mae", "decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
        "train": {"epochs": 1, "global_batch": 4},
        "optimizer": {"lr": 1e-3},
    }  # fmt: skip
    config = validate_config(values, "a test", options_for)
    model = build_objective(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    meta = {
        "step": 3,
        "encoder": config.encoder.model_dump(mode="json"),
        "exported": "encoder.",
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
        "loader": {"fingerprint": "0123abcd"},
        "config": config.model_dump(mode="json"),
    }
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = {"encoder.cls_token/exp_avg": torch.zeros_like(tensors["encoder.cls_token"])}
    state = PortableState(tensors=tensors, optimizer="AdamW", moments=moments, scalars={})
    monkeypatch.setattr(stores, "gather_state", lambda engine: state)
    store = stores.Store(folder / "checkpoints")
    store.save(3, None, meta)
    store.finish()
    return folder, model


def test_the_autoencoder_is_that_of_the_checkpoint_that_is_named(run, monkeypatch):
    folder, model = run
    before = folder / "checkpoints" / "step-00000003"
    meta = json.loads((before / STATE).read_text())["meta"]
    tensors = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    moments = {"encoder.cls_token/exp_avg": torch.zeros_like(tensors["encoder.cls_token"])}
    state = PortableState(tensors=tensors, optimizer="AdamW", moments=moments, scalars={})
    monkeypatch.setattr(stores, "gather_state", lambda engine: state)
    store = stores.Store(folder / "checkpoints")
    store.save(6, None, meta | {"step": 6})
    store.finish()
    of = {step: open_autoencoder(str(place)).mask_token for step, place in ((3, before), (6, folder))}
    assert torch.equal(of[3] + 1, of[6]) and torch.equal(of[3], model.mask_token)
    (folder / "export").mkdir()
    (folder / "export" / "config.json").write_text("{}")
    assert open_autoencoder(str(folder / "export")) is None


@pytest.mark.parametrize("name", ["mae_pretrain_vit_base.pth", "step-300.safetensors"])
def test_a_file_of_weights_has_no_autoencoder(name, tmp_path):
    (tmp_path / name).write_bytes(b"weights")
    for words in ("", "#num_heads=12"):
        assert open_autoencoder(f"{tmp_path / name}{words}") is None


@pytest.mark.parametrize(("num_patches", "num_keep", "least"), [(16, 4, 2), (196, 157, 6), (9, 6, 3)])
def test_masks_too_few_to_hide_every_patch_are_refused(num_patches, num_keep, least):
    def fill(images, noise):
        hidden = noise.argsort(1)[:, num_keep:]
        return hidden, torch.ones(hidden.shape)

    errors = errors_by_patch(fill, torch.zeros(2, 3, 4, 4), torch.arange(2), num_patches, least)
    assert (errors == 1).all()
    refuse_unhidden(num_patches, num_keep, least)
    with pytest.raises(UserError, match=f"--masks {least - 1} cannot hide each .*; write {least} or more"):
        refuse_unhidden(num_patches, num_keep, least - 1)


def test_the_whole_autoencoder_comes_back(run):
    folder, model = run
    found = open_autoencoder(str(folder))
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    with torch.no_grad():
        ours, theirs = (one.reconstruct(images, noise) for one in (found, model))
    assert torch.equal(ours.predicted, theirs.predicted) and not found.training
    assert open_autoencoder(f"random:{folder}") is None and open_autoencoder("timm:test_vit.r160_in1k") is None
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    target = torch.gather(patches, 1, ours.mask.removed[..., None].expand(-1, -1, 48))
    restored = model.restored(ours)
    loss = ((restored - target) ** 2).mean()
    assert loss.item() == pytest.approx(model.loss(ours).parts["pixel_mse"].item(), rel=1e-4)


def test_the_door(run, tmp_path, capsys):
    folder, _ = run
    write_shards(tmp_path, "train", 40, image_size=16)
    test = write_defects(tmp_path, "test", 40, image_size=16)
    sheet = tmp_path / "found.png"
    argv = ["--train", f"{tmp_path}/train-000000.tar", "--test", str(test), "--label", "defect.png"]
    argv += ["--num-workers", "0", "--out", str(tmp_path / "out")]
    words = ["defects", str(folder), f"random:{folder}", "pixels", *argv, "--masks", "4", "--pictures", str(sheet)]
    assert prelude.main(words) == 0
    found = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    assert sorted(one["evaluator"] for one in found) == ["anomaly_map_gaussian"] * 3 + ["anomaly_map_reconstruction"]
    assert all({"pixel_auroc", "image_auroc"} == set(one["numbers"]) for one in found)
    assert "pixel AUROC %" in capsys.readouterr().out
    # images and true defects, then of each source its name and maps
    assert Image.open(sheet).height == GAP + 6 * (TILE + GAP) + 3 * (15 + GAP)
    for wrong, told in (([], "found.png exists"), (["--pictures", "a.jpg"], "write a.png")):
        assert door(lambda wrong=wrong: prelude.main([*words, *wrong])) == 2
        assert told in capsys.readouterr().err
    assert door(lambda: prelude.main(["defects", "pixels:8", *argv, "--label", "png"])) == 2
    assert "No test image has a defect" in capsys.readouterr().err


def test_a_later_encoder_is_shown_the_images_that_the_first_has_chosen(tmp_path):
    write_shards(tmp_path, "train", 40, image_size=16)
    test = write_defects(tmp_path, "test", 40, image_size=16)
    labelled = Labelled(f"{tmp_path}/train-000000.tar", str(test), "defect.png")
    first = DefectJudging((), labelled, of_defects=True, num_shown=2, bank=tmp_path / "bank")
    later = dataclasses.replace(first, chosen=[], blocks=[])
    judge_all(["pixels:8"], first)
    later.chosen.extend(first.chosen[::-1])
    judge_all(["pixels:8"], later)
    ((_, rows),), ((_, turned),) = first.blocks, later.blocks
    assert [what for what, _ in rows] == ["images", "defects", "Gaussian"]
    for (_, tiles), (_, others) in zip(rows, turned, strict=True):
        assert [one.tobytes() for one in others] == [one.tobytes() for one in tiles[::-1]]
    one, other = rows[0][1]
    assert one.tobytes() != other.tobytes()
