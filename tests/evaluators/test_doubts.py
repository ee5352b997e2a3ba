"""Where numbers would say nothing, or little: refused, or told with the result."""

import json
import os
import shutil
from functools import partial

import pytest
import torch

from prelude.checkpoints import sources as encoders
from prelude.data import progress
from prelude.data.errors import UserError
from prelude.data.shapes import write_shards
from prelude.data.shards import ShardIndex
from prelude.evaluators import judging
from prelude.evaluators.dense.global_shape import global_shape
from prelude.evaluators.dense.places import Places
from prelude.evaluators.dense.segmentation import segment_knn, segment_linear
from prelude.evaluators.features.extraction import Features
from prelude.evaluators.frozen.anomaly import anomaly
from prelude.evaluators.frozen.fewshot import fewshot
from prelude.evaluators.frozen.knn import knn
from prelude.evaluators.frozen.linear_probe import linear_probe
from prelude.evaluators.frozen.ncm import ncm
from prelude.evaluators.frozen.outliers import OTHER, outliers
from prelude.evaluators.frozen.retrieval import retrieval
from prelude.evaluators.frozen.svm import svm
from prelude.evaluators.judging import Judging, evaluate
from prelude.evaluators.labelled import Labelled, leaks, same_images
from prelude.launch import prelude
from prelude.launch.exit_codes import door


def drawn(labels, fingerprint="a", seed=0, **more) -> dict[str, Features]:
    """Features that know the class a little."""
    labels = torch.as_tensor(labels)
    noise = torch.randn(len(labels), 6, generator=torch.Generator().manual_seed(seed))
    values = noise + labels.clamp(0, 50)[:, None] * torch.arange(6.0) / 6
    return {"mean": Features(values, labels, torch.arange(len(labels)), fingerprint, "mean", **more)}


CLASSES = [0, 1, 2] * 20


@pytest.mark.parametrize("judge", [knn, linear_probe, ncm, partial(fewshot, shares=(), draws=1), svm])
def test_classes_that_train_lacks_are_missed_and_told_by_every_classifier(judge):
    strange = drawn([0, 1, 2] * 10 + [7, 9, 9], "b", 1)
    outcome, known = judge(drawn(CLASSES), strange), judge(drawn(CLASSES), drawn([0, 1, 2] * 10, "b", 1))
    told = "3 of 33 test images are of classes that train lacks (7, 9), and count as missed."
    assert told in outcome.warnings and not any("lacks" in warning for warning in known.warnings)
    if "top1" in outcome.numbers:
        assert outcome.numbers["top1"].value <= 100 * 30 / 33 + 1e-6


def test_more_neighbours_than_there_are_is_told():
    train, test = drawn(CLASSES), drawn(CLASSES, "b", 1)
    assert not knn(train, test, ks=(60,)).warnings
    assert "k=61 asks for more than the 60 train images" in knn(train, test, ks=(5, 61)).warnings[0]


# ---- retrieval


def test_a_gallery_in_which_every_answer_is_right_is_refused():
    one_class, two_images = drawn([3] * 30), drawn([3, 3])
    for gallery, queried in (
        (one_class, one_class),
        (one_class, drawn([3] * 5 + [4], "b")),
        (two_images, two_images),
        (drawn([0, 0, 1, 1], groups=torch.tensor([0, 0, 1, 1])), drawn([0, 1], "b", groups=torch.tensor([1, 0]))),
    ):
        with pytest.raises(UserError, match="each answer is right; write a gallery of two classes"):
            retrieval(gallery, queried)


def test_a_gallery_in_which_groups_leave_no_answer_is_refused_with_its_cause():
    images = drawn([0, 0, 1, 1], groups=torch.tensor([0, 0, 1, 1]))
    with pytest.raises(UserError, match="found in the gallery outside its own group; .* or leave --group out"):
        retrieval(images, images)
    with pytest.raises(UserError, match="found in the gallery; write shards with classes in common.$"):
        retrieval(drawn([0, 0]), drawn([1, 1], "b"))


def test_queries_that_cannot_fail_are_told():
    groups = torch.tensor([0] * 20 + [1] * 40)
    gallery = drawn([0] * 20 + [0, 1] * 20, groups=groups)
    gallery["mean"].labels[20:] = torch.tensor([1] * 40)
    queried = drawn([0] * 6 + [1] * 4, "b", groups=torch.tensor([1] * 6 + [2] * 4))
    assert "6 queries with nothing but images of the same class" in retrieval(gallery, queried).warnings[0]


@pytest.mark.parametrize("k", [59, 60, 1000])
def test_a_k_that_reaches_the_whole_gallery_is_refused(k):
    images = drawn(CLASSES)
    with pytest.raises(UserError, match=f"--k {k} is the whole gallery, in which a query finds 59 images"):
        retrieval(images, images, ks=(1, k))
    assert "recall@58" in retrieval(images, images, ks=(58,)).numbers


def test_usual_ks_are_those_that_the_gallery_has_room_for():
    outcome = retrieval(drawn([0, 1] * 3), drawn([0, 1] * 20, "b"))
    assert outcome.recipe["ks"] == [1, 5] and "recall@10" not in outcome.numbers


# ---- images of other kinds


def test_test_classes_that_nobody_named_as_others_are_told():
    train, test = drawn(CLASSES), drawn([0, 1, 2] * 8 + [5, 6] + [OTHER] * 9, "b", 1)
    for score in ("mahalanobis", "knn", "mixture"):
        (warning, *_) = outliers(train, test, score=score).warnings
        assert warning == "2 test images are of classes that train lacks (5, 6), and count as others."
        named = outliers(train, test, score=score, unknown=[5, 6])
        assert not any("lacks" in warning for warning in named.warnings)


def test_a_class_of_any_number_is_known():
    train, test = drawn([-1, 0] * 20), drawn([-1, 0] * 10 + [OTHER] * 5, "b", 1)
    assert outliers(train, test, score="knn").details == {
        "by_features": outliers(train, test, score="knn").by_kind, "num_others": 5, "num_known": 20,
    }  # fmt: skip


def test_a_neighbour_that_is_not_there_is_refused_and_a_usual_one_told():
    train, test = drawn(CLASSES[:30]), drawn([0, 1, 2, OTHER] * 6, "b", 1)
    with pytest.raises(UserError, match="--k 31 is more than the 30 known train images"):
        outliers(train, test, score="knn", k=31)
    outcome = outliers(train, test, score="knn")
    assert outcome.recipe["k"] == 30 and "the last one is meant and not neighbour 50" in outcome.warnings[0]
    assert outcome.numbers == outliers(train, test, score="knn", k=30).numbers
    without = outliers(train, test, score="knn", unknown=[2])
    assert without.recipe["k"] == 20


def test_other_doubts_of_others():
    train, test = drawn(CLASSES), drawn([0, 1, 2, OTHER] * 6, "b", 1)
    with pytest.raises(UserError, match="--unknown 4, 99 is no class of train or test"):
        outliers(train, test, score="knn", unknown=[1, 99, 4])
    single = drawn([0, 1, 2])
    for score in ("mahalanobis", "mixture"):
        with pytest.raises(UserError, match="Every class of train has one image only"):
            outliers(single, test, score=score)
    few = drawn([0] * 20 + [1] * 3 + [2] * 2)
    assert outliers(few, test, score="mixture").warnings == [
        "2 classes have fewer than 4 train images, and as many Gaussians as images at most."
    ]


def test_one_image_says_nothing_of_how_normal_ones_vary():
    train, test = drawn([0] * 9 + [1] * 9 + [2]), drawn(CLASSES, "b", 1)
    with pytest.raises(UserError, match="Class 2 has one train image"):
        anomaly(train, test, normal=[0, 2])
    assert list(anomaly(train, test).details["by_class"]) == [0, 1]


# ---- through the doors


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_shards(folder, "train", 60, image_size=16, samples_per_shard=20)
    write_shards(folder, "test", 24, image_size=16)
    write_shards(folder / "other", "test", 12, seed=1, image_size=16)
    write_shards(folder / "few", "test", 4, seed=2, image_size=16)
    return folder


def told(argv, capsys) -> str:
    assert door(lambda: prelude.main(argv)) == 2
    return capsys.readouterr().err


def test_others_are_recorded_and_counted_apart(shards, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["ood", "pixels:4", "--train", f"{shards}/train-*.tar", "--test", f"{shards}/test-*.tar"]
    argv += ["--num-workers", "0", "--bank", str(tmp_path / "bank")]
    others = f"{shards}/other/*.tar"
    assert prelude.main([*argv, "--others", others, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    found = [json.loads(path.read_text()) for path in out.glob("*.json")]
    assert len(found) == 3
    for one in found:
        assert one["data"]["others"]["shards"] == others
        assert one["data"]["others"]["num_samples"] == 12 and one["data"]["test"]["num_samples"] == 24
        assert one["data"]["others"]["fingerprint"] not in (one["data"]["test"]["fingerprint"], "")
        assert one["details"]["num_others"] == 12
    shared = [warning for warning in found[0]["warnings"] if all(warning in one["warnings"] for one in found)]
    assert all(shown.count(warning[:40]) == 1 for warning in shared)
    for side in ("test", "train"):
        words = told([*argv, "--others", f"{shards}/{side}-000000.tar"], capsys)
        assert f"--others holds images of --{side}" in words


def test_test_images_among_the_train_images_are_counted(shards):
    one = f"{shards}/train-000001.tar"
    (result,) = evaluate(["pixels:4"], [knn], Labelled(f"{shards}/train-*.tar", [one, f"{shards}/test-*.tar"], "cls"))
    assert "20 of 44 test images are train images too, and nothing new." in result.outcome.warnings
    (result,) = evaluate(["pixels:4"], [knn], Labelled(f"{shards}/train-*.tar", f"{shards}/few/*.tar", "cls"))
    assert result.outcome.warnings[0] == "4 test images are few: one of them alone is 25 points."


def test_images_of_a_folder_within_another_are_in_both(tmp_path):
    for name in ("val/cat/1.ppm", "val/dog/2.ppm", "val/dog/3.ppm", "cat/4.ppm", "dog/5.ppm"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"P6 2 2 255\n" + name.encode()[-5:-4] * 12)
    (tmp_path / "link").symlink_to(tmp_path / "photos" / "val")
    whole = ShardIndex(f"{tmp_path}/photos", "parent")
    for path in ("photos/val", "link"):
        part = ShardIndex(f"{tmp_path}/{path}", "parent")
        assert leaks(whole, part) == ["3 of 3 test images are train images too, and nothing new."]
        places = same_images(part, whole)
        assert [f"val/{part.key(i)}" for i in range(3)] == [whole.key(int(place)) for place in places]
    other = ShardIndex(f"{tmp_path}/photos/dog")
    assert leaks(ShardIndex(f"{tmp_path}/photos/val"), other) == [] and (same_images(other, whole) >= 0).all()


def test_a_query_among_the_gallery_does_not_find_itself(shards):
    """Its own image would be the nearest of all, and of its class."""
    one = f"{shards}/train-000001.tar"
    (result,) = evaluate(["pixels:4"], [retrieval], Labelled(f"{shards}/train-*.tar", one, "cls"))
    assert (
        result.outcome.numbers["recall@1"].value < 90 and "20 of 20 test images are train" in result.outcome.warnings[0]
    )
    both, alone = (
        Judging([retrieval], Labelled(f"{shards}/train-*.tar", test, "cls")).labels[1].same_as
        for test in ([one, f"{shards}/test-*.tar"], f"{shards}/test-*.tar")
    )
    assert alone is None and both.tolist() == [*range(20, 40), *[-1] * 24]


def test_few_images_are_told_of_shapes_too():
    images = torch.rand(3, 3, 8, 8)
    outcome = global_shape([(images, torch.arange(3))], lambda x: {"mean": x.flatten(1)}, tiles=(2,))
    assert outcome.warnings == ["3 test images are few: one of them alone is 33 points."]


@pytest.mark.parametrize("command", ["probe", "ood", "segment", "shape", "maps", "protocol"])
def test_a_source_that_is_none_is_told_before_another_is_judged(command, shards, tmp_path, monkeypatch, capsys):
    opened = []
    for module in (judging, encoders):
        monkeypatch.setattr(module, "open_encoder", lambda source, **_: opened.append(source))
    argv = ["timm:test_vit.r160_in1k", str(tmp_path / "nosuch"), "timm:test_resnet.r160_in1k"]
    if command == "maps":
        argv += ["--images", f"{shards}/test-*.tar", "--to", str(tmp_path / "a.png")]
    elif command == "shape":
        argv += ["--test", f"{shards}/test-*.tar"]
    else:
        argv += ["--train", f"{shards}/train-*.tar", "--test", f"{shards}/test-*.tar", "--num-workers", "0"]
    if command == "protocol":
        argv, command = [*argv, "--protocol", "mae"], "probe"
    assert "nosuch" in told([command, *argv], capsys) and not opened
    wrong = ["pixels:4", "pixels:0", *argv[3:]]
    expected = "pixels has no encoder" if command == "maps" else "'pixels:0' is no source"
    assert expected in told([command, *wrong], capsys)


def test_a_single_shard_has_no_rest(shards, capsys):
    for pattern, words in (
        (f"{shards}/test-*.tar", "test-000000.tar has a .json"),
        (f"{shards}/train-*.tar", "and the rest"),
    ):
        argv = ["retrieve", "pixels:4", "--leave-one-out", "--test", pattern, "--label", "json"]
        assert words in told(argv, capsys)


def test_what_cannot_be_read_is_named(shards, tmp_path, capsys):
    spoilt = str(shutil.copy(shards / "few" / "test-000000.tar", tmp_path / "spoilt.tar"))
    with open(spoilt, "r+b") as file:
        for offset, size in ShardIndex(spoilt).images[:].tolist():
            os.pwrite(file.fileno(), bytes(size), offset)
    bank = ["--bank", str(tmp_path / "bank"), "--num-workers", "0"]
    commands = {
        "knn": ["pixels:4", "--train", spoilt, "--test", spoilt, *bank],
        "shape": ["pixels:8", "--test", spoilt],
        "maps": ["random:timm:test_vit.r160_in1k", "--images", spoilt, "--to", str(tmp_path / "a.png")],
        "embed": ["pixels:4", spoilt, "--to", str(tmp_path / "a.npz"), *bank],
    }
    for command, argv in commands.items():
        assert f"None of the images in {spoilt} can be read" in told([command, *argv], capsys), command


def test_masks_without_a_pixel_that_counts_are_told_by_what_they_are(shards):
    def masked(*numbers):
        masks = torch.tensor(numbers, dtype=torch.uint8).repeat_interleave(16).view(-1, 4, 4)
        values = torch.randn(len(masks), 4 * 5, generator=torch.Generator().manual_seed(len(masks)))
        return {"tokens": Places(values, masks, torch.arange(len(masks)), "a", "tokens", {}, None, (2, 2))}

    for judge in (segment_linear, segment_knn):
        for train, test, words in (
            ((255, 255), (0, 1), "The train masks hold no pixel that counts"),
            ((0, 1), (255,), "The test masks hold no pixel that counts"),
            ((4, 4, 255), (0, 1), "The train masks hold class 4 only"),
        ):
            with pytest.raises(UserError, match=words):
                judge(masked(*train), masked(*test))
        outcome = judge(masked(0, 1, 0, 1), masked(0, 1, 5))
        assert "Test masks hold classes that train lacks (5), and each counts with an IoU of 0." in outcome.warnings
    assert (
        "k=99 asks for more than the 16 train patches"
        in segment_knn(masked(0, 1, 0, 1), masked(0, 1), k=99).warnings[0]
    )


def test_what_takes_long_says_how_far_it_is(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "AFTER_SECONDS", -1)
    argv = ["fewshot", "pixels:4", "--train", f"{shards}/train-*.tar", "--test", f"{shards}/test-*.tar"]
    argv += ["--num-workers", "0", "--out", str(tmp_path / "out"), "--draws", "2", "--per-class", "1", "2"]
    assert prelude.main([*argv, "--bank", str(tmp_path / "a")]) == 0
    assert "draws" not in capsys.readouterr().err  # where nobody looks
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert prelude.main([*argv, "--bank", str(tmp_path / "b")]) == 0
    told = capsys.readouterr().err
    assert "few-shot draws" in told and "4/4" in told and "encoding images" in told


# ---- what cannot be asked


def test_runs_that_read_pixels_by_two_ranges_are_not_shown_the_same_images(monkeypatch):
    ranges = [{"range": [0, 4095]}, {"range": None}, {"range": [0, 255]}]
    monkeypatch.setattr(judging, "sections_of", lambda sources, name: ranges[: len(sources)])
    assert judging.read_as(["a", "b"], None)[0] == [0, 4095]
    assert judging.read_as(["a", "b", "c"], (0, 9))[0] == (0, 9)
    with pytest.raises(UserError, match=r"differ in data.range \(\[0, 4095\] and \[0, 255\]\).*write --range LOW,HIGH"):
        judging.read_as(["a", "b", "c"], None)


def test_settings_that_have_no_answer_are_refused():
    train, test = drawn(CLASSES), drawn(CLASSES, "b", 1)
    with pytest.raises(UserError, match=r"weight_decays=\[-1.0\] must be 0 or more"):
        linear_probe(train, test, weight_decays=(-1.0,))
    for setting in ({"temperature": 0.0}, {"temperature": -1.0}, {"k": 0}):
        with pytest.raises(UserError, match="must be above 0; write k=20 and 0.07"):
            segment_knn({}, {}, **setting)


def test_a_quickstart_leaves_a_run_that_is_not_its_own_alone(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match="holds a run that quickstart has not made; write --run-dir"):
        prelude.main(["quickstart", "--run-dir", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_quickstart_with_another_seed_leaves_the_run_of_before_alone(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "shapes").mkdir()
    with pytest.raises(UserError, match="was made with --seed 0; write that seed, or --run-dir with another folder"):
        prelude.main(["quickstart", "--seed", "1", "--run-dir", str(tmp_path)])
    assert not list((tmp_path / "shapes").iterdir())
