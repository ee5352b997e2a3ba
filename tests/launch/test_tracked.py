"""A run by its door that keeps its records in Weights & Biases and in MLflow too."""

import wandb_files

from prelude.launch import prelude
from prelude.launch.exit_codes import door
from prelude.pretrain.trackers import tracker


def test_a_run_is_in_both_with_its_pictures(recipe, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setattr(tracker, "LAST_WAIT", 240.0)  # on a busy machine MLflow is imported for a minute
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run_dir, tracked = tmp_path / "run", ["log.wandb.project=eyes", "log.mlflow.experiment=eyes"]
    settings = [f"run_dir={run_dir}", "train.epochs=0.5", "optimizer.warmup_epochs=0", "log.pictures_every_steps=7"]
    assert prelude.main(["pretrain", "--config", str(recipe), *settings, *tracked]) == 0
    (run,) = wandb_files.runs(run_dir)
    steps = [row["_step"] for row in run["history"] if "train/loss" in row]
    assert steps == list(range(1, 8)) and run["exit"] == 0 and run["config"]["train"]["epochs"] == 0.5
    assert len(list(run["files"].glob("media/images/pictures/reconstruction_*.png"))) == 1
    client = MlflowClient()
    (there,) = client.search_runs([client.get_experiment_by_name("eyes").experiment_id])
    losses = {row["_step"]: row["train/loss"] for row in run["history"] if "train/loss" in row}
    history = client.get_metric_history(there.info.run_id, "train/loss")
    assert {metric.step: metric.value for metric in history} == losses and there.info.status == "FINISHED"


def test_a_missing_package_is_told_before_anything_is_built(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    argv = ["pretrain", "--config", str(recipe), f"run_dir={tmp_path}/run", "log.wandb.project=eyes"]
    assert door(lambda: prelude.main(argv)) == 2
    assert "pip install 'prelude-ssl[wandb]', or write log.wandb=null" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
