"""A small run that every test of the doors starts in its own way."""

from pathlib import Path

import pytest
import yaml

from prelude.data.shapes import write_shards


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    write_shards(folder / "shapes", "train", num_samples=200, seed=0, image_size=16)
    config = {
        "run_dir": str(folder / "run"),
        "data": {"shards": str(folder / "shapes" / "train-*.tar"), "num_workers": 1, "shuffle": {"window": 64}},
        "encoder": {
            "name": "vit_tiny_patch16_224",
            "image_size": 16,
            "patch_size": 4,
            "kwargs": {"depth": 2, "embed_dim": 32, "num_heads": 2},
        },
        "objective": {"name": "mae", "decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
        "train": {"epochs": 3, "global_batch": 16, "precision": "fp32"},
        "optimizer": {"lr": 0.01, "warmup_epochs": 0.5},
        "checkpoint": {"every_steps": 5, "keep": 2},
        "log": {"every_steps": 1, "pictures_every_steps": 20},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
