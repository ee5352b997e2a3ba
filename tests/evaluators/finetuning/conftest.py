import pytest
import yaml
from findings import write_findings
from tuned import RECIPE, SOURCES, VIT, opened

from prelude.data.shapes import write_shards
from prelude.evaluators.finetuning import finetune


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_shards(folder, "train", 100, image_size=16)
    write_shards(folder, "test", 45, image_size=16)
    return {"train": f"{folder}/train-*.tar", "test": f"{folder}/test-*.tar"}


@pytest.fixture(scope="session")
def findings(tmp_path_factory):
    """The arguments of `prepared` for shards with several findings an image."""
    folder = tmp_path_factory.mktemp("findings")
    train = write_findings(folder, "train", 90)
    return {"train": train, "test": write_findings(folder, "test", 45, first_patient=100), "label": "json"}


@pytest.fixture
def prepared(monkeypatch, tmp_path, shards):
    """Prepares a task from the recipe, with changes; a source is one of SOURCES or the same small ViT."""

    def open_encoder(source, *, seed=0):
        config = next((config for name, config in SOURCES.items() if name in source), VIT)
        return opened(config, seed, source)

    monkeypatch.setattr(finetune, "open_encoder", open_encoder)

    def prepare(*overrides, source="somewhere", recipe=RECIPE, **arguments):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        task = finetune.prepare(source, path, list(overrides), **({**shards, "label": "cls"} | arguments))
        finetune.check(task, 1)
        return task

    return prepare
