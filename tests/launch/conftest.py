"""A small run that every test of the doors starts in its own way."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from data.shapes import write_shards

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
NUM_SAMPLES = 200
NUM_STEPS = 38  # ceil(3 epochs x 200 samples / 16), so that epochs end in mid-batch


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    write_shards(folder / "shapes", "train", num_samples=NUM_SAMPLES, seed=0, image_size=16)
    config = {
        "run_dir": str(folder / "run"),
        "data": {"shards": str(folder / "shapes" / "train-*.tar"), "num_workers": 1, "shuffle": {"window": 64}},
        "encoder": {
            "name": "vit_tiny_patch16_224",
            "image_size": 16,
            "patch_size": 4,
            "kwargs": {"depth": 2, "embed_dim": 32, "num_heads": 2},
        },
        "objective": {"name": "mae", "decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
        "train": {"epochs": 3, "global_batch": 16, "precision": "fp32"},
        "optimizer": {"lr": 0.01, "warmup_epochs": 0.5},
        "checkpoint": {"every_steps": 5, "keep": 2},
        "log": {"every_steps": 1, "pictures_every_steps": 20},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class Run:
    """One start of the door `launch/pretrain.py`, in a process group of its own."""

    def __init__(self, launcher: list[str], recipe: Path, run_dir: Path, *overrides: str, cwd: Path = ROOT):
        self.run_dir = run_dir
        script = str(ROOT / "launch" / "pretrain.py")
        command = [*launcher, script, "--config", str(recipe), f"run_dir={run_dir}", *overrides]
        path = f"{BIN}:{os.environ['PATH']}"
        env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(Path(__file__).parent)}
        run_dir.mkdir(parents=True, exist_ok=True)
        self.output = run_dir.parent / f"{run_dir.name}.out"
        with open(self.output, "a") as output:
            self.process = subprocess.Popen(
                command, env=env | {"RECORD_TO": str(run_dir)}, cwd=cwd, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip

    def wait(self) -> int:
        return self.process.wait(timeout=240)

    def at_step(self, step: int) -> "Run":
        """Waits until this many steps are logged and the run still goes on."""
        until = time.monotonic() + 240
        while len(self.metrics()) < step:
            assert self.process.poll() is None and time.monotonic() < until, self.output.read_text()[-3000:]
            time.sleep(0.005)
        return self

    def signal_group(self, number: signal.Signals) -> "Run":
        os.killpg(self.process.pid, number)
        return self

    def metrics(self) -> list[dict]:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def final_weights(self) -> dict:
        return load_file(self.run_dir / "checkpoints" / f"step-{NUM_STEPS:08d}" / "model.safetensors")

    def records(self) -> dict[int, dict]:
        """What was drawn for each position, over all ranks and all starts; a position drawn twice must agree."""
        found = {}
        for path in self.run_dir.glob("rank*.jsonl"):
            for line in path.read_text().splitlines():
                record = json.loads(line)
                assert found.setdefault(record["position"], record) == record
        return found


def deepspeed(num_ranks: int) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [str(BIN / "deepspeed"), "--num_gpus", str(num_ranks), "--master_port", str(port)]
