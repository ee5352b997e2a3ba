"""Evaluations through the real launcher, on two ranks, against one process."""

import json

import numpy as np
import pytest
import several_starts
from runs import deepspeed

from prelude.data.shape_defects import MASK, write_defects
from prelude.data.shapes import write_shards
from prelude.data.shards import ShardIndex
from prelude.launch import embed as embed_door
from prelude.launch import knn as knn_door
from prelude.launch import linear_probe as probe_door
from prelude.launch import prelude

PROTOCOL = ["--protocol", "vissl", "--epochs", "3", "--global-batch", "20", "--learning-rates", "0.03", "0.3"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """101 train images, two of them damaged, one in each rank's part; 40 test images."""
    folder = tmp_path_factory.mktemp("shapes")
    write_shards(folder, "train", 101, image_size=16, samples_per_shard=60)
    write_shards(folder, "test", 40, image_size=16)
    write_defects(folder, "test", 40, image_size=16)
    index = ShardIndex(f"{folder}/train-*.tar", "cls")
    for sample in (3, 77):
        offset, size = index.images[sample].tolist()
        with open(index.shard_of(sample), "r+b") as file:
            file.seek(offset)
            file.write(b"\0" * size)
    return ["--train", f"{folder}/train-*.tar", "--test", f"{folder}/test-*.tar"]


def places(folder):
    return ["--bank", str(folder / "bank"), "--out", str(folder / "out"), "--num-workers", "0", "--batch-size", "16"]


OTHERS = ["ncm", "retrieve", "svm", "ood", "segment", "defects"]
REFUSED = ["shape", "maps", "bank", "shards", "export", "check_encoder", "check_objective", "quickstart"]


def argv_of(door, shards, folder) -> list[str]:
    """Of evaluations whose judging is one process' work, after all ranks have taken the features."""
    more = {
        "ncm": ["--tasks", "3"],
        "retrieve": ["--k", "1", "5"],
        "svm": ["--c", "1", "10", "--crops", "2"],
        "ood": ["--unknown", "3", "4"],
        "segment": [],
        "defects": ["--label", MASK, "--test", str(shards[3]).replace("test-*", "defects-test")],
    }[door]
    given = shards[:2] if door == "defects" else shards
    return ["pixels:8", *given, *places(folder / door), *more]


REFUSED_WORDS = {
    "shape": ["pixels:8"],
    "maps": ["runs/x", "--to", "a.png"],
    "bank": [],
    "shards": ["shapes", "--to", "nowhere"],
    "export": ["runs/x"],
    "check_encoder": ["resnet18"],
    "check_objective": ["mae", "--config", "mae_cifar10"],
    "quickstart": [],
}
SOURCES = ["pixels:8", "random:timm:test_vit.r160_in1k"]


def embedding_of(shards, path):
    return [SOURCES[1], shards[1], "--num-workers", "0", "--batch-size", "16", "--to", str(path)]


@pytest.fixture(scope="module")
def two(shards, tmp_path_factory):
    """The folder of what two ranks have written, and what they told, by door: one after another in one launch."""
    folder = tmp_path_factory.mktemp("two")
    answers = several_starts.made(
        deepspeed(2),
        folder,
        [
            {"name": "features", "door": "knn", "argv": [*SOURCES, *shards, *places(folder / "features")]},
            {"name": "file", "door": "embed", "argv": embedding_of(shards, folder / "two.npz")},
            {"name": "heads", "door": "linear_probe",
             "argv": ["pixels:8", *shards, *places(folder / "heads"), *PROTOCOL]},
            *({"name": door, "door": door, "argv": argv_of(door, shards, folder)} for door in OTHERS),
            *({"name": door, "door": door, "argv": REFUSED_WORDS[door]} for door in REFUSED),
        ],
    )  # fmt: skip
    assert {name: codes for name, (codes, _) in answers.items()} == {
        "features": [0, 0],
        "file": [4, 0],
        "heads": [0, 0],
        **{door: [0, 0] for door in OTHERS},
        **{door: [2, 2] for door in REFUSED},
    }
    return folder, {name: told for name, (_, told) in answers.items()}


def results(folder):
    found = [json.loads(path.read_text()) for path in sorted((folder / "out").glob("*.json"))]
    return {(result["encoder"]["name"], result["evaluator"]): result for result in found}


def entries(folder):
    found = {}
    for entry in (folder / "bank").iterdir():
        about = json.loads((entry / "about.json").read_text())
        shape = about["num_samples"], about["width"]
        found[entry.name] = (
            np.fromfile(entry / "values.f32", np.float32).reshape(shape),
            (np.fromfile(entry / "sample_ids.i64", np.int64)),
        )
    return found


def test_features_of_two_ranks_are_those_of_one_and_so_are_the_numbers(two, shards, tmp_path):
    folder, told = two
    one, two = tmp_path / "one", folder / "features"
    assert knn_door.main([*SOURCES, *shards, *places(one)]) == 0
    assert told["features"].count("top-1 %") == 1  # one rank prints
    assert entries(one).keys() == entries(two).keys() and len(entries(one)) == 6
    for name, (values, ids) in entries(one).items():
        there, ids_there = entries(two)[name]
        assert ids.tolist() == ids_there.tolist() and len(ids) in (99, 40)
        assert np.allclose(values, there, atol=1e-5)
    for key, result in results(one).items():
        assert results(two)[key]["numbers"] == result["numbers"]
        assert results(two)[key]["data"] == result["data"]


def test_a_file_of_two_ranks_holds_what_that_of_one_does(two, shards, tmp_path):
    folder, told = two
    assert told["file"].count("two.npz: 99 images") == 1  # one rank prints
    assert embed_door.main(embedding_of(shards, tmp_path / "one.npz")) == 4
    one, two = np.load(tmp_path / "one.npz"), np.load(folder / "two.npz")
    assert one.files == two.files
    for name in ("key", "shard", "sample_id", "label"):
        assert one[name].tolist() == two[name].tolist() and len(one[name]) == 99
    assert np.allclose(one["cls"], two["cls"], atol=1e-5)


def test_heads_on_augmented_images_do_not_depend_on_ranks(two, shards, tmp_path):
    one, two = tmp_path / "one", two[0] / "heads"
    assert probe_door.main(["pixels:8", *shards, *places(one), *PROTOCOL]) == 0
    ((_, ours),) = results(one).items()
    ((_, theirs),) = results(two).items()
    assert ours["numbers"] == theirs["numbers"] and ours["chosen"] == theirs["chosen"]
    assert ours["recipe"]["num_steps"] == 13
    for row, other in zip(ours["details"]["grid"], theirs["details"]["grid"], strict=True):
        assert other["held_out_loss"] == pytest.approx(row["held_out_loss"], rel=1e-5)


@pytest.mark.parametrize("door", OTHERS)
def test_other_judges_find_what_they_do_alone(door, two, shards, tmp_path):
    folder, told = two
    assert prelude.main([door, *argv_of(door, shards, tmp_path)]) == 0
    one, two = results(tmp_path / door), results(folder / door)
    assert one.keys() == two.keys() and one
    for key, result in one.items():
        assert two[key]["numbers"] == result["numbers"] and two[key]["data"] == result["data"]
        assert two[key]["warnings"] == result["warnings"]
    assert told[door].count(", written to") == len(one)  # one rank writes


@pytest.mark.parametrize("door", REFUSED)
def test_what_one_process_does_is_refused_under_a_launcher(door, two):
    _, told = two
    words = f"prelude {door.replace('_', '-')} is the work of one process, and 2 were started"
    assert told[door].count(words) == 2 and "Traceback" not in told[door]
