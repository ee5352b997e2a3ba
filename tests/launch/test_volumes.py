"""Images and volumes in real runs: at two ranks and one, resumed, exported, and read by the example without us."""

import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from runs import ROOT, Run, RunDir, deepspeed

from prelude.checkpoints.export import export_encoder
from prelude.checkpoints.saved import open_tensors
from prelude.data.errors import UserError
from prelude.data.shape_volumes import make, write_volumes
from prelude.launch import pretrain
from prelude.objectives import options_for
from prelude.objectives.building import build_objective
from prelude.pretrain.recipes import load_config, validate_config
from prelude.pretrain.volumes import standardised

NUM_STEPS = 15  # ceil(1 epoch of 200 images and 40 volumes / 16)
WITHOUT_OURS = "import runpy, sys; sys.modules['prelude'] = None; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("volumes")
    write_volumes(folder, "train", num_samples=40, size=(16, 16, 8))
    options = ["objective.name=uni4eye", "objective.volume_size=[8,8,8]", "objective.volume_patch=[4,4,2]"]
    data = ["data.volumes={shards: '" + str(folder / "volumes-train-*.tar") + "', share: 0.4}"]
    return [*options, *data, "train.epochs=1", "checkpoint.every_steps=4", "checkpoint.keep=9"]


@pytest.fixture(scope="module")
def run(recipe, settings, tmp_path_factory):
    """run(name, further settings): the folder of a finished run in this process."""
    folder = tmp_path_factory.mktemp("runs")

    def start(name: str, *more: str) -> RunDir:
        path = folder / name
        if not (path / "metrics.jsonl").exists():
            assert pretrain.main(["--config", str(recipe), f"run_dir={path}", *settings, *more]) == 0
        return RunDir(path)

    return start


def test_two_ranks_train_what_one_process_trains(recipe, settings, run, tmp_path):
    two = Run(deepspeed(2), recipe, tmp_path / "two", *settings)
    one = run("one")
    assert two.wait() == 0, two.output.read_text()[-3000:]
    assert "on 240 images and volumes, 2 x " in two.output.read_text()
    kinds = [{"voxel_mse", "pixel_mse"} & step["parts"].keys() for step in one.metrics()]
    assert len(kinds) == NUM_STEPS and kinds.count({"voxel_mse"}) == 6 and kinds.count({"pixel_mse"}) == 9
    for mine, theirs in zip(one.metrics(), two.metrics(), strict=True):
        assert mine["parts"].keys() == theirs["parts"].keys()
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=2e-3)
    assert_same_moves(one, two)


def assert_same_moves(one: RunDir, other: RunDir) -> None:
    start = build_objective(load_config(one.run_dir / "config.yaml", [], options_for)).state_dict()
    found = other.weights(NUM_STEPS)
    for name, value in one.weights(NUM_STEPS).items():
        if not name.endswith("qkv.bias"):  # that of the keys moves by rounding
            moved, apart = (value - start[name]).abs().max(), (found[name] - value).abs().max()
            assert apart <= 0.05 * moved + 1e-6, name


@pytest.mark.parametrize("stage", [1, 3])
def test_what_a_kind_leaves_alone_has_no_gradient_of_the_step_before(stage, recipe, settings, run, tmp_path):
    split = Run([sys.executable], recipe, tmp_path / "split", *settings, f"train.zero_stage={stage}")
    assert split.wait() == 0, split.output.read_text()[-3000:]
    assert_same_moves(run("one"), split)


def test_a_run_that_goes_on_with_other_workers_ends_bit_for_bit_the_same(run):
    whole = run("one")
    start = whole.run_dir / "checkpoints" / "step-00000008"
    resumed = run("resumed", f"resume.checkpoint={start}", "data.num_workers=3")
    assert [step["step"] for step in resumed.metrics()] == list(range(9, NUM_STEPS + 1))
    assert [step["loss"] for step in resumed.metrics()] == [step["loss"] for step in whole.metrics()[8:]]
    for name, value in whole.weights(NUM_STEPS).items():
        assert torch.equal(resumed.weights(NUM_STEPS)[name], value), name


def test_it_says_what_it_learns_from_and_shows_it(run, recipe, settings, capsys):
    one = run("one")
    capsys.readouterr()
    assert pretrain.main(["--config", str(recipe), f"run_dir={one.run_dir}", *settings, "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "images in 60 % of the steps (200 samples, 0.72 times an epoch), volumes in 40 % of the steps" in said
    assert "cost of a sample, on average" in said and "finished at step 15" in said
    pictures = {path.stem for path in (one.run_dir / "pictures").iterdir()}
    assert pictures in ({f"{kind}reconstruction-00000015", f"{kind}gradient-00000015"} for kind in ("", "volume_"))


def test_the_encoder_leaves_as_plain_timm_and_volumes_are_read_without_us(run, tmp_path):
    one = run("one")
    report = export_encoder(str(one.run_dir), tmp_path / "encoder")
    assert report.max_difference < 1e-6
    assert "projects patches of 1 x 4 x 4 x 2 voxels" in (tmp_path / "encoder" / "README.md").read_text()
    voxels = make("test", np.arange(3), size=(8, 8, 8))[0]
    paths = [str(tmp_path / f"{n}.npy") for n in range(3)]
    for path, volume in zip(paths, voxels, strict=True):
        np.save(path, volume)
    argv = [str(ROOT / "examples" / "volume_features.py"), str(tmp_path / "encoder"), *paths]
    command = [sys.executable, "-c", f"import sys; sys.argv = sys.argv[1:]; {WITHOUT_OURS}", *argv]
    done = subprocess.run(
        [*command, "--to", str(tmp_path / "f.npz")], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("3 volumes"), done.stderr[-2000:]
    objective = build_objective(load_config(one.run_dir / "config.yaml", [], options_for)).eval()
    objective.load_state_dict(dict(open_tensors(one.run_dir / "checkpoints" / f"step-{NUM_STEPS:08d}")))
    with torch.no_grad():
        expected = objective.volume_features(standardised(torch.from_numpy(voxels)[:, None].float() / 255))
    np.testing.assert_allclose(np.load(tmp_path / "f.npz")["features"], expected.numpy(), atol=1e-5)
    assert not (tmp_path / "encoder" / "model.safetensors").read_bytes().count(b"volume_embed")
    state = json.loads((one.run_dir / "checkpoints" / f"step-{NUM_STEPS:08d}" / "state.json").read_text())
    assert state["meta"]["loader"]["samples"] == NUM_STEPS * 16


@pytest.mark.parametrize(
    "prefix",
    [{}, {"reg_tokens": 3}, {"class_token": False, "global_pool": "avg", "fc_norm": False, "reg_tokens": 2}],
    ids=["class token", "registers", "no class token"],
)
def test_the_example_computes_our_features_whatever_tokens_come_before_the_patches(prefix):
    config = {
        "run_dir": "x",
        "data": {"shards": "x", "volumes": {"shards": "y"}},
        "encoder": {"name": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 4},
        "objective": {"name": "uni4eye", "decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
        "train": {"epochs": 1, "global_batch": 4},
        "optimizer": {"lr": 1e-3},
    }
    config["encoder"]["kwargs"] = {"depth": 1, "embed_dim": 24, "num_heads": 2} | prefix
    config["objective"] |= {"volume_size": [12, 8, 8], "volume_patch": 4}
    objective = build_objective(validate_config(config, "a test", options_for)).eval()
    example = runpy.run_path(str(ROOT / "examples" / "volume_features.py"))
    voxels = torch.rand(2, 1, 12, 8, 8, generator=torch.Generator().manual_seed(0))
    found = example["features"](objective.encoder, dict(objective.volume_embed.named_parameters()), voxels)
    with torch.no_grad():
        torch.testing.assert_close(found, objective.volume_features(standardised(voxels)), rtol=1e-4, atol=1e-5)


def test_volumes_that_are_not_there_are_told_before_anything_starts(recipe, settings, tmp_path):
    with pytest.raises(UserError, match="data.volumes"):
        pretrain.main(["--config", str(recipe), f"run_dir={tmp_path}/x", *settings,
                       "data.volumes.shards=/nowhere/v-*.tar"])  # fmt: skip
    assert not (tmp_path / "x").exists()
