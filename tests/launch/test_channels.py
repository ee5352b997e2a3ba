"""From files to plain timm: four channels of 16 bits, an X-ray of 12, and the recipes for such images."""

import io
import json
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import several_starts
import timm
import torch
import yaml
from PIL import Image

from prelude.checkpoints.export import export_encoder
from prelude.checkpoints.sources import open_encoder
from prelude.evaluators.dense.drawing import GAP, TILE
from prelude.evaluators.frozen.knn import knn
from prelude.evaluators.judging import evaluate, labelled_shards, open_source
from prelude.launch import prelude
from prelude.launch.inspection import info
from prelude.launch.shards_arguments import shards_parser
from prelude.objectives import check_objective, options_for
from prelude.pretrain.recipes import load_config

VIT = {"name": "vit_tiny_patch16_224", "image_size": 16, "patch_size": [4, 8]}
VIT["kwargs"] = {"depth": 1, "embed_dim": 32, "num_heads": 2}
SETS = {  # channels, the range, the format
    "satellite": (4, [0, 10000], "npy"),
    "xray": (1, "auto", "png"),
    "bands": (13, None, "npy"),
    "stains": (5, None, "npy"),
}
TRAINED = ("satellite", "xray")
SHOWN = {"satellite": [3, 1, 0], "xray": []}  # as red, green and blue


TINY_VIT = ["encoder.image_size=32", "encoder.patch_size=8", "objective.decoder_depth=1", "objective.decoder_dim=16",
            "objective.decoder_num_heads=2", "encoder.kwargs={depth: 1, embed_dim: 32, num_heads: 2}"]  # fmt: skip
RECIPES = {  # the set that they are tried on, and what makes them small
    "chest_xray": ("xray", TINY_VIT),
    "sentinel2": ("bands", TINY_VIT),
    "fluorescence": ("stains", ["encoder.name=resnet10t", "encoder.image_size=32", "objective.projector=[8,8]"]),
}
SHORT = ["train.epochs=0.5", "optimizer.warmup_epochs=0.1", "train.global_batch=10", "data.num_workers=0"]


def array(values) -> bytes:
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def picture(number: int, kind: str) -> tuple[np.ndarray, int]:
    """Blobs of 12 or so bits whose last channel alone says which of two classes they are of."""
    channels, _, _ = SETS[kind]
    rng, label = np.random.default_rng(number), number % 2
    values = rng.integers(0, 600, (24, 20, channels))
    values[6:18, 5:15, -1] += 900 + 2500 * label
    return values.astype(np.uint16), label


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("channels")
    for kind, (channels, value_range, format) in SETS.items():
        for split, first, count in (("train", 0, 60), ("test", 60, 20)):
            members = []
            for n in range(first, first + count):
                values, label = picture(n, kind)
                image = array(values) if format == "npy" else cv2.imencode(".png", values)[1].tobytes()
                members += [(f"{n:03}.{format}", image), (f"{n:03}.cls", str(label).encode())]
            write_tar(folder / kind / f"{split}-0.tar", members)
        if kind not in TRAINED:
            continue
        recipe = {
            "run_dir": str(folder / f"run_{kind}"),
            "data": {
                "shards": str(folder / kind / "train-0.tar"), "num_workers": 1, "shuffle": {"window": 16},
                "channels": channels, "range": value_range, "mean": [0.1] * channels, "std": [0.1] * channels,
                "shown_channels": SHOWN[kind],
            },
            "encoder": VIT,
            "objective": {"name": "mae", "decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, "flip": 0.0},
            "train": {"epochs": 1, "global_batch": 10, "precision": "fp32"},
            "optimizer": {"lr": 0.01, "warmup_epochs": 0.1},
            "log": {"every_steps": 1, "pictures_every_steps": 3},
            "evaluate": {f"{split}_shards": str(folder / kind / f"{split}-0.tar") for split in ("train", "test")},
        }  # fmt: skip
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(recipe))
    plan = [{"name": kind, "argv": ["--config", str(folder / f"{kind}.yaml")]} for kind in TRAINED]
    for name, (kind, small) in RECIPES.items():
        made_up = [f"run_dir={folder}/run_{name}", f"data.shards={folder}/{kind}/train-0.tar"]
        plan.append({"name": name, "argv": ["--config", name, *made_up, *SHORT, *small]})
    for codes, told in several_starts.made([sys.executable], folder, plan).values():
        assert codes == [0], told
        assert "dark" not in told
    return folder


@pytest.mark.parametrize("kind", TRAINED)
def test_what_was_trained_opens_in_plain_timm_with_its_channels(folder, kind):
    channels = SETS[kind][0]
    run, to = folder / f"run_{kind}", folder / f"export_{kind}"
    report = export_encoder(str(run), to)
    config = json.loads((to / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [channels, 16, 16]
    assert len(config["pretrained_cfg"]["mean"]) == channels and config["model_args"]["in_chans"] == channels
    images = torch.randn(2, channels, 16, 16, generator=torch.Generator().manual_seed(0))
    ours = open_encoder(str(run)).model
    for arguments in ({}, {"in_chans": channels}):
        plain = timm.create_model(f"local-dir:{to}", pretrained=True, num_classes=0, **arguments).eval()
        assert torch.equal(plain(images), ours(images))
        assert sum(tensor.numel() for tensor in plain.parameters()) == report.num_parameters
    again = open_encoder(f"local-dir:{to}")
    assert again.config.in_chans == open_encoder(str(to)).config.in_chans == channels
    assert torch.equal(again.model(images), ours(images))


@pytest.mark.parametrize("kind", TRAINED)
def test_evaluators_read_the_channel_that_tells_the_classes(folder, kind):
    run = str(folder / f"run_{kind}")
    labelled = labelled_shards([run])
    asked = SETS[kind][1]
    assert labelled.value_range == ([0, 4095] if asked == "auto" else asked)  # what was found is on record
    results = evaluate([run, "pixels:8", "pixels"], [knn], labelled)
    tops = [result.outcome.numbers["top1"].value for result in results]
    assert min(tops[1:]) == 100 and tops[0] > 90


def test_pictures_show_the_channels_that_the_run_says(folder, tmp_path):
    """The last channel, where the blobs are, is red in all of them."""
    run, shards = folder / "run_satellite", folder / "satellite" / "test-0.tar"
    export_encoder(str(run), tmp_path / "export")
    for source in (str(run), str(tmp_path / "export"), f"random:{run}", "pixels"):
        assert open_source(source, [str(run)], 0).shown == (3, 1, 0)
    maps, near, features = (str(tmp_path / name) for name in ("maps.png", "near.png", "features.npz"))
    assert prelude.main(["maps", str(run), "--images", str(shards), "--to", maps]) == 0
    assert prelude.main(["embed", str(run), str(shards), "--to", features, "--num-workers", "0"]) == 0
    (tmp_path / "photo.npy").write_bytes(array(picture(61, "satellite")[0]))
    assert prelude.main(["neighbours", features, "--of", f"{tmp_path}/photo.npy", "060", "--sheet", near]) == 0
    for png, rows in ((maps, slice(GAP, GAP + TILE)), (near, slice(None))):
        values = np.asarray(Image.open(png).convert("RGB"))[rows].reshape(-1, 3).astype(int)
        coloured = values[np.ptp(values, axis=1) > 20]
        assert len(coloured) > 1000 and (coloured.argmax(1) == 0).all()


def test_info_says_what_is_to_be_pasted(folder, capsys):
    shards = str(folder / "satellite" / "train-0.tar")
    assert info(shards_parser("x").parse_args(["info", shards, "--range", "0,10000"])) == 0
    pasted = capsys.readouterr().out.splitlines()[-1]
    values = np.stack([picture(n, "satellite")[0] for n in range(60)]) / 10000
    mean, std = values.mean((0, 1, 2)), values.std((0, 1, 2))
    said = [",".join(f"{value:.4f}" for value in each) for each in (mean, std)]
    assert pasted == f"data.channels=4 data.mean=[{said[0]}] data.std=[{said[1]}] data.range=[0,10000]"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_of_such_images_is_sound_as_it_is_and_trains_when_it_is_small(name, folder):
    config = load_config(name, [], options_for)
    check_objective(config)
    assert config.encoder.in_chans == config.data.channels != 3 and config.data.range
    steps = [json.loads(line) for line in (folder / f"run_{name}" / "metrics.jsonl").read_text().splitlines()]
    assert steps and all(np.isfinite(step["loss"]) for step in steps)
