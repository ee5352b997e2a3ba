"""The examples run on small data with timm and torch alone: `prelude` cannot be imported there."""

import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from runs import ROOT

from prelude.data.shapes import paint

WITHOUT_OURS = "import runpy, sys; sys.modules['prelude'] = None; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture
def encoder(tmp_path):
    torch.manual_seed(0)
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **settings)
    config = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "input_size": (3, 32, 32), "num_classes": 0}
    timm.models.save_for_hf(model, tmp_path / "encoder", model_config=config, model_args=settings)
    return str(tmp_path / "encoder")


def run(name: str, *argv: str) -> str:
    script = str(ROOT / "examples" / name)
    command = [sys.executable, "-c", f"import sys; sys.argv = sys.argv[1:]; {WITHOUT_OURS}", script, *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_fine_tuning_in_plain_timm(encoder, tmp_path):
    for split, count in (("train", 40), ("test", 20)):
        pixels, labels = paint(split, np.arange(count))
        for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            folder = tmp_path / split / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number}.png")
    to = tmp_path / "finetuned.pt"
    told = run("finetune_timm.py", encoder, f"{tmp_path}/train", f"{tmp_path}/test", "--epochs", "2", "--to", str(to))
    assert "epoch 2" in told and "accuracy" in told
    assert torch.load(to, weights_only=True)["head.weight"].shape == (10, 32)
    assert len((ROOT / "examples" / "finetune_timm.py").read_text().splitlines()) < 60


def test_segmentation_on_the_maps_of_an_export(encoder, tmp_path):
    """Bright squares on a dark ground: two classes that a head can tell apart at once."""
    draws = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        for part in ("images", "masks"):
            (tmp_path / split / part).mkdir(parents=True)
        for number in range(count):
            mask = np.zeros((32, 32), np.uint8)
            top, left = draws.integers(0, 16, 2)
            mask[top : top + 16, left : left + 16] = 1
            image = np.repeat(mask[..., None] * 150 + 50, 3, 2).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / split / "images" / f"{number}.png")
            Image.fromarray(mask).save(tmp_path / split / "masks" / f"{number}.png")
    argv = [encoder, f"{tmp_path}/train", f"{tmp_path}/test", "--num-classes", "2", "--epochs", "12"]
    told = run("segmentation.py", *argv, "--batch-size", "8", "--to", str(tmp_path / "segmenter.pt"))
    scores = [float(line.rpartition(" ")[2].rstrip("%")) for line in told.splitlines()]
    assert len(scores) == 12 and scores[-1] > 60  # all ground: 37 %
