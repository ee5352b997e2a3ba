"""What a person meets at the doors: help that reads, and mistakes answered in one sentence."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from runs import BIN, ROOT, deepspeed

from prelude.data.errors import Stopped
from prelude.launch import planning, prelude
from prelude.launch.exit_codes import door
from prelude.launch.missing_package import NEEDED
from prelude.pretrain import distributed
from prelude.pretrain.engine import Outcome


def run(capsys, *argv: str) -> tuple[int, str]:
    code = door(lambda: prelude.main(list(argv)))
    return code, capsys.readouterr().err


MISTAKES = {
    "a wrong key": (["train.epoch=3"], "train.epoch does not exist; did you mean train.epochs?"),
    "no shards": (["data.shards=/nowhere/train-{000..003}.tar"], "/nowhere/train-"),
    "a patch that does not divide the image": (["encoder.patch_size=5"], "not a whole number of patches of 5 pixels"),
    "a batch that does not divide": (["train.micro_batch=5"], "train.micro_batch=5"),
    "a convnet for MAE": (["encoder.name=resnet18", "encoder.kwargs={}"], "resnet18"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_typical_mistake_is_one_clear_sentence_and_exit_code_2(mistake, recipe, tmp_path, capsys):
    overrides, expected = MISTAKES[mistake]
    code, message = run(capsys, "pretrain", "--config", str(recipe), f"run_dir={tmp_path / 'run'}", *overrides)
    assert code == 2
    assert expected in message
    assert "Traceback" not in message
    assert len(message.strip().splitlines()) <= 2  # the sentence, below a line that counts the errors of a config


def test_a_missing_named_checkpoint_is_an_error_and_no_fresh_start(recipe, tmp_path, capsys):
    run_dir, missing = tmp_path / "run", "resume.checkpoint=/nowhere/step-00000005"
    code, message = run(capsys, "pretrain", "--config", str(recipe), f"run_dir={run_dir}", missing)
    distributed.stop()
    assert code == 2
    assert "/nowhere/step-00000005" in message and "Traceback" not in message
    assert not (run_dir / "metrics.jsonl").exists()


def test_a_dry_run_says_what_would_run_and_writes_nothing(recipe, tmp_path, capsys):
    run_dir = tmp_path / "run"
    code = prelude.main(["pretrain", "--dry-run", "--config", str(recipe), f"run_dir={run_dir}"])
    output = capsys.readouterr().out
    assert code == 0
    for expected in ("parameters", "MFLOPs", "12.5 steps an epoch, 38 in all", "MiB", "200 samples", "first samples"):
        assert expected in output
    assert not run_dir.exists()


def test_a_dry_run_refuses_what_deepspeed_would(recipe, tmp_path, capsys):
    passed = [f"run_dir={tmp_path / 'run'}", "train.zero_stage=1", "deepspeed.zero_optimization.mics_shard_size=2"]
    code, message = run(capsys, "pretrain", "--dry-run", "--config", str(recipe), *passed)
    assert code == 2 and "is refused by DeepSpeed: MiCS" in message and "Traceback" not in message


def test_a_start_says_which_layers_in_front_of_the_features_are_never_trained(recipe, tmp_path, capsys):
    encoder = ["encoder.name=mobilenetv3_small_050", "encoder.image_size=64", "encoder.patch_size=null"]
    objective = [
        "encoder.kwargs={}",
        "objective={name: spark, decoder_dim: 32}",
        "train.epochs=0.08",
        "optimizer.warmup_epochs=0",
    ]
    command = ["pretrain", "--config", str(recipe), f"run_dir={tmp_path / 'run'}", *encoder, *objective]
    sentence = "not trained by SparK, and in front of the features `pool`: conv_head; judge the encoder by"
    assert prelude.main([*command, "--dry-run"]) == 0
    assert sentence in " ".join(capsys.readouterr().out.replace("│", " ").split())
    code, message = run(capsys, *command)
    distributed.stop()
    assert code == 0 and sentence in message


def test_a_dry_run_plans_for_ranks_and_devices_that_are_not_here(recipe, capsys):
    command = ["pretrain", "--dry-run", "--config", str(recipe), "--ranks", "8", "--device", "a100"]
    assert prelude.main([*command, "train.zero_stage=2"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    for expected in ("16 = 8 ranks x 2 images x 1", "a100's data sheet", "not measured", "largest", "at ZeRO stage 2"):
        assert expected in output
    assert run(capsys, *command[:-3], "3")[0] == 2  # 16 images cannot be shared by 3 ranks
    code, message = run(capsys, *command[:-1], "a1000")
    assert code == 2 and "write one of" in message and "a100" in message
    code, message = run(capsys, "pretrain", "--config", str(recipe), "--ranks", "2")
    assert code == 2 and "--dry-run" in message


@pytest.fixture(scope="module")
def measured(recipe, tmp_path_factory) -> tuple[str, Path]:
    """What a dry run on two ranks tells, started from another folder, and its run folder."""
    folder = tmp_path_factory.mktemp("measured")
    command = [*deepspeed(2), str(ROOT / "launch/pretrain.py"), "--config", str(recipe), "--dry-run", "--measure"]
    command += [f"run_dir={folder / 'run'}", "train.profile_steps=2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}", "COLUMNS": "200"}
    (folder / "run").mkdir()
    (folder / "run" / "STOP").touch()  # as a run leaves it that was ended by it
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, folder / "run"


def test_the_script_finds_the_package_that_shares_its_name(measured):
    """Through the real launcher, from another folder: `launch/pretrain.py` must not hide the package `pretrain`."""
    assert "steps an epoch" in measured[0]


def test_a_dry_run_measures_on_the_ranks_that_are_started_and_the_first_tells(measured):
    told, run_dir = measured
    for expected in ("parameters", "first samples", "measured with 2 ranks on cpu", "waiting for data"):
        assert told.count(expected) == 1
    assert [path.name for path in run_dir.iterdir()] == ["STOP"]


def test_a_measurement_that_is_ended_tells_no_times(monkeypatch):
    class Ended:
        def __init__(self, *_): ...

        def run(self) -> Outcome:
            return Outcome("preempted", 1)

    monkeypatch.setattr(planning, "Engine", Ended)
    with pytest.raises(Stopped, match="while steps were measured"):
        planning._records_of(None, None, lambda config: SimpleNamespace(close=lambda: None))


@pytest.mark.parametrize("command", [[], *([name] for name in prelude.COMMANDS)])
def test_every_command_explains_itself(command, capsys):
    try:
        code = prelude.main([*command, "--help"])
    except SystemExit as stop:
        code = stop.code
    output = capsys.readouterr().out
    assert code == 0
    assert output.startswith(f"usage: {' '.join(['prelude', *command])}")
    assert max(map(len, output.splitlines())) <= 120


def test_an_unknown_command_lists_the_known_ones(capsys):
    code, message = run(capsys, "prob")
    assert code == 2 and "probe" in message


@pytest.mark.parametrize(("command", "missing"), [("doctor", "packaging"), ("knn", "pydantic"), ("recipes", "yaml")])
def test_a_package_that_is_missing_is_told_by_its_name(command, missing):
    script = (
        f"import sys; sys.modules[{missing!r}] = None; sys.argv[1:] = [{command!r}]; "
        "from prelude.launch import prelude; prelude.run()"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"error: The package {missing} is missing") and "reinstall prelude-ssl" in done.stderr


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["{root}/launch/keys.py"], "pydantic"),
        (["-m", "prelude.launch.keys"], "yaml"),
        (["{root}/launch/shards.py", "info", "{root}/docs"], "simplejpeg"),
    ],
)
def test_a_door_started_as_a_script_or_module_tells_it_as_well(words, missing, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{missing!r}] = None")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}"}
    command = [sys.executable, *(word.format(root=ROOT) for word in words)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"error: The package {missing} is missing") and "reinstall prelude-ssl" in done.stderr


def test_packages_that_are_told_are_those_that_are_asked_for():
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    modules = {"pyyaml": "yaml", "pillow": "PIL"}
    assert {modules.get(name, name) for name in (Requirement(line).name for line in asked)} == NEEDED


@pytest.mark.parametrize("missing, told", [("simplejpeg", True), ("a_module_of_the_users", False)])
def test_a_package_that_is_missed_later_is_told_where_it_is_one_of_ours(missing, told, capsys):
    def main() -> int:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    if told:
        assert door(main) == 2 and "The package simplejpeg is missing" in capsys.readouterr().err
    else:
        with pytest.raises(ModuleNotFoundError):
            door(main)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
@pytest.mark.parametrize("command", [["recipes"], ["knn", "pixels:8", "--train", "{0}", "--test", "{0}"]])
def test_a_launcher_s_variable_that_is_no_number_is_refused(name, command, recipe, monkeypatch, capsys):
    monkeypatch.setenv(name, "banana")
    shards = str(recipe.parent / "shapes" / "train-*.tar")
    code, told = run(capsys, *(word.format(shards) for word in command))
    assert code == 2 and f"{name}='banana' is no whole number" in told
