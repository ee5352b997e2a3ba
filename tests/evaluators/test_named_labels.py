"""Labels that are names: as text, in a field, as class folders, beside images; numbered alike in train and test."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from prelude.data.errors import UserError
from prelude.data.select import Selection
from prelude.data.shapes import paint
from prelude.evaluators.features.labels import class_numbers
from prelude.evaluators.frozen.knn import knn
from prelude.evaluators.judging import evaluate
from prelude.evaluators.labelled import Labelled
from prelude.launch import prelude
from prelude.launch.exit_codes import door

NAMES = ["zebra", "ant", "mole", "Bee", "7", "owl", "cod", "yak", "elk", "fox"]  # in another order than the alphabet's
SORTED = sorted(NAMES)


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """photos/train and photos/test, with files beside the images; the test images lack the first class in any order."""
    root = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 60), ("test", 40)):
        pictures, numbers = paint(split, np.arange(count), image_size=16)
        for n, (picture, number) in enumerate(zip(pictures, numbers.tolist(), strict=True)):
            name = NAMES[number]
            if split == "test" and name == SORTED[0]:
                continue
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            tinted = picture // 4 + np.array([19 * number, 190 - 19 * number, 90], np.uint8)  # told apart by its colour
            (folder / f"{n}.png").write_bytes(png(tinted))
            about = {"about": {"kind": name, "number": number}, "site": "AB"[n % 2]}
            (folder / f"{n}.json").write_text(json.dumps(about))
    return root


@pytest.fixture(scope="module")
def shards(folders, tmp_path_factory):
    """The same as tars of image, text and JSON member, with a second image of every sample that is all black."""
    root = tmp_path_factory.mktemp("shards")
    for split in ("train", "test"):
        with tarfile.open(root / f"{split}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for path in sorted((folders / split).rglob("*.png"), key=lambda path: int(path.stem)):
                about = {"txt": path.parent.name.encode(), "json": path.with_suffix(".json").read_bytes()}
                members = {"left.png": path.read_bytes(), "right.png": png(np.zeros((16, 16, 3), np.uint8))} | about
                for ext, content in members.items():
                    info = tarfile.TarInfo(f"{path.stem}.{ext}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return root


def judged(labelled: Labelled):
    (result,) = evaluate(["pixels:8"], [knn], labelled)
    return result.data, result.outcome.numbers["top1"].value


@pytest.mark.parametrize("label", ["txt", "json:about.kind"])
def test_names_in_shards_are_numbers_of_the_sorted_names(shards, label):
    parts = str(shards / "train.tar"), str(shards / "test.tar")
    data, top1 = judged(Labelled(*parts, label, image="left.png"))
    assert data["classes"] == SORTED and data["label"] == label and data["image"] == "left.png"
    numbers, as_numbers = judged(Labelled(*parts, "json:about.number", image="left.png"))
    assert "classes" not in numbers and top1 == as_numbers > 25
    assert judged(Labelled(*parts, label, image="right.png"))[1] < 15  # what is black says nothing


def test_names_of_folders_have_one_number_in_train_and_test(folders, shards):
    parts = Labelled(str(folders / "train"), str(folders / "test"), "cls")
    data, top1 = judged(parts)
    assert data["classes"] == SORTED
    train, test = parts.indexes()
    for index in (train, test):
        names = [index.key(sample).partition("/")[0] for sample in range(index.num_samples)]
        assert [SORTED[number] for number in class_numbers(index).values.tolist()] == names
    assert SORTED[0] not in names
    of_shards = Labelled(str(shards / "train.tar"), str(shards / "test.tar"), "txt", image="left.png")
    assert top1 == judged(of_shards)[1]


def test_files_beside_images_and_folders_by_their_place_are_labels(folders):
    for label, classes in (("json:site", ["A", "B"]), ("parent", SORTED), ("json:about.kind", SORTED)):
        train, _ = Labelled(str(folders / "train"), str(folders / "test"), label).indexes()
        assert list(train.classes) == classes and class_numbers(train).known.all()
    nested, _ = Labelled(str(folders), str(folders), "top").indexes()
    assert nested.classes == ("test", "train")


def test_given_names_decide_the_numbers(shards):
    parts = str(shards / "train.tar"), str(shards / "test.tar"), "txt"
    train, test = Labelled(*parts, image="left.png", classes=tuple(NAMES)).indexes()
    numbers = Labelled(*parts[:2], "json:about.number", image="left.png").indexes()
    for named, numbered in zip((train, test), numbers, strict=True):
        assert class_numbers(named).values.tolist() == class_numbers(numbered).values.tolist()
    with pytest.raises(UserError, match="The label 'Bee' is not among the 9 classes that are given"):
        Labelled(*parts, image="left.png", classes=tuple(set(NAMES) - {"Bee"})).indexes()
    with pytest.raises(UserError, match="hold class 9, and 2 classes are given"):
        Labelled(*parts[:2], "json:about.number", image="left.png", classes=("a", "b")).indexes()


@pytest.mark.parametrize(
    "label, said",
    [
        ("json", "has fields; write json:about or json:site"),
        ("json:nothing", "has no field 'nothing' with a class in it"),
        ("txt:kind", "txt:kind names no field; write json:FIELD, or txt for the whole member"),
    ],
)
def test_what_names_no_class_is_refused(shards, label, said):
    with pytest.raises(UserError, match=said):
        Labelled(str(shards / "train.tar"), str(shards / "test.tar"), label, image="left.png").indexes()


def test_a_list_names_two_classes_alike_where_labels_are_numbers(shards, tmp_path, capsys):
    names = [*NAMES[:9], NAMES[0]]
    (tmp_path / "names").write_text("\n".join(names))
    command = ["knn", "pixels:8", "--train", str(shards / "train.tar"), "--test", str(shards / "test.tar")]
    command += ["--image", "left.png", "--num-workers", "0"]
    command += ["--classes", str(tmp_path / "names"), "--out", str(tmp_path / "out")]
    assert door(lambda: prelude.main([*command, "--label", "json:about.number"])) == 0, capsys.readouterr()
    (written,) = (tmp_path / "out").glob("*.json")
    assert json.loads(written.read_text())["data"]["classes"] == names
    assert door(lambda: prelude.main([*command, "--label", "json:about.kind"])) == 2
    told = capsys.readouterr().err
    assert "has the class 'zebra' more than once" in told and "keep every line" in told


def test_a_part_by_label_and_share(shards):
    parts = {"image": "left.png", "train_select": Selection(share=0.5),
             "test_select": Selection(label="json:site", values=("A",))}  # fmt: skip
    data, _ = judged(Labelled(str(shards / "train.tar"), str(shards / "test.tar"), "txt", **parts))
    assert data["train"]["num_samples"] == 30 and data["train"]["select"] == {"share": 0.5}
    assert data["test"]["num_samples"] == 16 and data["test"]["select"] == {"label": "json:site", "values": ("A",)}


def test_the_command_takes_all_of_it(folders, shards, tmp_path, capsys):
    (tmp_path / "names").write_text("\n".join(NAMES))
    command = ["knn", "pixels:8", "--train", str(shards / "train.tar"), "--test", str(shards / "test.tar"),
               "--label", "json:about.kind", "--image", "left.png", "--classes", str(tmp_path / "names"),
               "--test-select", "label=json:site", "--test-select", "values=[A]", "--out", str(tmp_path / "out"),
               "--num-workers", "0"]  # fmt: skip
    assert door(lambda: prelude.main(command)) == 0, capsys.readouterr()
    (written,) = (tmp_path / "out").glob("*.json")
    data = json.loads(written.read_text())["data"]
    assert data["classes"] == NAMES and data["test"]["num_samples"] == 16
    assert door(lambda: prelude.main([*command, "--train-select", "share=2"])) == 2
    assert "--train-select.share=2 is refused: write a number above 0 and below 1" in capsys.readouterr().err
