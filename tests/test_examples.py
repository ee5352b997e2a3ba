"""The examples, each in a process in which our packages cannot be imported."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from prelude.data.shapes import paint

ROOT = Path(__file__).resolve().parents[1]
ALONE = (
    "import runpy, sys; sys.modules['prelude'] = None; script = sys.argv[1]; sys.argv = sys.argv[1:]; "
    "runpy.run_path(script, run_name='__main__')"
)


def alone(script, *argv, folder):
    command = [sys.executable, "-c", ALONE, str(ROOT / "examples" / script), *map(str, argv)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return [float(number) for number in re.findall(r"(?:top-1|IoU) ([\d.]+) %", done.stdout)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two classes of shapes in class folders, and as images with masks of what is not the background's tone."""
    folder = tmp_path_factory.mktemp("examples")
    for split, count in (("train", 240), ("test", 120)):
        pixels, labels = paint(split, np.arange(count), image_size=32)
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            if label < 2:
                place = folder / split / f"class{label}"
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(place / f"{i}.png")
            for kind, picture in (("images", image), ("masks", (image.mean(2) > image.mean()).astype(np.uint8))):
                place = folder / f"{split}-masks" / kind
                place.mkdir(parents=True, exist_ok=True)
                if i < 32:
                    Image.fromarray(picture).save(place / f"{i}.png")
    return folder


def exported(folder, name, **settings):
    """A folder as `prelude export` writes it, which is timm's own."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **settings)
    model_args = {key: value for key, value in settings.items()}
    save_for_hf(model, folder, model_args=model_args, safe_serialization=True)
    return folder


def test_finetune_timm_is_short_and_learns(data, tmp_path):
    assert len((ROOT / "examples/finetune_timm.py").read_text().splitlines()) < 60
    export = exported(
        tmp_path / "export", "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2
    )
    top1 = alone(
        "finetune_timm.py",
        export,
        data / "train",
        data / "test",
        "--epochs",
        "2",
        "--batch-size",
        "16",
        folder=tmp_path,
    )
    assert len(top1) == 2 and (tmp_path / "finetuned.pt").is_file()


def test_segmentation_learns_masks(data, tmp_path):
    export = exported(tmp_path / "export", "test_resnet")
    argv = [
        export,
        data / "train-masks",
        data / "test-masks",
        "--classes",
        "2",
        "--workers",
        "0",
        "--epochs",
        "2",
        "--batch-size",
        "8",
    ]
    iou = alone("segmentation.py", *argv, folder=tmp_path)
    assert len(iou) == 2 and iou[-1] > 34  # one class everywhere has at most 50 / 2 and a little
