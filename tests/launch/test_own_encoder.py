"""A network that timm lacks goes the whole way: trained, stopped, resumed, judged, compared, fine-tuned, exported."""

import json
import os
import signal
import subprocess
import sys

import pytest
import several_starts
import torch
from own_networks import small_transformer
from runs import BIN, LAUNCHED, ROOT, Run, deepspeed
from safetensors.torch import load_file

from prelude.checkpoints.export import export_encoder
from prelude.checkpoints.sources import open_encoder
from prelude.checkpoints.store import read_meta
from prelude.data.errors import UserError
from prelude.data.shapes import write_shards
from prelude.launch import check_encoder, compare, finetune, knn, pretrain
from prelude.pretrain import distributed

TRANSFORMER = ["encoder.name=own_networks:small_transformer", "encoder.kwargs={width: 16}", "encoder.patch_size=null"]
CONVNET = ["encoder.name=own_networks:small_convnet", "encoder.kwargs={width: 4}", "encoder.patch_size=null"]
SPARK = ["objective={name: spark, decoder_dim: 16}", *CONVNET]


@pytest.fixture(scope="module")
def runs(recipe, tmp_path_factory):
    """MAE around a transformer on two ranks, stopped in the middle and resumed on one; SparK around a convnet."""
    folder = tmp_path_factory.mktemp("own")
    mae, spark = folder / "mae", folder / "spark"
    Run(deepspeed(2), recipe, mae, *TRANSFORMER).at_step(6).signal_group(signal.SIGTERM).wait()
    plan = [
        {"name": run.name, "argv": ["--config", str(recipe), f"run_dir={run}", *settings]}
        for run, settings in ((mae, TRANSFORMER), (spark, SPARK))
    ]
    answers = several_starts.made([sys.executable], folder, plan)
    assert all(codes == [0] for codes, _ in answers.values()), answers
    return {"mae": mae, "spark": spark}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    for split, count in (("train", 40), ("test", 20)):
        write_shards(folder, split, num_samples=count, seed=1, image_size=16)
    return ["--train", str(folder / "train-*.tar"), "--test", str(folder / "test-*.tar")]


def test_the_run_goes_on_where_it_stopped(runs):
    metrics = [json.loads(line) for line in (runs["mae"] / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics] == list(range(1, 39))
    meta = read_meta(max((runs["mae"] / "checkpoints").glob("step-*")))
    assert meta["encoder"]["name"] == "own_networks:small_transformer"
    assert set(meta["own_code"]) == {"own_networks:small_transformer"}


def test_other_settings_of_the_function_are_another_run(runs, recipe):
    arguments = ["--config", str(recipe), f"run_dir={runs['mae']}", *TRANSFORMER, "encoder.kwargs.patch_size=4"]
    with pytest.raises(UserError, match="encoder.kwargs.patch_size: None -> 4"):
        pretrain.main(arguments)
    distributed.stop()


@pytest.mark.parametrize("run", ["mae", "spark"])
def test_it_is_exported_with_the_name_of_its_function(runs, run, tmp_path):
    report = export_encoder(str(runs[run]), tmp_path / "export")
    assert "features of its function differ from ours by at most" in str(report)
    opened, again = open_encoder(str(runs[run])), open_encoder(str(tmp_path / "export"))
    assert opened.fingerprint == again.fingerprint == report.fingerprint
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(opened.model(images), again.model(images))
    with pytest.raises(UserError, match="timm"):
        open_encoder(f"timm:{opened.config.name}")


def test_the_card_of_an_export_says_how_to_load_it_without_our_packages(runs, tmp_path):
    export_encoder(str(runs["mae"]), tmp_path / "export")
    code = (tmp_path / "export" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = f"import sys, torch\nimages = torch.ones(2, 3, 16, 16)\n{code}\nassert 'prelude' not in sys.modules"
    code += "\ntorch.save(features, 'features.pt')"
    env = os.environ | LAUNCHED
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "export", env=env, check=True)
    plain = small_transformer((16, 16))
    plain.load_state_dict(load_file(tmp_path / "export" / "model.safetensors"))
    expected = plain.eval()(torch.ones(2, 3, 16, 16))
    torch.testing.assert_close(torch.load(tmp_path / "export" / "features.pt"), expected)
    assert f"(B, 3, 16, 16) to (B, {expected.shape[1]})" in code


def test_it_is_judged_and_compared(runs, labelled, tmp_path):
    out = ["--out", str(tmp_path / "results"), "--bank", str(tmp_path / "bank")]
    sources = [str(runs["mae"]), str(runs["spark"]), f"random:{runs['mae']}"]
    assert knn.main([*sources, *labelled, *out]) == 0
    found = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json")]
    assert len(found) == 3
    assert (
        compare.main(
            [*sources[:2], *labelled, "--out", str(tmp_path / "compared"), "--evaluators", "knn", "--no-floors"]
        )
        == 0
    )


def test_it_is_fine_tuned(runs, labelled, tmp_path):
    given = [
        "--config",
        str(ROOT / "configs" / "finetune_vit_cifar10.yaml"),
        *labelled,
        f"run_dir={tmp_path / 'tuned'}",
    ]
    small = ["train.epochs=1", "optimizer.warmup_epochs=0", "train.global_batch=8", "data.num_workers=1"]
    arguments = [str(runs["mae"]), *given, *small]
    with pytest.raises(UserError, match=r"^objective.drop_path=0.1 is handed to .* objective.drop_path=0, or give"):
        finetune.main([*arguments, "objective.drop_path=0.1"])
    with pytest.raises(UserError, match="SmallTransformer that says what its layers are.* objective.layer_decay=1"):
        finetune.main([*arguments, "objective.drop_path=0"])
    assert finetune.main([*arguments, "objective.drop_path=0", "objective.layer_decay=1"]) == 0


def test_a_run_starts_from_an_earlier_one(runs, recipe, tmp_path, capsys):
    arguments = ["--config", str(recipe), f"run_dir={tmp_path / 'again'}", *TRANSFORMER, "--dry-run"]
    assert pretrain.main([*arguments, f"encoder.weights={runs['mae']}"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "own_networks:small_transformer, 18 of 18 tensors loaded" in said


def test_the_door_says_what_it_can_serve(capsys):
    small = ["encoder.image_size=32"]
    assert check_encoder.main(["own_networks:small_convnet", *small]) == 0
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "8 x 16 x 16, 16 x 8 x 8, 32 x 4 x 4" in words and "spark can use it" in words
    assert "mae encoder.name=own_networks:small_convnet has no forward_tokens" in words
    with pytest.raises(UserError, match="returns a dict"):
        check_encoder.main(["own_networks:no_network", *small])
    with pytest.raises(UserError, match=r"another encoder each time: .* is first \(\d+, .*; let encoder.kwargs alone"):
        check_encoder.main(["own_networks:another_each_time", *small])


def test_what_the_network_lacks_is_asked_for_before_anything_is_built(recipe, tmp_path):
    for override, lacks in {
        "train.gradient_checkpointing=true": "no set_grad_checkpointing",
        "optimizer.layer_decay=0.5": "no group_matcher",
    }.items():
        with pytest.raises(UserError, match=lacks):
            pretrain.main(["--config", str(recipe), f"run_dir={tmp_path}", *TRANSFORMER, override, "--dry-run"])


def test_the_current_folder_is_searched(tmp_path):
    (tmp_path / "mine.py").write_text((ROOT / "tests" / "helpers" / "own_networks.py").read_text())
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [BIN / "python", ROOT / "launch" / "check_encoder.py", "mine:small_convnet", "encoder.image_size=16"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
