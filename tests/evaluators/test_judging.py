import io
import json
import re
import statistics
import tarfile
from pathlib import Path

import pytest
import yaml

from prelude.checkpoints.sources import OpenedEncoder
from prelude.data.decode import MAX_PIXELS
from prelude.data.errors import UserError
from prelude.data.shapes import write_shards
from prelude.evaluators import judging as frozen
from prelude.evaluators.features.labels import VectorFormat
from prelude.evaluators.features.pixels import Pixels
from prelude.evaluators.frozen.knn import knn
from prelude.evaluators.frozen.linear_probe import linear_probe
from prelude.evaluators.judging import evaluate, labelled_shards, read_as, run_of, vector_format
from prelude.evaluators.labelled import Labelled
from prelude.launch import knn as knn_door
from prelude.launch import prelude
from prelude.launch.exit_codes import door


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_shards(folder, "train", 120, image_size=16, samples_per_shard=60)
    write_shards(folder, "test", 60, image_size=16)
    return Labelled(f"{folder}/train-*.tar", f"{folder}/test-*.tar", "cls")


@pytest.fixture
def run(tmp_path, shapes):
    """What a run leaves, as far as an evaluation looks at it."""
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step-00000010").mkdir(parents=True)
    (folder / "export").mkdir()
    section = {"train_shards": shapes.train, "test_shards": shapes.test}
    (folder / "config.yaml").write_text(yaml.safe_dump({"run_dir": str(folder), "evaluate": section}))
    return folder


@pytest.fixture
def any_encoder(monkeypatch):
    """Every source opens as small pixels under its own name; opening is tested elsewhere."""

    def opened(source, *, seed=0):
        small = frozen.open_pixels("pixels:8")
        return OpenedEncoder(small.model, small.config, small.mean, small.std, f"encoder {source}", f"{source} {seed}")

    monkeypatch.setattr(frozen, "open_encoder", opened)
    monkeypatch.setattr(frozen, "describe", lambda source: None)


def test_one_table_of_every_source_by_every_evaluator(shapes):
    said = []
    results = evaluate(["pixels:8", "pixels:4"], [knn, linear_probe], shapes, say=said.append)
    assert [(r.source, r.outcome.evaluator) for r in results] == [
        ("pixels:8", "knn"),
        ("pixels:8", "linear_probe"),
        ("pixels:4", "knn"),
        ("pixels:4", "linear_probe"),
    ]
    assert all(r.data["train"]["num_samples"] == 120 and r.data["test"]["num_samples"] == 60 for r in results)
    assert "120 train and 60 test images" in said[0]


@pytest.mark.parametrize("evaluator", [knn, linear_probe])
def test_features_that_are_no_numbers_are_refused_with_their_image(evaluator, shapes, tmp_path, monkeypatch):
    def broken(self, pixels):
        values = pixels.flatten(1).float()
        values[100:101] = float("nan")  # of one batch of all
        return values

    monkeypatch.setattr(Pixels, "forward", broken)
    with pytest.raises(UserError, match=r"The pixels features of train-000100 in .*train-000001.tar are not finite"):
        evaluate(["pixels:8"], [evaluator], shapes, bank=tmp_path)


def test_an_untrained_encoder_goes_the_whole_way(shapes):
    (result,) = evaluate(["random:timm:test_vit.r160_in1k"], [knn], shapes, kinds=["cls"], seed=1)
    assert result.outcome.chosen["features"] == "cls"
    assert result.features["view"]["size"] == (160, 160)


def test_seeds_give_a_mean_and_a_spread(shapes):
    alone = [evaluate(["pixels:4"], [linear_probe], shapes, seed=seed)[0].outcome for seed in (3, 4, 5)]
    (together,) = evaluate(["pixels:4"], [linear_probe], shapes, seed=3, num_seeds=3)
    values = [outcome.numbers["top1"].value for outcome in alone]
    found = together.outcome.numbers["top1"]
    assert found.value == pytest.approx(statistics.mean(values)) and found.spread == statistics.stdev(values)
    assert together.outcome.recipe["seeds"] == [3, 4, 5]
    assert {s: o["chosen"] for s, o in together.outcome.details["by_seed"].items()} == dict(
        zip((3, 4, 5), (o.chosen for o in alone), strict=True)
    )


def test_seeds_draw_untrained_encoders_anew(shapes):
    (result,) = evaluate(["random:timm:test_vit.r160_in1k"], [knn], shapes, kinds=["cls"], num_seeds=2)
    first, second = (found["numbers"]["top1"] for found in result.outcome.details["by_seed"].values())
    assert first != second


def test_images_without_a_label_are_left_out_and_told(shapes, tmp_path):
    parts = []
    for name, source in (("train", shapes.train), ("test", shapes.test)):
        (path, *_) = sorted(Path(source).parent.glob(Path(source).name))
        kept = tmp_path / f"{name}.tar"
        with tarfile.open(path) as old, tarfile.open(kept, "w", format=tarfile.USTAR_FORMAT) as new:
            for member in old:
                spoilt = member.name.endswith("7.cls")
                content = b"seven" if spoilt else old.extractfile(member).read()
                member.size = len(content)
                new.addfile(member, io.BytesIO(content))
        parts.append(str(kept))
    (result,) = evaluate(["pixels:4"], [knn], Labelled(*parts, "cls"))
    assert result.data["train"] | {"shards": 0, "fingerprint": 0} == {
        "shards": 0, "fingerprint": 0, "num_samples": 54, "num_unreadable": 0, "num_unlabelled": 6,
    }  # fmt: skip
    assert "6 of 60 train images left out, without a label." in result.outcome.warnings


def test_results_of_a_run_and_of_the_floors_beside_it_lie_in_the_run(run, any_encoder):
    sources = ["pixels", str(run), f"random:{run}"]
    evaluate(sources, [knn], labelled_shards(sources), seed=5, command="prelude knn")
    written = [json.loads(path.read_text()) for path in (run / "evaluations").iterdir()]
    assert {found["source"] for found in written} == set(sources)
    (of_run,) = [found for found in written if found["source"] == str(run)]
    assert of_run["encoder"]["fingerprint"] == f"{run} 5" and of_run["recipe"]["seed"] == 5
    assert of_run["data"]["train"]["fingerprint"] != of_run["data"]["test"]["fingerprint"]
    assert of_run["command"] == "prelude knn"
    evaluate(sources, [knn], labelled_shards(sources), seed=5)
    assert len(list((run / "evaluations").iterdir())) == 3  # the same evaluation overwrites its own file


def test_the_run_of_a_source_is_found_from_its_parts(run, tmp_path):
    for source in (run, run / "checkpoints" / "step-00000010", run / "export", f"random:{run}"):
        assert run_of(str(source)) == run
    for source in ("pixels:8", "timm:resnet18", str(tmp_path)):
        assert run_of(source) is None


def test_what_is_given_goes_before_what_the_run_says(run, shapes):
    assert labelled_shards([str(run)]) == shapes
    assert labelled_shards([str(run)], test="other.tar", label="json") == Labelled(shapes.train, "other.tar", "json")
    with pytest.raises(UserError, match="--train SHARDS and --test SHARDS"):
        labelled_shards(["timm:resnet18"])
    with pytest.raises(UserError, match="write --test SHARDS"):
        labelled_shards(["timm:resnet18"], train="a.tar")


def test_an_encoder_is_judged_on_images_as_large_as_its_run_took(run):
    """Who says nothing of it, as runs of before, takes the limit of today."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    for data, limit in ({}, MAX_PIXELS), ({"max_pixels": 1000}, 1000):
        (run / "config.yaml").write_text(yaml.safe_dump(config | {"data": data}))
        assert read_as(["pixels:8", str(run)], (0, 255)) == ((0, 255), limit, None)
        assert [index.max_pixels for index in labelled_shards(["pixels:8", str(run)]).indexes()] == [limit, limit]


def test_shards_that_cannot_be_opened_are_told_as_they_were_given(run, shapes, tmp_path):
    absent = str(tmp_path / "no-*.tar")

    def refused(labelled) -> str:
        with pytest.raises(UserError) as told:
            labelled.indexes()
        return str(told.value)

    given = labelled_shards(["pixels:4"], train=absent, test=shapes.test)
    assert refused(given).endswith(f"correct --train {absent!r}.")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["evaluate"] |= {"test_shards": absent}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    told = refused(labelled_shards([str(run)], train=shapes.train))
    assert told.endswith(f"correct evaluate.test_shards={absent!r}, or write --test SHARDS.")
    given = labelled_shards(["pixels:4"], train=shapes.train, test=shapes.test, image="up.jpg")
    told = refused(given)
    assert "--test " in told and told.endswith("correct --image, or leave it out.")


def test_testing_on_the_training_shards_is_told(shapes):
    (result,) = evaluate(["pixels:4"], [knn], Labelled(shapes.train, shapes.train, "cls"))
    assert any("same shards" in warning for warning in result.outcome.warnings)


@pytest.mark.parametrize(
    ("command", "evaluator", "settings"),
    [
        ("knn", "knn", ["--k", "5", "20"]),
        ("probe", "linear_probe", ["--norm", "batch", "none"]),
        ("probe", "linear_probe_barlow_twins", ["--protocol", "barlow_twins", "--epochs", "1", "--global-batch", "60"]),
        ("ncm", "ncm", ["--tasks", "3"]),
        ("fewshot", "fewshot", ["--per-class", "2", "--draws", "2"]),
        ("anomaly", "anomaly", ["--normal", "3"]),
        ("retrieve", "retrieval", ["--k", "1", "20"]),
        ("svm", "svm", ["--c", "1", "10", "--crops", "3"]),
    ],
)
def test_the_doors(command, evaluator, settings, shapes, tmp_path, capsys):
    argv = ["pixels:4", "--train", shapes.train, "--test", shapes.test, "--num-workers", "0"]
    argv += ["--out", str(tmp_path / "out"), "--bank", str(tmp_path / "bank"), *settings]
    assert prelude.main([command, *argv]) == 0
    (path,) = (tmp_path / "out").glob("*.json")
    found = json.loads(path.read_text())
    assert found["evaluator"] == evaluator
    assert found["command"].startswith(f"prelude {command} pixels:4 --train")
    assert "pixels 4x4" in capsys.readouterr().out
    assert prelude.main(["bank", str(tmp_path / "bank"), "--clear"]) == 0
    assert "2 entries" in capsys.readouterr().out and not list((tmp_path / "bank").iterdir())


def test_test_images_are_looked_for_among_themselves(shapes, tmp_path, capsys):
    argv = ["retrieve", "pixels:4", "--test", shapes.test, "--num-workers", "0", "--out", str(tmp_path)]
    assert prelude.main([*argv, "--leave-one-out"]) == 0
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert found["recipe"]["leave_one_out"] and found["data"]["train"] == found["data"]["test"]
    assert found["warnings"] == [] and found["numbers"]["recall@1"]["value"] < 60
    for wrong, told in ((["--train", shapes.train, "--leave-one-out"], "leave --train out"), ([], "write --train")):
        assert door(lambda wrong=wrong: prelude.main([*argv, *wrong])) == 2
        assert told in capsys.readouterr().err


def bright_and_dark(path, patients=True) -> str:
    """A shard of findings; patients: whether it names them, of two images each."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(40):
            findings = {"labels": [["dark"], [], ["bright", "even"]][i % 3]} | ({"patient": i // 2} if patients else {})
            pixels = b"P6 8 8 255\n" + bytes([i % 3 * 100 + i]) * 192
            for member, content in ((f"{i}.ppm", pixels), (f"{i}.json", json.dumps(findings).encode())):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


def test_the_door_to_several_findings(tmp_path, capsys):
    train, test = (bright_and_dark(tmp_path / name) for name in ("a.tar", "b.tar"))
    argv = ["pixels:4", "--train", train, "--test", test, "--num-workers", "0"]
    argv += ["--out", str(tmp_path / "out"), "--field", "labels", "--group", "patient"]
    assert prelude.main(["multilabel", *argv, "--names", "bright", "dark"]) == 0
    (path,) = (tmp_path / "out").glob("*.json")
    found = json.loads(path.read_text())
    assert found["recipe"]["names"] == ["bright", "dark"] and found["recipe"]["grouped"]
    assert found["numbers"]["auc"]["value"] > 95 and len(found["numbers"]["auc"]["interval"]) == 2
    assert "macro AUC %" in capsys.readouterr().out
    machines = [word for word in argv if word not in ("--group", "patient")] + ["--names", "bright", "dark", "--c", "1"]
    assert prelude.main(["svm", *machines]) == 0
    (path,) = (tmp_path / "out").glob("svm-*.json")
    found = json.loads(path.read_text())
    assert set(found["numbers"]) == {"map"} and found["numbers"]["map"]["value"] > 90
    assert found["data"]["names"] == ["bright", "dark"] and found["data"]["field"] == "labels"
    other = ["dark" if word == "bright" else "even" if word == "dark" else word for word in machines]
    assert prelude.main(["svm", *other]) == 0
    assert len(list((tmp_path / "out").glob("svm-*.json"))) == 2 and path.is_file()  # other findings are another result
    assert found["data"]["label"] == "json" and found["data"]["test"]["num_samples"] == 40
    assert door(lambda: prelude.main(["multilabel", *argv])) == 2
    assert "--names" in capsys.readouterr().err


def test_images_that_lack_the_patients_of_a_run_are_judged_one_by_one_unless_they_are_asked_for(
    run, any_encoder, tmp_path, capsys
):
    config = yaml.safe_load((run / "config.yaml").read_text())
    findings = {"label": "json", "label_names": ["bright", "dark"], "label_field": "labels", "label_group": "patient"}
    config["evaluate"] |= findings
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    train, test = bright_and_dark(tmp_path / "a.tar"), bright_and_dark(tmp_path / "b.tar", patients=False)
    argv = ["multilabel", str(run), "--train", train, "--test", test, "--num-workers", "0", "--out", str(tmp_path)]
    assert prelude.main(argv) == 0
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert found["recipe"]["grouped"] and [warning for warning in found["warnings"] if "patient" in warning] == [
        "No test image has a field 'patient' in a .json member, so each counts as a group of its own."
    ]
    machines = ["svm", *argv[1:], "--names", "bright", "dark", "--c", "1"]
    assert prelude.main(machines) == 0
    (path,) = tmp_path.glob("svm-*.json")
    judged = json.loads(path.read_text())
    assert judged["recipe"]["grouped"] and judged["data"]["group"] == "patient"
    assert [told for told in judged["warnings"] if "patient" in told] == [
        told for told in found["warnings"] if "patient" in told
    ]
    assert door(lambda: prelude.main([*argv, "--group", "patient"])) == 2
    assert "no sample in" in (told := capsys.readouterr().err) and "has a field 'patient'" in told


def test_classes_of_a_run_are_those_of_its_label(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["evaluate"] |= {"label": "txt", "classes": ["cat", "dog"]}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert labelled_shards([str(run)]).classes == labelled_shards([str(run)], label="txt").classes == ("cat", "dog")
    assert labelled_shards([str(run)], label="png").classes == ()
    assert labelled_shards([str(run)], label="png", classes=["ground"]).classes == ("ground",)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"evaluate": {"test_shards": "x", "typo": 3}}, "evaluate.train_shards is missing: write a path or pattern"),
        ({"evaluate": {"train_shards": "x", "test_shards": "x", "lable": "a"}}, "did you mean evaluate.label?"),
        ({"evaluate": True}, "evaluate=true is refused: write settings below it"),
        ({"data": [1]}, "data=[1] is refused: write settings below it"),
        ({"data": {"range": 5}}, "data.range=5 is refused: write a list of 2 numbers"),
        ({"data": {"range": [9, 1]}}, "data.range=[9, 1] is refused: write [low, high] with low below high"),
        ({"data": {"max_pixels": "many"}}, "data.max_pixels='many' is refused: write a whole number of 1 or more"),
    ],
)
def test_a_mistake_in_a_section_of_a_run_or_a_recipe_is_told_in_a_sentence(changes, told, run, capsys):
    config = yaml.safe_load((run / "config.yaml").read_text()) | changes
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for source in (run, run / "config.yaml"):
        with pytest.raises(UserError, match=rf"^{run}/config.yaml has a mistake: .*{re.escape(told)}"):
            labelled_shards([str(source)], "a.tar", "b.tar")


def test_a_data_section_is_looked_at_no_further_than_it_is_read(run):
    """One of before may have keys that are gone, and says nothing of channels that it has other means of."""
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"data": {"channels": 5, "gone": 1}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert labelled_shards([str(run)]).channels == 5


def test_a_field_alone_asks_for_the_findings_of_the_run(run, capsys):
    assert door(lambda: prelude.main(["svm", str(run), "--field", "labels", "--label", "json"])) == 2
    assert "have no names; write --names" in capsys.readouterr().err


def test_the_same_weights_that_compute_something_else_are_another_result(shapes, tmp_path, monkeypatch):
    small = frozen.open_pixels("pixels:8")
    with_heads = {}
    for heads in (1, 2):
        model = type(small.model)()
        model.num_heads = heads
        with_heads[f"w#{heads}"] = OpenedEncoder(model, small.config, small.mean, small.std, "w", "the same weights")
    monkeypatch.setattr(frozen, "open_encoder", lambda source, seed=0: with_heads[source])
    monkeypatch.setattr(frozen, "describe", lambda source: None)
    evaluate(list(with_heads), [knn], shapes, out=tmp_path / "out", bank=tmp_path / "bank")
    found = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    assert sorted(each["source"] for each in found) == ["w#1", "w#2"]
    assert len({each["encoder"]["computation"] for each in found}) == 2


def test_a_run_says_where_its_findings_are_written(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["evaluate"] |= {
        "label": "json",
        "label_names": ["a", "b"],
        "label_field": "labels",
        "label_group": "patient",
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert vector_format([str(run)]) == VectorFormat(("a", "b"), "labels", "patient", group_asked=False)
    assert vector_format([str(run)], group="patient") == VectorFormat(("a", "b"), "labels", "patient")
    assert vector_format([str(run)], ["c"], "", "") == VectorFormat(("c",))
    assert labelled_shards([str(run)], vectors=VectorFormat(("c",))).label == "json"


def test_settings_without_effect_are_refused(shapes, capsys):
    argv = ["pixels:4", "--train", shapes.train, "--test", shapes.test]
    for wrong, told in (
        (["--epochs", "3"], "--epochs has no effect"),
        (["--features", "last4"], "--features has no effect on pixels"),
        (["--protocol", "mae", "--norm", "none"], "--norm is the protocol's"),
    ):
        assert door(lambda wrong=wrong: prelude.main(["probe", *argv, *wrong])) == 2
        assert told in capsys.readouterr().err


def test_a_mistake_is_told_in_a_sentence(capsys):
    assert door(lambda: knn_door.main(["pixels", "--train", "a.tar", "--test", "b.tar"])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
