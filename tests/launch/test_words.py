"""What the doors answer, and that they answer before torch is imported."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from runs import ROOT

from prelude.data.errors import UserError
from prelude.evaluators import defaults
from prelude.launch import (
    compare,
    fewshot,
    finetune,
    knn,
    linear_probe,
    multilabel,
    ncm,
    prelude,
    pretrain,
    segment,
    shards,
    svm,
)
from prelude.launch.arguments import parse
from prelude.launch.shards_arguments import shards_parser
from prelude.pretrain.foreign_keys import SENTENCES
from prelude.pretrain.recipes import find_recipe

LIGHT = """
import sys
from prelude.launch import prelude
from prelude.launch.exit_codes import door

for argv in {commands!r}:
    try:
        code = door(lambda: prelude.main(list(argv)))
    except SystemExit as stop:
        code = stop.code
    print(code, " ".join(argv), sep="|", file=sys.stderr)
print([name for name in ("torch", "timm", "deepspeed", "webdataset") if name in sys.modules], file=sys.stderr)
"""
HELP = [["--help"], ["--version"], *([name, "--help"] for name in prelude.COMMANDS)]
REFUSALS = [
    ["knm"],
    ["pretrain", "--config", "mae_cifr10"],
    *(["pretrain", "--config", recipe, setting] for recipe, setting in (
        ("mae_cifar10", "lr=1"),
        ("ijepa_vit_base", "objective.momentun=1"),
        ("dseqjepa_cifar10", "objective.num_regions=one"),
        ("barlow_resnet50", "objective.view_1.hue=2"),
        ("rotation_cifar10", "objective.rotations=[0, 45]"),
        ("spark_resnet50", "optimizer.warmup_epochs=99999"),
    )),
    ["finetune", "runs/x", "--config", "finetune_vit_cifar10", "objective.mixup=-1"],
    ["finetune", "runs/x", "--config", "finetune_vit_cifar10", "encoder.name=resnet18"],
    ["knn"],
    *(["pretrain", "--config", "mae_cifar10", f"data.shards={absent}"] for absent in (
        "/nowhere/{000..003}.tar", "pyproject.toml::nowhere.tar", "configs/*.tar", '["configs", "~/nowhere.tar"]',
    )),
    ["pretrain", "--config", "mae_cifar10", "data.shards=null", "data.mix.a.shards=pyproject.toml",
     "data.mix.b.shards=nowhere"],
    ["pretrain", "--config", "mae_cifar10", "data.shards=pyproject.toml", "evaluate.test_shards=no-?.tar",
     "evaluate.train_shards=pyproject.toml", "evaluate.every_steps=1"],
    ["knn", "pixels:8", "--train", "nowhere.tar"],
    ["ood", "pixels:8", "--others", "pyproject.toml", "nowhere.tar"],
    ["finetune", "runs/x", "--config", "finetune_vit_cifar10", "--test", "nowhere-{0..9}.tar"],
    ["maps", "runs/x", "--images", "nowhere/", "--to", "a.png"],
    ["sweep", "mae_cifar10", "data.shards=nowhere.tar", "seed=[1, 2]"],
    ["embed", "runs/x", "nowhere/*.tar", "--to", "a.npz"],
    ["shards", "info", "nowhere.tar"],
    ["probe", "runs/x", "--protocol", "moco"],
]  # fmt: skip


def without_torch(commands: list[list[str]]) -> list[str]:
    """The exit code of each command, asked of one process that must not come to import torch."""
    done = subprocess.run(
        [sys.executable, "-c", LIGHT.format(commands=commands)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": "src", "COLUMNS": "80"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    *lines, imported = done.stderr.splitlines()
    assert imported == "[]", done.stderr
    assert "Traceback" not in done.stderr
    return [line.partition("|")[0] for line in lines if re.match(r"\d\|", line)]


def test_help_is_given_without_torch():
    assert set(without_torch(HELP)) == {"0"}


def test_a_refusal_is_given_without_torch():
    assert without_torch(REFUSALS) == ["2"] * len(REFUSALS)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["knn", "pixels:8", "--test", "no-{4..5}.tar"],
            "no-4.tar does not exist on .*; correct --test 'no-{4..5}.tar'",
        ),
        (["shards", "verify", "no?.tar"], r"No file matches 'no\?.tar' on .*; correct 'no\?.tar'."),
        (["pretrain", "--config", "mae_cifar10", "data.shards=no"], "no does not exist .* correct data.shards='no'"),
    ],
)
def test_absent_shards_are_told_as_they_were_given(words, sentence):
    with pytest.raises(UserError, match=sentence):
        prelude.main(words)


@pytest.mark.parametrize("command", [[], *([name] for name in prelude.COMMANDS), ["shards", "info"]])
def test_help_fits_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    try:
        prelude.main([*command, "--help"])
    except SystemExit:
        pass
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize(("command", "module"), [(name, module) for name, (module, _) in prelude.COMMANDS.items()])
def test_help_names_doors_as_an_installed_package_has_them(command, module, capsys):
    with pytest.raises(SystemExit):
        prelude.main([command, "--help"])
    told = capsys.readouterr().out
    assert "launch/" not in told and set(re.findall(r"--module ([\w.]+)", told)) <= {f"prelude.launch.{module}"}


def test_the_sentence_about_devices_names_a_door_that_an_installed_package_has():
    assert SENTENCES["num_gpus"].endswith("deepspeed --num_gpus N --module prelude.launch.pretrain")


def test_the_version_is_that_of_the_project(capsys):
    assert prelude.main(["--version"]) == 0
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert capsys.readouterr().out == f"prelude {version}\n"


def test_settings_stand_on_both_sides_of_options():
    first = parse(pretrain.parser(), ["seed=1", "--config", "c.yaml", "train.epochs=2", "--dry-run", "run_dir=a b"])
    assert first.overrides == ["seed=1", "train.epochs=2", "run_dir=a b"]
    assert first.config == "c.yaml" and first.dry_run
    words = [
        "runs/x",
        "seed=1",
        "--train",
        "a.tar",
        "b.tar",
        "train.epochs=2",
        "--config",
        "c.yaml",
        "log.every_steps=3",
    ]
    second = parse(finetune.parser(), words)
    assert (second.source, second.train) == ("runs/x", ["a.tar", "b.tar"])
    assert second.overrides == ["seed=1", "train.epochs=2", "log.every_steps=3"]


def test_a_shard_option_takes_one_pattern_or_several_files_and_leaves_sources_alone():
    args = parse(knn.parser(), ["--train", "a-0.tar", "a-1.tar", "runs/x", "--test", "b-{0..3}.tar", "random:runs/x"])
    assert (args.train, args.test) == (["a-0.tar", "a-1.tar"], "b-{0..3}.tar")
    assert args.sources == ["runs/x", "random:runs/x"]
    args = parse(compare.parser(), ["x", "--shards", "u0.tar", "u1.tar", "--set", "seed=1", "--train", "t.tar"])
    assert (args.shards, args.set, args.train) == (["u0.tar", "u1.tar"], ["seed=1"], "t.tar")


def test_braces_that_the_shell_expanded_are_one_list_again_and_no_other_key_is_set_twice():
    words = ["--config", "c", "data.shards=t-0.tar", "data.shards=t-1.tar", "seed=3"]
    assert parse(pretrain.parser(), words).overrides == ['data.shards=["t-0.tar", "t-1.tar"]', "seed=3"]
    for more, sentence in {
        "seed=4": "seed is set 2 times, to 3 and 4; write it once",
        "data.shards=t-2.tar": "data.shards is set 3 times; write it once, and where all are meant as",
    }.items():
        with pytest.raises(UserError, match=sentence):
            parse(pretrain.parser(), [*words, more])
    for two in (["a.tar", "b.tar"], ["t-1.tar", "t-1.tar"]):
        with pytest.raises(UserError, match="data.shards is set 2 times"):
            parse(pretrain.parser(), ["--config", "c", *(f"data.shards={name}" for name in two)])


def test_settings_behind_an_option_are_set_once_too():
    braces, words = [f"data.shards=t-{i}.tar" for i in (0, 1)], ["x", "--train", "t.tar"]
    args = parse(compare.parser(), [*words, "--set", *braces, "--finetune", "one", "seed=1", "--finetune", "two"])
    assert args.set == ['data.shards=["t-0.tar", "t-1.tar"]'] and args.finetune == [["one", "seed=1"], ["two"]]
    for door, given in (
        (compare, [*words, "--set"]),
        (compare, [*words, "--finetune", "recipe"]),
        (shards, ["peek", "x", "--set"]),
    ):
        with pytest.raises(UserError, match="seed is set 2 times, to 3 and 4; write it once"):
            door.main([*given, "seed=3", "seed=4"])
    nothing_set = parse(compare.parser(), [*words, "--set", "train.compile", "seed=1"])
    assert nothing_set.set == ["seed=1", "train.compile"]  # which whoever applies it refuses


def test_a_range_of_values_is_two_numbers_or_auto(capsys):
    words = ["runs/x", "--train", "a.tar", "--test", "b.tar", "--range"]
    assert parse(knn.parser(), [*words, "0,4095"]).range == (0, 4095)
    assert parse(knn.parser(), [*words, "-1000,400"]).range == (-1000, 400)
    assert shards_parser("").parse_args(["info", "ct", "--range", "-1000,400"]).range == (-1000, 400)
    assert parse(knn.parser(), [*words, "auto"]).range == "auto"
    for wrong in ("5", "9,2", "a,b", "1,2,3", ""):
        with pytest.raises(SystemExit):
            parse(knn.parser(), [*words, wrong])
        assert "is no range; write LOW,HIGH" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("door", "option", "value", "right"),
    [
        (knn, "--batch-size", "0", "a whole number of 1 or more"),
        (knn, "--batch-size", "many", "a whole number of 1 or more"),
        (knn, "--num-workers", "-1", "a whole number of 0 or more"),
        (knn, "--seed", "-1", "a whole number from 0 to 2147483647"),
        (knn, "--seed", "2147483648", "a whole number from 0 to 2147483647"),
        (knn, "--seeds", "0", "a whole number of 1 or more"),
        (knn, "--k", "0", "a whole number of 1 or more"),
        (knn, "--temperature", "nan", "a finite number"),
        (knn, "--temperature", "0", "a number above 0"),
        (knn, "--timeout-seconds", "inf", "a finite number"),
        (knn, "--timeout-seconds", "-1", "a number above 0"),
        (segment, "--temperature", "-0.1", "a number above 0"),
        (linear_probe, "--weight-decays", "-1", "0 or a number above it"),
        (svm, "--c", "0", "a number above 0"),
        (fewshot, "--per-class", "0", "a whole number of 1 or more"),
        (fewshot, "--share", "101", "a number above 0, of 100 at most"),
        (fewshot, "--draws", "0", "a whole number of 1 or more"),
        (compare, "--images", "0", "a whole number of 1 or more"),
        (compare, "--ranks", "0", "a whole number of 1 or more"),
    ],
)
def test_a_number_that_cannot_be_is_told_with_those_that_can(door, option, value, right, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(door.parser(), ["runs/x", option, value])
    assert stop.value.code == 2
    assert f"argument {option}: '{value}' cannot be; write {right}" in capsys.readouterr().err


def test_a_home_folder_is_found_in_sources_and_folders(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    args = parse(ncm.parser(), ["random:~/runs/x", "~/y", "local-dir:~/z", "--out=~/results", "--bank=~/bank"])
    assert args.sources == ["random:/home/somebody/runs/x", "/home/somebody/y", "local-dir:/home/somebody/z"]
    assert (args.out, args.bank) == ("/home/somebody/results", "/home/somebody/bank")


def test_help_says_what_the_code_does():
    from prelude.evaluators.protocols.papers import PROTOCOLS
    from prelude.launch.comparing import EVALUATORS

    assert tuple(PROTOCOLS) == defaults.PROTOCOLS
    assert tuple(EVALUATORS) == defaults.COMPARABLE
    assert "else json" in " ".join(multilabel.parser().format_help().split())  # frozen.labelled_shards' default


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_command_that_a_recipe_quotes_can_be_given(path):
    *_, command = next(line for line in path.read_text().splitlines() if line.startswith("# Command: ")).split(": ", 1)
    words = shlex.split(command)
    if words[:2] == ["prelude", "quickstart"]:
        return
    door = {"launch/pretrain.py": pretrain, "launch/finetune.py": finetune}
    place = next(i for i, word in enumerate(words) if word in door)
    args = parse(door[words[place]].parser(), words[place + 1 :])
    assert find_recipe(args.config).name == path.name
    assert isinstance(yaml.safe_load(path.read_text()), dict)
