"""A recipe from a stranger runs nothing: only a command line allows commands."""

import pytest
import yaml

from prelude.data.batch import View, ViewPlan
from prelude.data.errors import UserError
from prelude.data.loader import build_loader
from prelude.data.shards import ShardIndex, expand_shards
from prelude.launch import prelude
from prelude.launch.exit_codes import door
from prelude.pretrain.recipes import load_config

PLAN = ViewPlan((View((6, 6)),))


@pytest.fixture
def trap(tmp_path):
    """A command that leaves a trace, and whether it has."""
    trace = tmp_path / "trace"
    return f"pipe:touch {trace}; cat nothing.tar", trace


@pytest.fixture
def recipe(tmp_path, trap):
    """recipe(**data) -> path of a recipe whose data section has these values too."""

    def write(**data):
        values = {
            "run_dir": str(tmp_path / "run"),
            "data": {"shards": trap[0], "num_samples": 8, "num_workers": 0} | data,
            "encoder": {"name": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 8},
            "objective": {"name": "mae"},
            "train": {"epochs": 1, "global_batch": 2},
            "optimizer": {"lr": 1e-3},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        return str(tmp_path / "recipe.yaml")

    return write


def told(capsys, *argv) -> tuple[int, str]:
    code = door(lambda: prelude.main([str(word) for word in argv]))
    return code, capsys.readouterr().err


@pytest.mark.parametrize("form", ["{}", "PIPE:{}", "x.tar::{}", "${{TRAP}}", ["x.tar", "{}"]])
def test_commands_are_refused_in_whatever_form(trap, tmp_path, monkeypatch, form):
    (tmp_path / "x.tar").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WDS_TRAP", trap[0])
    command = trap[0].removeprefix("pipe:") if form == "PIPE:{}" else trap[0]
    shards = [part.format(command) for part in form] if isinstance(form, list) else form.format(command)
    for use in (expand_shards, ShardIndex, lambda s: build_loader(s, PLAN, seed=0, micro_batch=1, num_samples=1)):
        with pytest.raises(UserError, match="is a command|is not a local file"):
            use(shards)
    assert not trap[1].exists()


def test_a_recipe_can_name_a_command_and_not_allow_it(recipe, trap, capsys):
    code, error = told(capsys, "pretrain", "--config", recipe(), "--dry-run")
    assert code == 2 and "write data.allow_commands=true on the command line" in error
    code, error = told(capsys, "pretrain", "--config", recipe(allow_commands=True), "--dry-run")
    assert code == 2 and "cannot allow itself to run commands" in error
    assert not trap[1].exists()


def test_the_command_line_allows_it_and_no_file_keeps_that(recipe, capsys):
    config = load_config(recipe(), ["data.allow_commands=true"])
    assert config.data.allow_commands and expand_shards(config.data.shards, config.data.allow_commands)
    assert "allow_commands" not in config.to_yaml() and "allow_commands" not in str(config.model_dump())
    code, _ = told(capsys, "pretrain", "--config", recipe(), "--dry-run", "data.allow_commands=true")
    assert code == 0


@pytest.mark.parametrize("key", ["train_shards", "test_shards"])
def test_shards_of_evaluations_are_files(recipe, trap, capsys, write_shards, key):
    sound = write_shards([4])[0]
    shards = {"train_shards": sound, "test_shards": sound} | {key: trap[0]}
    overrides = [f"data.shards={sound}", "data.num_samples=null", "evaluate.every_steps=2", "data.allow_commands=true"]
    overrides += [f"evaluate.{name}={value}" for name, value in shards.items()]
    code, error = told(capsys, "pretrain", "--config", recipe(), "--dry-run", *overrides)
    assert code == 2 and "is not a local file" in error and not trap[1].exists()


@pytest.mark.parametrize("command", [["knn", "pixels:4"], ["compare", "pixels:4"], ["compare", "RECIPE"]])
def test_evaluations_run_no_command(recipe, trap, capsys, write_shards, command, tmp_path):
    sound, out = write_shards([8])[0], ["--out", tmp_path / "out"]
    if command[1] == "RECIPE":
        argv = ["compare", recipe(), "--train", sound, "--test", sound, "--shards", trap[0]]
    else:
        argv = [*command, "--train", trap[0], "--test", sound]
    code, error = told(capsys, *argv, *out)
    assert code == 2 and "is not a local file" in error and not trap[1].exists()
