"""One training of any arm of the league, in processes of its own, with its wall seconds and what else the cores did.

- What counts: the wall time from before the first batch is fetched to the end of the last step, with waits for data.
  Imports, the index, building, compiling, the last save and judging do not count.
- What is equal: the pictures, the encoder, the cores, one process at a time.
- Each arm may share the cores as suits it best: a few ways are tried for some steps, and the fastest is kept.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from league_peer import POSITIONS

from prelude.data.host import num_cores
from prelude.data.patterns import expand
from prelude.data.shards import ShardIndex
from prelude.launch.children import free_port
from prelude.objectives import options_for
from prelude.pretrain.config import Config
from prelude.pretrain.encoders import build_encoder
from prelude.pretrain.recipes import load_config

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TRIED_STEPS, SKIPPED_STEPS = 25, 10  # of a trial; the first are no measure
PEERS = {"lightly": "league_lightly.py", "stable-pretraining": "league_stable.py"}
# How an arm may share the cores: ranks of the launcher, or loader workers and the precision of the network.
WAYS = {
    "prelude": [{"ranks": 2}, {"ranks": 1}],
    "lightly": [{"workers": workers, "precision": what} for workers, what in ((2, "fp32"), (1, "bf16"), (2, "bf16"))],
}
WAYS["stable-pretraining"] = WAYS["lightly"]


@dataclass(frozen=True)
class Training:
    """One run of one arm."""

    method: str
    arm: str
    setting: str
    seed: int
    steps: int
    way: Mapping
    folder: Path  # is made anew
    data: str  # shards
    pictures: Path | None  # the same as a folder of files, for peers
    python: str = sys.executable  # that peers are started by
    trial: bool = False
    changes: Sequence[str] = field(default=())  # settings of ours, for all arms


@dataclass(frozen=True)
class Trained:
    steps: int
    seconds: float
    batch: int
    others: float  # share of the cores' time that processes other than the run's took meanwhile, 0..1
    log: list  # of [step, seconds, loss]
    version: str
    images_per_second: float  # once it is under way
    precision: str


class Failed(Exception):
    """A run that came to no end, with the last that it said."""


def recipe_name(method: str) -> str:
    """method: of ours, or the file of a recipe."""
    if method.endswith(".yaml"):
        return str(Path(method).resolve())
    return {"barlow_twins": "barlow", "spark": "spark_resnet18"}.get(method, method) + "_cifar10"


def recipe(method: str, changes: Sequence[str] = ()) -> Config:
    return load_config(recipe_name(method), list(changes), options_for)


def train(training: Training) -> Trained:
    """Raises Failed."""
    shutil.rmtree(training.folder, ignore_errors=True)
    training.folder.mkdir(parents=True)
    return _prelude(training) if training.arm == "prelude" else _peer(training)


# ---- our arm


def _prelude(training: Training) -> Trained:
    config, run = recipe(training.method, training.changes), training.folder / "run"
    epochs = (training.steps - 0.5) * config.train.global_batch / num_pictures(training.data)
    warmup = config.optimizer.warmup_epochs / config.train.epochs * epochs
    every = 5 if training.trial else max(training.steps // 40, 1)
    settings = [f"run_dir={run}", f"seed={training.seed}", f"data.shards={training.data}", f"train.epochs={epochs}"]
    settings += [f"optimizer.warmup_epochs={warmup}", "evaluate=null", "log.pictures_every_steps=0"]
    settings += [f"log.every_steps={every}", "checkpoint.every_steps=1000000", *training.changes]
    door = [str(ROOT / "launch" / "pretrain.py"), "--config", recipe_name(training.method), *settings]
    ranks = training.way["ranks"]
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(free_port())]
    others = _finished(
        [sys.executable, *(launcher if ranks > 1 else []), *door], training, threads=num_cores() // ranks
    )
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, seconds, log, steady = 0, 0.0, [], []
    for record in records:
        took = record["step_seconds"] * (record["step"] - before)
        steady += [(record["step"] - before, took)] if before >= SKIPPED_STEPS else []
        seconds, before = seconds + took, record["step"]
        log.append([record["step"], round(seconds, 2), record["loss"]])
    batch = config.train.global_batch
    steady = steady or [(before, seconds)]
    speed = batch * sum(n for n, _ in steady) / sum(took for _, took in steady)
    kept = json.loads((run / "environment.json").read_text()) if (run / "environment.json").is_file() else {}
    return Trained(before, seconds, batch, others, log, _commit(), speed, str(kept.get("precision", "auto")))


# ---- peers


def _peer(training: Training) -> Trained:
    config = recipe(training.method, training.changes)
    spec = {
        "method": training.method,
        "setting": training.setting,
        "seed": training.seed,
        "steps": training.steps,
        "trial": training.trial,
        "pictures": str(training.pictures),
        "image_size": config.encoder.size[0],
        "encoder": timm_arguments(config),
        "batch_limit": num_pictures(training.data),
        "ours": ours(config),
        **training.way,
    }
    (training.folder / "spec.json").write_text(json.dumps(spec, indent=1))
    if (positions := positions_of(config)) is not None:
        torch.save(positions, training.folder / POSITIONS)
    script = [str(HERE / PEERS[training.arm]), str(training.folder / "spec.json")]
    others = _finished([training.python, *script], training, threads=num_cores())
    found = json.loads((training.folder / "result.json").read_text())
    ends, batch = found["ends"], found["batch"]
    skipped = min(SKIPPED_STEPS, len(ends) // 2)
    speed = batch * found["steps"] / found["seconds"]
    if len(ends) > 1:
        speed = batch * (len(ends) - skipped) / (ends[-1] - (ends[skipped - 1] if skipped else 0.0))
    way = str(training.way["precision"])
    return Trained(found["steps"], found["seconds"], batch, others, found["log"], found["version"], speed, way)


def timm_arguments(config: Config) -> dict:
    encoder = config.encoder
    arguments = dict(encoder.kwargs) | ({"patch_size": encoder.patch_size} if encoder.patch_size else {})
    if "resnet" not in encoder.name:
        arguments["img_size"] = list(encoder.size)
    return {"name": encoder.name, "arguments": arguments}


def positions_of(config: Config) -> torch.Tensor | None:
    """The fixed table of our recipe's encoder, (1, prefix + L, D), where it has one."""
    return dict(build_encoder(config.encoder, seed=0).named_buffers()).get("pos_embed")


def ours(config: Config) -> dict:
    """Our recipe, as a peer takes it."""
    optimizer, scale = config.optimizer, config.peak_lr / config.optimizer.lr
    objective = options_for(config.objective["name"]).model_validate(
        {key: value for key, value in config.objective.items() if key != "name"}
    )
    return {
        "objective": objective.model_dump(mode="json"),
        "lr": config.peak_lr,
        "min_lr": optimizer.min_lr * scale,
        "betas": list(optimizer.betas),
        "weight_decay": optimizer.weight_decay,
        "warmup": optimizer.warmup_epochs / config.train.epochs,
        "batch": config.train.global_batch,
    }


def pictures_of(data: str, folder: Path) -> Path:
    """The pictures of the shards as files, by class: what the peers' data sets read. Labels are not used."""
    done = folder.with_name(f"{folder.name}.done")
    if not done.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        for shard in expand(data):
            with tarfile.open(shard) as tar:
                _extract(tar, folder)
        done.touch()
    return folder


def _extract(tar: tarfile.TarFile, folder: Path) -> None:
    images, classes = {}, {}
    for member in tar:
        key, _, extension = member.name.rpartition(".")
        if extension in ("jpg", "jpeg", "png"):
            images[key] = (extension, tar.extractfile(member).read())
        elif extension == "cls":
            classes[key] = tar.extractfile(member).read().decode().strip()
    for key, (extension, content) in images.items():
        place = folder / classes.get(key, "0") / f"{key.replace('/', '_')}.{extension}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)


def versions(python: str) -> dict[str, str]:
    """Of the peers that this interpreter has."""
    code = (
        "import importlib.metadata as m, json, sys\nfound = {}\nfor name in sys.argv[1:]:\n try: found[name] = "
        "m.version(name)\n except m.PackageNotFoundError: pass\nprint(json.dumps(found))"
    )
    command = [python, "-c", code, *PEERS]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


# ---- processes and cores


def _finished(command: list[str], training: Training, threads: int) -> float:
    """Runs to its end, into a log; returns the others' share of the cores. Raises Failed."""
    log = training.folder / "log.txt"
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(max(threads, 1)), "CUDA_VISIBLE_DEVICES": ""}
    watch = OtherWork()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=env, cwd=ROOT, start_new_session=True)
        try:
            code = process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
    if code:
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise Failed(" / ".join(said[-2:])[-400:] or f"exit code {code}")
    return watch.share()


class OtherWork:
    """The share of the cores' time that processes other than this one and its children take; of Linux."""

    def __init__(self):
        self.since, self.before, self.own = time.monotonic(), _busy_seconds(), _own_seconds()

    def share(self) -> float:
        busy, own = _busy_seconds() - self.before, _own_seconds() - self.own
        return round(max(busy - own, 0.0) / (time.monotonic() - self.since) / num_cores(), 3)


def _busy_seconds() -> float:
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in both)


@cache
def num_pictures(data: str) -> int:
    return ShardIndex(data).num_samples


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
