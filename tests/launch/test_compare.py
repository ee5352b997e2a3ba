"""A whole comparison of two tiny objectives by their recipes: trained, judged, written, and gone through again."""

import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import yaml
from runs import BIN, ROOT, deepspeed

from prelude.data.errors import OTHER_FOLDER, UserError
from prelude.data.select import Selection
from prelude.data.shape_volumes import write_volumes
from prelude.data.shapes import write_shards
from prelude.evaluators.features.labels import VectorFormat
from prelude.evaluators.frozen import knn, ncm
from prelude.evaluators.frozen.multilabel import multilabel
from prelude.evaluators.judging import Judging
from prelude.evaluators.labelled import Labelled
from prelude.launch import compare, compared_runs, comparing, prelude
from prelude.launch.exit_codes import INCOMPLETE, door
from prelude.objectives import options_for
from prelude.pretrain.recipes import load_config

NUM_IMAGES = 64


@pytest.fixture(scope="session")
def folder(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    write_shards(folder, "train", 120, seed=1, image_size=16)
    write_shards(folder, "test", 60, seed=1, image_size=16)
    mae = yaml.safe_load(recipe.read_text())
    mae["data"]["shards"] = "replaced.tar"
    mae["log"] = {"every_steps": 1, "pictures_every_steps": 4}
    (folder / "filling.yaml").write_text(yaml.safe_dump(mae))
    further = mae | {"encoder": mae["encoder"] | {"weights": str(folder / "out" / "runs" / "filling")}}
    (folder / "further.yaml").write_text(yaml.safe_dump(further))
    write_shards(folder / "old", "train", 90, seed=2, image_size=16)
    write_shards(folder / "old", "test", 45, seed=2, image_size=16)
    kwargs = {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8], "stem_width": 4}
    rotation = mae | {
        "objective": {"name": "rotation", "crop_scale": None},
        "encoder": {"name": "resnet18", "image_size": 32, "kwargs": kwargs},
    }
    parts = {"one": {"shards": "replaced.tar", "weight": 2}, "other": {"shards": "replaced.tar"}}
    rotation["data"] = {key: value for key, value in mae["data"].items() if key != "shards"} | {"mix": parts}
    (folder / "turning.yaml").write_text(yaml.safe_dump(rotation))
    return folder


def argv_of(folder, *sources: str) -> list[str]:
    argv = [*sources, "--train", f"{folder}/train-*.tar", "--test", f"{folder}/test-*.tar", "--num-workers", "0"]
    return [*argv, "--evaluators", "knn", "ncm", "--out", f"{folder}/out"]


@pytest.fixture(scope="session")
def command(folder) -> list[str]:
    recipes = [str(folder / "filling.yaml"), str(folder / "turning.yaml")]
    return [*argv_of(folder, *recipes, str(folder / "nothing")), "--images", str(NUM_IMAGES)]


@pytest.fixture(scope="session")
def first(command, folder):
    """(exit code, comparison) of the command that trains."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRELUDE_CACHE", str(folder / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        code = prelude.main(["compare", *command])
    return code, json.loads((folder / "out" / "comparison.json").read_text())


def test_every_objective_gets_the_same_number_of_images(first, folder):
    _, comparison = first
    trained = {entry["name"]: entry for entry in comparison["entries"] if entry["cost"]}
    assert {name: entry["cost"]["num_images"] for name, entry in trained.items()} == {"filling": 64, "turning": 64}
    for name in trained:
        config = yaml.safe_load((folder / "out" / "runs" / name / "config.yaml").read_text())
        assert config["train"]["epochs"] == pytest.approx(64 / 120)
        assert config["optimizer"]["warmup_epochs"] == pytest.approx(0.5 * (64 / 120) / 3)  # its share of the run
        assert config["data"]["shards"] == f"{folder}/train-*.tar"


def test_each_stands_beside_its_floors_with_results_of_every_evaluator(first, folder):
    _, comparison = first
    entries = {entry["name"]: entry for entry in comparison["entries"]}
    assert {name: entry["kind"] for name, entry in entries.items()} == {
        "filling": "pretrained",
        "turning": "pretrained",
        "nothing": "pretrained",
        "random:filling": "untrained",
        "random:turning": "untrained",
        "pixels 16x16": "floor",
        "pixels 32x32": "floor",
    }
    assert entries["filling"]["untrained"] == "random:filling"
    assert [entries[name]["objective"] for name in ("filling", "turning")] == ["mae", "rotation"]
    for name, entry in entries.items():
        if name != "nothing":
            assert list(entry["results"]) == comparison["evaluators"] == ["knn", "ncm"]
    assert set(entries["turning"]["results"]["ncm"]["details"]["by_features"]) == {"pool", "stages"}
    assert set(entries["filling"]["results"]["ncm"]["details"]["by_features"]) == {"cls", "mean", "last2"}
    assert [picture["title"] for picture in entries["filling"]["pictures"]] == [
        "reconstruction",
        "Nearest neighbours",
        "Where it looks",
        "What it takes for alike",
    ]
    assert entries["filling"]["cost"]["peak_memory"] > 2**26
    assert list((folder / "out" / "runs" / "filling" / "evaluations").glob("ncm-filling*.json"))


def test_a_source_that_cannot_be_had_keeps_nobody_from_being_judged(first):
    code, comparison = first
    (broken,) = [entry for entry in comparison["entries"] if entry["problem"]]
    assert broken["name"] == "nothing" and "There is no folder" in broken["problem"]
    assert code == INCOMPLETE


def test_what_cannot_be_had_is_told_before_the_hours_of_pretraining(command, folder, monkeypatch, capsys):
    def begun(*_):
        raise UserError("Pretraining has begun.")

    monkeypatch.setattr(comparing, "named_runs", begun)
    with pytest.raises(UserError, match="Pretraining has begun."):
        prelude.main(["compare", *command, "spark_resnet18_cifar"])
    told = capsys.readouterr().err
    assert f"{folder}/nothing will not be judged: There is no folder {folder}/nothing" in told
    assert "spark_resnet18_cifar will not be judged: Did you mean the recipe spark_resnet18_cifar10? There is" in told


def test_where_none_was_judged_an_earlier_comparison_is_kept(folder, tmp_path, capsys):
    argv = ["compare", f"{folder}/nothing", "--no-floors", "--out", str(tmp_path / "out")]
    argv += ["--train", f"{folder}/train-*.tar", "--test", f"{folder}/test-*.tar"]
    assert prelude.main(argv) == INCOMPLETE and (tmp_path / "out" / "table.md").exists()  # there was none
    (tmp_path / "out" / "comparison.json").write_text("of hours")
    assert prelude.main(argv) == INCOMPLETE
    assert (tmp_path / "out" / "comparison.json").read_text() == "of hours"
    assert "none was judged, so the earlier comparison" in capsys.readouterr().err


def test_a_table_and_a_page_are_written(first, folder):
    table = (folder / "out" / "table.md").read_text()
    assert "| filling | mae |" in table and "- filling: vit_tiny_patch16_224 at 16 px (patch 4" in table
    assert "There is no folder" in table and "prelude compare" in table
    assert (folder / "out" / "report.html").read_text().startswith("<!doctype html>")


def test_the_same_command_trains_nothing_and_finds_the_same_numbers(first, command, folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something was trained again")

    monkeypatch.setenv("PRELUDE_CACHE", str(folder / "cache"))
    monkeypatch.setattr(compared_runs, "run_door", refuse)
    monkeypatch.setattr(knn, "classify", refuse)  # nor is anything fitted
    monkeypatch.setattr(ncm, "class_means", refuse)
    assert prelude.main(["compare", *command]) == INCOMPLETE
    again = json.loads((folder / "out" / "comparison.json").read_text())

    def numbers(comparison):
        return {(e["name"], n): r["numbers"] for e in comparison["entries"] for n, r in e["results"].items()}

    assert len(numbers(again)) == 12 and numbers(again) == numbers(first[1])


def test_another_budget_is_not_mistaken_for_the_finished_run(first, command, folder, monkeypatch):
    asked = []

    def fail(door, arguments, *, num_ranks, name, environment):
        assert environment == {OTHER_FOLDER: "another --out"}
        asked.append((door, name, num_ranks, "seed=5" in arguments))
        return "it has other settings."

    monkeypatch.setenv("PRELUDE_CACHE", str(folder / "cache"))
    monkeypatch.setattr(compared_runs, "run_door", fail)
    out = folder / "other"
    shutil.copytree(folder / "out" / "runs", out / "runs")
    changes = ["--out", str(out), "--no-floors", "--ranks", "3", "--set", "seed=5"]
    code = prelude.main(["compare", *command[:-1], "96", *changes])
    comparison = json.loads((out / "comparison.json").read_text())
    assert asked == [("pretrain", "filling", 3, True), ("pretrain", "turning", 3, True)] and code == INCOMPLETE
    assert len(comparison["entries"]) == 3  # without floors
    assert comparison["entries"][0]["problem"] == "Pretraining failed: it has other settings."


def test_a_recipe_is_pretrained_with_several_seeds_and_what_is_finished_counts(first, folder, monkeypatch):
    monkeypatch.setenv("PRELUDE_CACHE", str(folder / "cache"))
    out = folder / "seeds"
    shutil.copytree(folder / "out" / "runs" / "filling", out / "runs" / "filling")
    argv = [*argv_of(folder, str(folder / "filling.yaml"), f"{folder}/out/runs/turning"), "--no-floors"]
    argv += ["--images", str(NUM_IMAGES), "--pretraining-seeds", "2", "--out", str(out)]
    asked, run_door = [], compared_runs.run_door

    def train(*arguments, name, **settings):
        asked.append(name)
        return run_door(*arguments, name=name, **settings)

    monkeypatch.setattr(compared_runs, "run_door", train)
    assert prelude.main(["compare", *argv]) == 0 and asked == ["filling-seed1"]
    comparison = json.loads((out / "comparison.json").read_text())
    filling, turning = comparison["entries"]
    assert filling["name"] == "filling"
    assert [each["name"] for each in filling["repeats"]] == ["filling", "filling-seed1"]
    each = [repeat["numbers"]["knn"]["top1"]["value"] for repeat in filling["repeats"]]
    found = filling["results"]["knn"]["numbers"]["top1"]
    assert found["value"] == pytest.approx(sum(each) / 2) and found["seeds"] == pytest.approx(
        abs(each[0] - each[1]) / 2**0.5
    )
    assert [(pair["evaluator"], pair["num_images"], pair["num_seeds"]) for pair in comparison["pairs"]] == [
        ("knn", 60, [2, 1]), ("ncm", 60, [2, 1])]  # fmt: skip
    assert found["value"] - turning["results"]["knn"]["numbers"]["top1"]["value"] == pytest.approx(
        comparison["pairs"][0]["points"]
    )
    table = (out / "table.md").read_text()
    assert ", seeds ± " in table and "told apart" in table and "The encoders differ" in table


# ---- what going on from weights has won and lost


def keep(folder) -> list[str]:
    return ["--keep", f"{folder}/old/train-*.tar", f"{folder}/old/test-*.tar"]


@pytest.fixture(scope="session")
def gone_on(first, folder):
    """(exit code, comparison) of the command that goes on from `filling`, and asks what was kept."""
    argv = argv_of(folder, str(folder / "further.yaml"), str(folder / "out" / "runs" / "turning"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRELUDE_CACHE", str(folder / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        out = folder / "further"
        code = prelude.main(["compare", *argv, *keep(folder), "--images", "64", "--no-floors", "--out", str(out)])
    return code, json.loads((out / "comparison.json").read_text())


def judged(folder, *argv: str) -> tuple[int, dict[str, dict]]:
    """Exit code, and entries by name, without anything to train."""
    code = prelude.main(["compare", *argv_of(folder, *argv), *keep(folder), "--no-floors", "--out", f"{folder}/again"])
    comparison = json.loads((folder / "again" / "comparison.json").read_text())
    return code, {entry["name"]: entry for entry in comparison["entries"]}


def test_what_a_run_started_from_is_judged_untouched_on_both_data_sets(gone_on, first):
    code, comparison = gone_on
    entries = {entry["name"]: entry for entry in comparison["entries"]}
    assert {name: (entry["kind"], entry["started"]) for name, entry in entries.items()} == {
        "further": ("pretrained", "untouched filling"),
        "turning": ("pretrained", None),
        "untouched filling": ("untouched", None),
    }
    before = {entry["name"]: entry for entry in first[1]["entries"]}["filling"]
    untouched = entries["untouched filling"]
    for evaluator in ("knn", "ncm"):  # on the new images it is what the run itself was judged to be
        assert untouched["results"][evaluator]["by_kind"] == before["results"][evaluator]["by_kind"]
    assert all(list(entry["kept"]) == ["knn", "ncm"] for entry in entries.values()) and code == 0
    sizes = [comparison[data]["train"]["num_samples"] for data in ("data", "old_data")]
    assert sizes == [120, 90] and entries["further"]["kept"]["knn"]["data"] == comparison["old_data"]


def test_the_table_and_the_page_ask_what_was_won_and_lost(gone_on, folder):
    table = (folder / "further" / "table.md").read_text()
    (row,) = [line for line in table.splitlines() if line.startswith("| further | untouched filling |")]
    assert row.count(" → ") == 4 and "k-NN, top-1 %, old images" in table
    assert 'id="going-on"' in (folder / "further" / "report.html").read_text()


def numbers_of(entries: list[dict], side: str) -> dict:
    return {(entry["name"], name): found["numbers"] for entry in entries for name, found in entry[side].items()}


def test_two_ranks_find_what_one_did(gone_on, folder):
    """Through the real launcher: features are taken by both, into a bank of their own."""
    sources = [f"{folder}/further/runs/further", f"{folder}/out/runs/turning"]
    argv = [*argv_of(folder, *sources), *keep(folder), "--no-floors"]
    argv += ["--out", f"{folder}/ranks", "--bank", f"{folder}/ranks/bank"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    command = [*deepspeed(2), str(ROOT / "launch" / "compare.py"), *argv]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    entries = json.loads((folder / "ranks" / "comparison.json").read_text())["entries"]
    for side in ("results", "kept"):
        found = numbers_of(entries, side)
        assert found == numbers_of(gone_on[1]["entries"], side) and len(found) == 6
    assert len(list((folder / "ranks" / "bank").iterdir())) >= 12  # of three encoders on four sets of images


def test_several_findings_an_image_are_gone_on_to_from_images_of_one_class_each(gone_on, folder, monkeypatch):
    monkeypatch.setenv("PRELUDE_CACHE", str(folder / "cache"))
    places = []
    for split in ("train", "test"):
        places += [f"--{split}", f"{folder}/findings-{split}.tar"]
        with tarfile.open(folder / f"{split}-000000.tar") as given, tarfile.open(places[-1], "w") as written:
            for member in given:
                content = given.extractfile(member).read()
                if member.name.endswith(".cls"):
                    number = int(content)
                    found = [name for name, of in (("lines", range(4)), ("round", (4, 8, 9))) if number in of]
                    member.name, content = f"{member.name[:-3]}json", json.dumps(found).encode()
                    member.size = len(content)
                written.addfile(member, io.BytesIO(content))
    argv = [
        f"{folder}/further/runs/further",
        *places,
        "--names",
        "lines",
        "round",
        *keep(folder),
        "--evaluators",
        "knn",
        "ncm",
    ]
    out = folder / "findings"
    assert prelude.main(["compare", *argv, "--no-floors", "--num-workers", "0", "--out", str(out)]) == 0
    comparison = json.loads((out / "comparison.json").read_text())
    assert [(list(each["results"]), list(each["kept"])) for each in comparison["entries"]] == [
        (["multilabel"], ["knn", "ncm"])
    ] * 2
    (row,) = [line for line in (out / "table.md").read_text().splitlines() if line.startswith("| further | untouched")]
    assert row.count(" → ") == 3
    assert 'id="going-on"' in (out / "report.html").read_text()


def test_a_source_that_is_gone_leaves_a_gap_and_one_that_was_moved_is_found_by_its_weights(
    gone_on, folder, monkeypatch, capsys
):
    monkeypatch.setenv("PRELUDE_CACHE", str(folder / "cache"))
    source, moved, further = folder / "out" / "runs" / "filling", folder / "moved", f"{folder}/further/runs/further"
    source.rename(moved)
    try:
        code, entries = judged(folder, further)
        untouched = entries["untouched filling"]
        assert code == INCOMPLETE and untouched["results"] == untouched["kept"] == {}
        assert f"untouched filling will not be judged: {untouched['problem']}" in capsys.readouterr().err
        assert untouched["problem"].startswith(f"What {further} started from cannot be opened any more: There is no")
        assert entries["further"]["kept"]["knn"]["numbers"]
        code, entries = judged(folder, further, str(moved))
        assert list(entries) == ["further", "moved"] and entries["further"]["started"] == "moved" and code == 0
    finally:
        moved.rename(source)


def test_fine_tuning_takes_the_first_recipe_that_suits_an_encoder(first, folder, monkeypatch):
    for_vits, for_convnets = "finetune_vit_cifar10", "finetune_convnet_cifar10"

    def tune(door, arguments, *, num_ranks, name, environment):
        source, _, recipe, run_dir, *overrides = arguments
        assert environment == {OTHER_FOLDER: "another --out"}
        assert door == "finetune" and f'evaluate.train_shards="{folder}/train-*.tar"' in overrides
        assert ("seed=3" in overrides) == (recipe == for_vits)
        if recipe == for_vits and "turning" in source:
            return "Not for convnets."
        if source == f"random:{folder}/out/runs/turning":
            return "Out of luck."
        evaluations = Path(run_dir.removeprefix("run_dir=")) / "evaluations"
        evaluations.mkdir(parents=True)
        top1 = {"top1": {"value": 70.0, "se": 1.0}}
        (evaluations / "one.json").write_text(json.dumps({"evaluator": "fine_tune", "numbers": top1, "by": recipe}))
        return None

    monkeypatch.setenv("PRELUDE_CACHE", str(folder / "cache"))
    monkeypatch.setattr(compared_runs, "run_door", tune)
    out = folder / "tuned"
    argv = argv_of(folder, *(f"{folder}/out/runs/{name}" for name in ("filling", "turning")))
    argv += ["--out", str(out), "--features", "mean", "pool"]
    code = prelude.main(["compare", *argv, "--finetune", for_vits, "seed=3", "--finetune", for_convnets])
    comparison = json.loads((out / "comparison.json").read_text())
    tuned = {e["name"]: e["results"]["fine_tune"]["by"] for e in comparison["entries"] if "fine_tune" in e["results"]}
    assert tuned == {
        "filling": for_vits,
        "random:filling": for_vits,
        "turning": for_convnets,
    }
    assert comparison["warnings"] == ["random:turning was not fine-tuned: Out of luck."] and code == INCOMPLETE
    assert comparison["evaluators"] == ["knn", "ncm", "fine_tune"]
    assert "fine-tuned, top-1 %" in (out / "table.md").read_text()
    kinds = {e["name"]: set(e["results"]["ncm"]["details"]["by_features"]) for e in comparison["entries"]}
    assert kinds["filling"] == {"mean"} and kinds["turning"] == {"pool"}


def write_images(path: Path, extensions: tuple[str, ...]) -> str:
    """A shard of four labelled samples that hold an image of each extension."""
    with tarfile.open(path, "w") as tar:
        for sample in range(4):
            image = b"P6 1 1 255\n" + bytes([50 * sample]) * 3
            for extension, content in (*((one, image) for one in extensions), ("cls", str(sample % 2).encode())):
                member = tarfile.TarInfo(f"{sample}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(path)


@pytest.mark.parametrize(
    ("extensions", "image"), [(("left.ppm", "right.ppm"), "left.ppm"), (("ppm",), ""), (("a.ppm", "b.ppm"), None)]
)
def test_old_images_are_the_same_of_several_as_the_new_ones_or_the_only_ones(extensions, image, tmp_path, monkeypatch):
    monkeypatch.setenv("PRELUDE_CACHE", str(tmp_path / "cache"))
    new = [write_images(tmp_path / name, ("left.ppm", "right.ppm")) for name in ("new-train.tar", "new-test.tar")]
    old = [write_images(tmp_path / name, extensions) for name in ("old-train.tar", "old-test.tar")]
    argv = ["pixels:4", "--train", new[0], "--test", new[1], "--image", "left.ppm", "--keep", *old]
    args = compare.parser().parse_args(argv)
    labelled, evaluators = comparing.task_of(args, args.sources)
    judging = Judging(evaluators, labelled)
    if image is None:
        with pytest.raises(UserError, match="--keep .* cannot be used: .* without a single .left.ppm member"):
            comparing.keeping_of(args, judging)
        return
    keeping = comparing.keeping_of(args, judging)
    assert keeping.labelled.image == image and [index.num_samples for index in keeping.indexes] == [4, 4]
    assert judging.labelled.image == "left.ppm"


def test_findings_are_judged_as_findings():
    args = compare.parser().parse_args(["pixels:4", "--train", "a", "--test", "b", "--names", "x", "y", "--group", "p",
                                        "--finetune", "finetune_cxr"])  # fmt: skip
    labelled, (evaluator,) = comparing.task_of(args, args.sources)
    assert labelled == Labelled("a", "b", "json", VectorFormat(("x", "y"), "", "p"))
    assert evaluator.func is multilabel and evaluator.keywords == {"names": ("x", "y")}
    shared = compared_runs.shared_settings(labelled)  # what recipes among the sources, and fine-tuning, are given
    assert shared[3:] == ['evaluate.label_names=["x", "y"]', 'evaluate.label_field=""', 'evaluate.label_group="p"']
    of_classes = compared_runs.shared_settings(Labelled("a", "b", "cls", label_group="json:p"))
    assert of_classes[3:] == ['evaluate.label_group="json:p"']


def test_a_budget_is_of_the_part_that_a_run_learns_from(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(compared_runs, "run_door", lambda door, words, **_: asked.append(words) or "it is not trained.")
    argv = [
        *argv_of(folder, str(folder / "filling.yaml")),
        "--images",
        "96",
        "--no-floors",
        "--out",
        f"{folder}/budget",
    ]
    assert prelude.main(["compare", *argv, "--set", "data.select.share=0.5"]) == INCOMPLETE
    (epochs,) = (float(word.partition("=")[2]) for word in asked[0] if word.startswith("train.epochs="))
    assert epochs * 60 == pytest.approx(96)  # of the 120, half


def test_a_recipe_that_is_given_other_shards_says_nothing_of_them(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(compared_runs, "run_door", lambda door, words, **_: asked.append(words) or "it is not trained.")
    part, findings = {"label": "cls", "values": [0, 1]}, {"label_names": ["a"], "label_field": "labels"}
    section = {"train_shards": "mine.tar", "test_shards": "test.tar", "train_select": part, "test_select": part}
    recipe = yaml.safe_load((folder / "filling.yaml").read_text())
    recipe["evaluate"] = section | findings | {"classes": ["x"], "image": "left.jpg"}
    (folder / "parted.yaml").write_text(yaml.safe_dump(recipe))
    argv = [*argv_of(folder, str(folder / "filling.yaml"), str(folder / "parted.yaml")), "--out", f"{folder}/parted"]
    args = compare.parser().parse_args([*argv, "--test-select", "share=0.5"])
    labelled = Labelled(args.train, args.test, "cls", test_select=Selection(share=0.5))
    compared_runs.pretrained(args, folder / "parted.yaml", folder / "parted", labelled, seed=0)
    found = load_config(asked[0][1], asked[0][2:], options_for).evaluate
    assert (found.train_shards, found.test_shards) == (args.train, args.test)
    assert (found.train_select, found.test_select.share, found.test_select.values) == (None, 0.5, [])
    assert (found.classes, found.image, found.label_names, found.label_field) == ([], None, [], "")


def test_each_encoder_is_fine_tuned_in_a_folder_of_its_own():
    of_before = {
        "filling": "filling",
        "random:mae_vit-b": "random_mae_vit-b",
        "untouched vit_base.mae": "untouched_vit_base.mae",
        "mae/step-00000010": "mae_step-00000010",
        "mae (2)": "mae_2",
    }
    assert [compared_runs.slug(name) for name in of_before] == list(of_before.values())
    names = [*of_before, "lr=0.1,seed=0", "模型一", "模型二", "random:模型一", "é" * 300, "é" * 301]
    slugs = [compared_runs.slug(name) for name in names]
    assert len(set(slugs)) == len(names) and all(re.fullmatch(r"[\w.-]{1,130}", each) for each in slugs)
    assert slugs[len(of_before)] == "lr_0.1_seed_0" and slugs[len(of_before) + 1].startswith("模型一-")


def test_what_is_started_keeps_remote_shards_and_waits_as_the_comparison_does(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(compared_runs, "run_door", lambda door, words, **_: asked.append(words) or "it is not trained.")
    argv = [*argv_of(folder, str(folder / "filling.yaml"), "random:timm:test_vit.r160_in1k"), "--no-floors"]
    argv += ["--finetune", "finetune_vit_cifar10", "data.timeout_seconds=7", "--out", f"{folder}/remote"]
    argv += ["--cache-dir", f"{folder}/kept", "--cache-gib", "0.5", "--timeout-seconds", "90"]
    assert prelude.main(["compare", *argv]) == INCOMPLETE
    pretrained, tuned = asked
    for words, seconds in ((pretrained, "90.0"), (tuned, "7")):
        assert {f'data.cache_dir="{folder}/kept"', "data.cache_gib=0.5", f"data.timeout_seconds={seconds}"} <= set(
            words
        )


def test_an_epoch_of_a_run_that_takes_volumes_is_of_both_kinds(folder):
    write_volumes(folder / "volumes", "train", 30)
    shards = [f"data.shards={folder}/train-*.tar", f"data.volumes.shards={folder}/volumes/volumes-train-*.tar"]
    config = load_config("uni4eye_shapes", shards, options_for)
    assert [index.num_samples for index in compared_runs.learned_from(config)] == [120, 30]


def test_fine_tuning_and_recipes_are_given_the_same_part_of_the_shards():
    argv = ["pixels:4", "--train", "a", "--test", "b", "--finetune", "finetune_vit_cifar10", "--image", "left.jpg"]
    argv += ["--train-select", "share=0.5", "--test-select", "label=cls", "--test-select", "values=[1,2]"]
    args = compare.parser().parse_args(argv)
    comparing.refuse_without_effect(args, {})
    labelled, _ = comparing.task_of(args, args.sources)
    shared = dict(setting.split("=", 1) for setting in compared_runs.shared_settings(labelled))
    assert shared["evaluate.train_select"] == "null" and json.loads(shared["evaluate.train_select.share"]) == 0.5
    found = {key: json.loads(shared[f"evaluate.test_select.{key}"]) for key in ("label", "values")}
    assert found == {"label": "cls", "values": [1, 2]} and "evaluate.test_select.share" not in shared
    assert shared["evaluate.image"] == '"left.jpg"'


def test_paths_with_any_letter_reach_the_runs_that_are_started():
    train, test = "data/😀/train-*.tar", "data/\U00020000/test.tar"
    argv = ["mae_cifar10", "--train", train, "--test", test, "--image", "left 😀.jpg"]
    labelled, _ = comparing.task_of(compare.parser().parse_args(argv), ["mae_cifar10"])
    config = load_config("mae_cifar10", compared_runs.shared_settings(labelled), options_for)
    assert config.evaluate.train_shards == train and config.evaluate.test_shards == test
    assert config.evaluate.image == "left 😀.jpg"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--images", "100"], "--images has no effect"),
        (["--out", "/proc/nowhere"], "--out /proc/nowhere is no folder that can be written; choose another"),
        (["--finetune", "finetune_vit_cifra10"], "did you mean finetune_vit_cifar10"),
        (["--finetune", "finetune_vit_cifar10", "objective.droppath=0.1"], "objective.droppath does not exist"),
        (["--finetune", "finetune_vit_cifar10", "run_dir=x"], "run_dir=... is each run's own in a comparison"),
        (["--pretraining-seeds", "2"], "--pretraining-seeds has no effect without a recipe among the sources"),
        (["--names", "a", "--evaluators", "knn"], "--evaluators is for class numbers"),
        (["--train", "/nowhere.tar"], "/nowhere.tar"),
        (["--keep", "{0}/old/train-*.tar", "{0}/old/test-*.tar"], "none of these started from any. Leave it out"),
        (["--keep", "{0}/train-*.tar", "{0}/old/test-*.tar"], "/train-*.tar holds the new images themselves"),
        (["--keep", "{0}/old/train-*.tar", "{0}/test-*.tar"], "/test-*.tar holds the new images themselves"),
        (["--keep", "{0}/old/train-*.tar", "/nowhere.tar"], "/nowhere.tar cannot be used: "),
        (["--keep", "a.tar", "b.tar", "c.tar"], "c.tar stands among the sources; put each pattern in quotes"),
    ],
)
def test_mistakes_are_told_in_a_sentence(wrong, told, folder, capsys):
    argv = ["compare", "pixels:4", "--train", f"{folder}/train-*.tar", "--test", f"{folder}/test-*.tar"]
    argv += [word.format(folder) for word in wrong]
    assert door(lambda: prelude.main(argv)) == 2
    assert told in capsys.readouterr().err
