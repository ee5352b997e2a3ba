"""A run's records in Weights & Biases and MLflow, by the real packages in their offline modes, and by broken ones."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import wandb_files
from PIL import Image

from prelude.data.errors import UserError
from prelude.pretrain import stopping
from prelude.pretrain.config import Config
from prelude.pretrain.monitors import CurvesMonitor, Report, StepRecord
from prelude.pretrain.schedules import Progress
from prelude.pretrain.trackers import tracker
from prelude.pretrain.trackers.tracker import trackers_of

RECORD = StepRecord(
    step=1, num_steps=6, epoch=0.5, loss=0.75, parts={"pixel_mse": 0.25}, lr=1e-3, weight_decay=0.05, grad_norm=2.0,
    images_per_second=321.0, data_wait=0.03, eta_seconds=3.0, skipped_steps=0, bad_samples=2, peak_memory=2**30,
)  # fmt: skip
PICTURE = Image.fromarray(np.arange(480 * 8 * 3, dtype=np.uint32).astype(np.uint8).reshape(8, 480, 3))


def config_of(run_dir: Path, **log) -> Config:
    return Config.model_validate(
        {
            "run_dir": str(run_dir),
            "data": {"shards": "x.tar"},
            "encoder": {"name": "vit_tiny_patch16_224", "image_size": 16, "kwargs": {"depth": 2}},
            "objective": {"name": "mae", "mask_ratio": 0.75},
            "train": {"epochs": 3, "global_batch": 16},
            "optimizer": {"lr": 0.01},
            "log": log,
        }
    )


def watch(config: Config, start: int, steps: list[int], finished: bool = False) -> CurvesMonitor:
    Path(config.run_dir).mkdir(exist_ok=True)
    monitor = CurvesMonitor(Path(config.run_dir), trackers_of(config))
    monitor.start(Progress(start, 6, 2.0))
    for step in steps:
        monitor.record(replace(RECORD, step=step, loss=1 / step))
        if step in (2, 4, 6):
            monitor.pictures(step, {"views": PICTURE})
        if step == 3:  # what was judged two steps ago
            monitor.report(Report(1, "evaluation", "k-NN 41.3 %", {"knn": 41.25}))
        if step in (2, 4, 6):  # in fine-tuning, at a step that is logged too
            monitor.report(Report(step, "validation", "held-out images", {"top1": 10.0 * step}))
        monitor.saving(step)
    if finished:
        monitor.report(Report(steps[-1], "verdict", "healthy features", {}))
        monitor.finish()
    monitor.close()
    return monitor


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """A run that was cut off after step 4, and went on from a checkpoint of step 2 to its end."""
    folder = tmp_path_factory.mktemp("watched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("WANDB_SILENT", "true")
        patch.setattr(tracker, "STOP_WAIT", tracker.LAST_WAIT)  # the real packages take a while
        uri = f"file:{folder}/mlruns"
        kept = {"wandb": {"project": "eyes", "mode": "offline"}, "mlflow": {"experiment": "eyes", "tracking_uri": uri}}
        config = config_of(folder / "run", **kept)
        watch(config, 0, [1, 2, 3, 4])
        changed = config.model_copy(update={"seed": 5})  # the records are told apart, though a run's would be the same
        watch(changed, 2, [3, 4, 5, 6], finished=True)
        yield folder, uri


def test_wandb_has_one_run_with_each_step_once(watched):
    folder, _ = watched
    first, second = wandb_files.runs(folder / "run")
    assert first["id"] == second["id"] and (first["project"], first["name"]) == ("eyes", "run")
    rows = [row for run in (first, second) for row in run["history"] if "train/loss" in row]
    assert [(row["_step"], row["train/loss"]) for row in rows] == [(s, pytest.approx(1 / s)) for s in range(1, 7)]
    assert rows[0]["parts/pixel_mse"] == 0.25 and rows[0]["train/images_per_second"] == 321.0
    online = [row for run in (first, second) for row in run["history"] if "online/knn" in row]
    assert [(row["online/step"], row["online/knn"]) for row in online] == [(1, 41.25)]
    held_out = [row for run in (first, second) for row in run["history"] if "held_out/top1" in row]
    assert [(row["_step"], row["held_out/top1"]) for row in held_out] == [(2, 20.0), (4, 40.0), (6, 60.0)]
    assert first["config"]["objective"] == {"name": "mae", "mask_ratio": 0.75}
    assert second["summary"]["verdict"] == "step 6: healthy features"
    assert (first["exit"], second["exit"]) == (1, 0)
    drawn = [path for run in (first, second) for path in sorted(run["files"].glob("media/images/pictures/views_*.png"))]
    assert len(drawn) == 3 and np.array_equal(np.asarray(Image.open(drawn[0]).convert("RGB")), np.asarray(PICTURE))


def test_mlflow_has_one_run_with_each_step_once(watched, monkeypatch):
    from mlflow import MlflowClient

    folder, uri = watched
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("eyes").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    found = sorted((metric.step, metric.value) for metric in losses)
    assert found == [(step, pytest.approx(1 / step)) for step in range(1, 7)]
    (knn,) = client.get_metric_history(run.info.run_id, "online/knn")
    assert (knn.step, knn.value) == (1, 41.25)
    held_out = client.get_metric_history(run.info.run_id, "held_out/top1")
    assert sorted((metric.step, metric.value) for metric in held_out) == [(2, 20.0), (4, 40.0), (6, 60.0)]
    assert run.data.params["objective.mask_ratio"] == "0.75" and run.data.params["seed"] == "0"
    assert run.data.tags["verdict"] == "step 6: healthy features"
    assert "seed: 5" in Path(client.download_artifacts(run.info.run_id, "config.yaml", str(folder))).read_text()
    drawn = [entry.path for entry in client.list_artifacts(run.info.run_id, "images") if entry.path.endswith(".png")]
    assert sorted(int(re.search(r"step\D(\d+)", path)[1]) for path in drawn) == [2, 4, 6]


def test_another_project_gets_a_run_of_its_own(watched, tmp_path, monkeypatch):
    folder = tmp_path
    shutil.copytree(watched[0] / "run", folder / "run")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(tracker, "STOP_WAIT", tracker.LAST_WAIT)
    config = config_of(folder / "run", wandb={"project": "ears", "mode": "offline", "name": "again"})
    watch(config, 2, [3])
    *earlier, last = wandb_files.runs(folder / "run")
    assert last["id"] not in {run["id"] for run in earlier} and (last["project"], last["name"]) == ("ears", "again")
    assert [row["_step"] for row in last["history"]] == [3]


BROKEN = {
    "cannot be imported": "raise RuntimeError('no good today')",
    "cannot begin": "def init(**_): raise RuntimeError('no good today')",
    "ends its process at the start": "import os\ndef init(**_): os._exit(9)",
    "refuses what it is told": "def log(self, *_, **__): raise RuntimeError('no good today')",
    "ends its process": "import os\ndef log(self, *_, **__): os._exit(9)",
    "never answers": "import time\ndef log(self, *_, **__): time.sleep(600)",
    "never ends": "import time\ndef log(self, *_, **__): pass\ndef finish(self, **_): time.sleep(600)",
}
SOUND = """
class Settings:
    def __init__(self, **_): pass
class Image:
    def __init__(self, picture): pass
class Run:
    step, summary = 0, {}
    log = globals().get("log", lambda self, *_, **__: None)
    finish = globals().get("finish", lambda self, **_: None)
    def define_metric(self, *_, **__): pass
init = globals().get("init") or (lambda **_: Run())
"""


@pytest.mark.parametrize("how", BROKEN)
def test_a_package_that_fails_is_told_once_and_the_run_goes_on(how, tmp_path, monkeypatch, caplog):
    (tmp_path / "wandb.py").write_text(f"{BROKEN[how]}\n{SOUND}")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(tracker, "LAST_WAIT", 2.0 if "never" in how else 60.0)
    monitor = watch(config_of(tmp_path / "run", wandb={"project": "eyes"}), 0, [1, 2, 3, 4, 5, 6], finished=True)
    (told,) = caplog.messages
    assert told.startswith("Weights & Biases has no records of this run (") and told.endswith(
        "; the run goes on without"
    )
    expected = "ended with code 9" if "ends its" in how else "does not answer" if "never" in how else "no good today"
    assert expected in told
    assert monitor.trackers[0].process.poll() is not None and (tmp_path / "run" / "tensorboard").is_dir()


def test_a_failure_that_passes_costs_what_was_recorded_meanwhile(tmp_path, monkeypatch, caplog):
    log = "def log(self, values, step):\n    if step in (2, 3): raise OSError(28, 'No space left on device')\n"
    log += "    if 'train/loss' in values: open(FILE, 'a').write(f'{step} ')\n"
    (tmp_path / "wandb.py").write_text(f"FILE = {str(tmp_path / 'steps')!r}\n{log}{SOUND}")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    watch(config_of(tmp_path / "run", wandb={"project": "eyes"}), 0, [1, 2, 3, 4, 5], finished=True)
    assert (tmp_path / "steps").read_text().split() == ["1", "4", "5"] and len(caplog.messages) == 1
    kept = json.loads((tmp_path / "run" / "trackers" / "wandb.json").read_text())
    assert kept["steps"]["train"] == 5


def test_what_waits_for_a_service_has_a_limit(tmp_path, monkeypatch, caplog):
    (tmp_path / "wandb.py").write_text(f"{BROKEN['never answers']}\n{SOUND}")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(tracker, "STOP_WAIT", 0.1)
    monkeypatch.setattr(tracker, "MOST", 8)
    watch(config_of(tmp_path / "run", wandb={"project": "eyes"}), 0, list(range(1, 300)))
    assert "it is 8 records behind" in caplog.messages[0] and len(caplog.messages) == 2


def test_a_service_that_has_caught_up_is_told_everything_again(tmp_path, monkeypatch, caplog):
    hold, taken = tmp_path / "hold", tmp_path / "taken"
    log = "import os, time\ndef log(self, values, step):\n"
    log += f"    while os.path.exists({str(hold)!r}): time.sleep(0.01)\n"
    log += f"    if 'train/loss' in values: open({str(taken)!r}, 'a').write(f'{{step}} ')\n"
    (tmp_path / "wandb.py").write_text(f"{log}{SOUND}")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(tracker, "MOST", 8)
    config = config_of(tmp_path / "run", wandb={"project": "eyes"})
    Path(config.run_dir).mkdir()
    service = trackers_of(config)[0]
    service.start()
    for first in (1, 101):
        hold.touch()
        for step in range(first, first + 50):
            service.add_scalars(step, {"train/loss": 1.0})
        hold.unlink()
        deadline = time.monotonic() + 60
        while service.taken < service.given and time.monotonic() < deadline:
            time.sleep(0.01)
    service.add_scalars(201, {"train/loss": 1.0})
    service.end(True)
    service.close()
    assert taken.read_text().split() == [str(step) for step in (*range(1, 9), *range(101, 109), 201)]
    assert ["8 records behind" in message for message in caplog.messages] == [True, True]


class Silent:
    """A process that takes what it is given and never answers."""

    def __init__(self, *_, **__):
        self.stdin, self.stdout, self.returncode, self.killed = io.StringIO(), io.StringIO(), None, threading.Event()

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self.returncode = -signal.SIGKILL
        self.killed.set()

    def wait(self) -> int:
        self.killed.wait()
        return self.returncode


@pytest.mark.parametrize(
    "finished, asked_after, waited",
    [
        (True, 1e9, 60.0),
        (False, 1e9, 15.0),
        (True, 0.0, 15.0),
        (True, 20.0, 20.0),
    ],
)
def test_silent_services_are_waited_for_together_and_less_where_a_run_ends_early(
    finished, asked_after, waited, tmp_path, monkeypatch, caplog
):
    """By a clock that moves where somebody sleeps. A run is asked to end by its STOP file, which is no signal."""
    monkeypatch.setattr(tracker, "STOP_WAIT", 15.0)  # a fixture of this file has another
    now = [0.0]
    sleep = lambda seconds: now.__setitem__(0, now[0] + seconds)  # noqa: E731
    monkeypatch.setattr(tracker, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(tracker, "subprocess", SimpleNamespace(Popen=Silent, PIPE=subprocess.PIPE))
    config = config_of(tmp_path / "run", wandb={"project": "eyes"}, mlflow={"experiment": "eyes"})
    with stopping.postponed(besides=lambda: now[0] >= asked_after):
        watch(config, 0, [1, 2], finished=finished)
    assert ["does not answer" in message for message in caplog.messages] == [True, True]
    assert waited <= now[0] < waited + 1


KILLED_RUN = """
import os, signal, sys, time
from prelude.pretrain.config import Config
from prelude.pretrain.trackers.tracker import trackers_of
service = trackers_of(Config.model_validate_json(sys.argv[1]))[0]
service.start()
for step in range(20):
    service.add_scalars(step, {"train/loss": 1.0})
while not service.taken:
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_is_recorded_as_far_as_it_had_told(tmp_path, monkeypatch):
    taken, ended = tmp_path / "taken", tmp_path / "ended"
    log = f"import time\ndef log(self, values, step):\n    time.sleep(0.02)\n    open({str(taken)!r}, 'a').write('.')\n"
    (tmp_path / "wandb.py").write_text(f"{log}def finish(self, **_): open({str(ended)!r}, 'w')\n{SOUND}")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    config = config_of(tmp_path / "run", wandb={"project": "eyes"})
    Path(config.run_dir).mkdir()
    killed = subprocess.run([sys.executable, "-c", KILLED_RUN, config.model_dump_json()], cwd=tmp_path, timeout=100)
    assert killed.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while not ended.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended.exists() and taken.read_text() == "." * 20


def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path, caplog):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trackers").write_text("in the way")
    watch(config_of(tmp_path / "run", wandb={"project": "eyes"}), 0, [1, 2])
    assert len(caplog.messages) == 1 and "File exists" in caplog.messages[0]


def test_a_missing_package_is_told_with_the_extra_that_brings_it(monkeypatch, tmp_path):
    monkeypatch.setattr(tracker.importlib.util, "find_spec", lambda name: None)
    for name, section in (("wandb", {"project": "x"}), ("mlflow", {"experiment": "x"})):
        with pytest.raises(UserError, match=rf"log.{name} needs .* pip install 'prelude-ssl\[{name}\]'"):
            tracker.check(config_of(tmp_path, **{name: section}).log)
    tracker.check(config_of(tmp_path).log)
