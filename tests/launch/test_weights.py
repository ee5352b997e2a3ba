"""Runs that start from weights, through the real launcher: two ranks, ZeRO 3, interrupted, and without the file."""

import json
import signal
import sys

import pytest
import torch
import yaml
from published import mae
from runs import Run, deepspeed

from prelude.checkpoints.export import export_encoder
from prelude.checkpoints.sources import open_encoder
from prelude.data.errors import UserError
from prelude.evaluators.comparing.run_record import is_finished, is_finished_as
from prelude.launch import finetune, knn, pretrain
from prelude.launch.compared_runs import learned_from
from prelude.launch.exit_codes import door
from prelude.objectives import options_for
from prelude.pretrain.recipes import load_config

ENCODER = {"depth": 2, "embed_dim": 24, "num_heads": 2}


@pytest.fixture(scope="module")
def warm_recipe(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("warm")
    torch.save(mae().tree, folder / "mae.pth")
    config = yaml.safe_load(recipe.read_text())
    config["encoder"] |= {"kwargs": ENCODER, "weights": str(folder / "mae.pth")}
    config["objective"] |= {"decoder_dim": 16}
    config["train"] |= {"freeze_encoder_steps": 12, "epochs": 1.5}
    config["checkpoint"] |= {"keep": 100}
    (folder / "warm.yaml").write_text(yaml.safe_dump(config))
    return folder / "warm.yaml"


@pytest.fixture(scope="module")
def interrupted(warm_recipe, tmp_path_factory) -> Run:
    """Two ranks at ZeRO 3, pre-empted; then the file is gone, and one process goes on to the end."""
    run_dir = tmp_path_factory.mktemp("runs") / "interrupted"
    first = Run(deepspeed(2), warm_recipe, run_dir, "encoder.own_parts=true", "train.zero_stage=3")
    first.at_step(7).signal_group(signal.SIGTERM).wait()
    file = warm_recipe.parent / "mae.pth"
    file.rename(file.with_suffix(".gone"))
    second = Run([sys.executable], warm_recipe, run_dir, "encoder.own_parts=true")
    code = second.wait()
    file.with_suffix(".gone").rename(file)
    assert code == 0, second.output.read_text()[-3000:]
    return second


def test_what_was_loaded_is_said_and_recorded(interrupted):
    said = interrupted.output.read_text()
    assert said.count("mae.pth: MAE, 30 of 30 tensors loaded, and 19 tensors of the objective's own parts") == 1
    encoder = yaml.safe_load((interrupted.run_dir / "config.yaml").read_text())["encoder"]
    assert encoder["weights"].endswith("mae.pth") and len(encoder["weights_fingerprint"]) == 32
    assert open_encoder(str(interrupted.run_dir)).origin["weights_fingerprint"] == encoder["weights_fingerprint"]


def test_the_weights_stand_still_as_long_as_they_are_told_to_and_then_move(interrupted):
    file = mae().tree["model"]
    encoder = {name: tensor for name, tensor in file.items() if not name.startswith(("decoder", "mask_token"))}
    at_5, at_10, at_15 = (interrupted.weights(step) for step in (5, 10, 15))
    for name, tensor in encoder.items():
        assert torch.equal(at_5[f"encoder.{name}"], tensor) and torch.equal(at_10[f"encoder.{name}"], tensor)
    moved = [name for name, tensor in encoder.items() if not torch.equal(at_15[f"encoder.{name}"], tensor)]
    assert len(moved) == len(encoder) - 1  # all but the fixed table of positions
    assert not torch.equal(at_5["decoder_pred.weight"], file["decoder_pred.weight"])
    assert (at_5["decoder_pred.weight"] - file["decoder_pred.weight"]).abs().max() < 0.1


def test_what_a_run_started_from_opens_as_it_was(interrupted, warm_recipe, tmp_path):
    run, file = str(interrupted.run_dir), mae().tree["model"]
    start, now = open_encoder(f"start:{run}"), open_encoder(run)
    assert all(torch.equal(tensor, file[name]) for name, tensor in start.model.state_dict().items())
    assert start.fingerprint != now.fingerprint and (start.config, start.mean) == (now.config, now.mean)
    export = tmp_path / "export"
    export_encoder(run, export)
    assert open_encoder(f"start:{export}").fingerprint == start.fingerprint
    with pytest.raises(UserError, match=r"mae.pth#num_heads=2 did not start from weights.*write random:"):
        open_encoder(f"start:{warm_recipe.parent}/mae.pth#num_heads=2")


def test_a_start_that_is_gone_or_another_is_told_in_a_sentence(interrupted, warm_recipe):
    run, file = str(interrupted.run_dir), warm_recipe.parent / "mae.pth"
    kept = file.rename(file.with_suffix(".kept"))
    try:
        with pytest.raises(UserError, match=f"What {run} started from cannot be opened any more: .*mae.pth"):
            open_encoder(f"start:{run}")
        other = mae()
        other.tree["model"]["cls_token"] += 1
        torch.save(other.tree, file)
        with pytest.raises(UserError, match="mae.pth, which holds other weights by now .fingerprint .{32} instead of"):
            open_encoder(f"start:{run}")
    finally:
        kept.rename(file)


def test_a_run_from_weights_that_has_ended_counts_as_finished(interrupted, warm_recipe):
    def config(*overrides):
        own = [f"run_dir={interrupted.run_dir}", "encoder.own_parts=true"]
        return load_config(warm_recipe, [*own, *overrides], options_for)

    options, asked = options_for("mae"), config()
    data = [index.fingerprint for index in learned_from(asked)]
    assert asked.encoder.weights_fingerprint is None
    assert is_finished_as(asked, options) and is_finished(asked, options, data)
    for other in ("encoder.weights=other.pth", f"encoder.weights_fingerprint={'0' * 32}"):
        assert not is_finished_as(config(other), options) and not is_finished(config(other), options, data)


def test_a_dry_run_says_what_would_be_loaded(warm_recipe, capsys):
    assert pretrain.main(["--config", str(warm_recipe), "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "30 of 30 tensors loaded, left out decoder (20)" in said


def test_a_dry_run_refuses_to_hold_the_encoder_still_to_the_end(warm_recipe, recipe, tmp_path, capsys):
    def code(steps: int) -> int:  # of 19
        return door(
            lambda: pretrain.main(["--config", str(warm_recipe), "--dry-run", f"train.freeze_encoder_steps={steps}"])
        )

    assert code(18) == 0 and code(19) == 2
    assert "still to the end of a run of 19 steps; write train.freeze_encoder_steps=1, or" in capsys.readouterr().err
    tuned = {"run_dir": str(tmp_path / "tuned"), "optimizer": {"lr": 0.01}}
    tuned["train"] = {"epochs": 1, "global_batch": 16, "freeze_encoder_steps": 13}
    (tmp_path / "tuned.yaml").write_text(yaml.safe_dump(tuned))
    shards = f"{recipe.parent}/shapes/train-*.tar"
    command = [f"{warm_recipe.parent}/mae.pth#num_heads=2", "--config", str(tmp_path / "tuned.yaml"), "--dry-run"]
    assert door(lambda: finetune.main([*command, "--train", shards, "--test", shards, "--label", "cls"])) == 2
    assert "to the end of a run of 13 steps" in capsys.readouterr().err


def test_weights_that_do_not_fit_end_a_run_with_one_sentence(warm_recipe, capsys):
    command = ["--config", str(warm_recipe), "--dry-run", "encoder.kwargs.depth=3"]
    assert door(lambda: pretrain.main(command)) == 2
    said = capsys.readouterr().err
    assert "does not hold the weights of encoder.name=vit_tiny_patch16_224: 12 tensors of blocks.2 are missing" in said


def test_evaluators_and_fine_tuning_take_the_file_too(warm_recipe, recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = f"{warm_recipe.parent}/mae.pth#num_heads=2"
    shards = f"{recipe.parent}/shapes/train-*.tar"
    places = ["--train", shards, "--test", shards, "--label", "cls"]
    assert door(lambda: knn.main([source, *places, "--out", str(tmp_path / "out"), "--num-workers", "0"])) == 0
    assert "mae.pth#num_heads=2: MAE, 30 of 30 tensors loaded, left out decoder (20)" in capsys.readouterr().err
    (written,) = (tmp_path / "out").glob("*.json")
    assert json.loads(written.read_text())["encoder"]["origin"] == {"format": "MAE"}
    tuned = {"run_dir": str(tmp_path / "tuned"), "train": {"epochs": 1, "global_batch": 16}, "optimizer": {"lr": 0.01}}
    tuned["objective"] = {"image_size": 32}
    (tmp_path / "tuned.yaml").write_text(yaml.safe_dump(tuned))
    assert finetune.main([source, "--config", str(tmp_path / "tuned.yaml"), *places, "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "position table resampled from 4 x 4 to 8 x 8 (bicubic)" in said
    assert "new are fc_norm.weight, fc_norm.bias, not used are norm.weight, norm.bias" in said
