"""Whole runs on a GPU, as a user starts them, with everything between a shard and a step. See `on_gpu.py`."""

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def fed(toy: bool, seconds: float, folder: Path) -> dict:
    """MAE with a ViT-B on JPEGs as large as ImageNet's, and on the same packed with a short side of 256: whether the
    data path of one machine keeps its GPU busy."""
    size = (120, 90) if toy else (500, 375)
    for name in ("packed", "mae-photos", "mae-packed"):  # of a try that failed
        shutil.rmtree(folder / name, ignore_errors=True)
    write_photos(folder / "photos", num_shards=2 if toy else 16, images_a_shard=16 if toy else 200, size=size)
    photos = f"{folder}/photos/photos-*.tar"
    short = ["--short-side", "64" if toy else "256"]
    pack = [sys.executable, str(ROOT / "launch/shards.py"), "pack", photos, "--to", str(folder / "packed"), *short]
    packed = subprocess.run(pack, env=_plain_env(), capture_output=True, text=True)
    if packed.returncode:
        raise RuntimeError(packed.stderr.strip().splitlines()[-1])
    found = {}
    for name, shards in (("photos", photos), ("packed", f"{folder}/packed/*.tar")):
        settings = [
            f"data.shards={shards}",
            "optimizer.warmup_epochs=0",
            "optimizer.warmup_lr=0",
            f"log.every_steps={1 if toy else 10}",
        ]
        settings += ["train.global_batch=16", "train.epochs=2"] if toy else ["train.global_batch=512"]
        run_dir = folder / f"mae-{name}"
        records = _trained("mae_cifar10" if toy else "mae_vit_base", settings, run_dir, seconds / 2)
        found |= {f"{key}_{name}": value for key, value in _speeds(records).items()}
    return found


def run(toy: bool, seconds: float, folder: Path) -> dict:
    """Barlow Twins with a ResNet-18 on the embedded data, for so many seconds, and k-NN of what it learned. Run
    again, it goes on."""
    from prelude.data.shapes import write_shards

    write_shards(folder / "shapes", "train", 64 if toy else 20_000)
    write_shards(folder / "shapes", "test", 32 if toy else 2_000)
    train, test, run_dir = f"{folder}/shapes/train-*.tar", f"{folder}/shapes/test-*.tar", folder / "barlow"
    settings = [f"data.shards={train}"]
    settings += (
        ["train.global_batch=16", "train.epochs=1", "optimizer.warmup_epochs=0", "optimizer.warmup_lr=0"] if toy else []
    )
    records = _trained("barlow_cifar10", settings, run_dir, seconds)
    found = {"steps": records[-1]["step"], "of": records[-1]["num_steps"], "loss": records[-1]["loss"]}
    found |= _speeds(records)
    if not toy:
        judge = [sys.executable, str(ROOT / "launch/knn.py"), str(run_dir), f"random:{run_dir}"]
        judge += ["--train", train, "--test", test]
        said = subprocess.run(judge, env=_plain_env(), capture_output=True, text=True, timeout=200)
        if said.returncode:
            raise RuntimeError(f"k-NN: {(said.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
        found["knn"] = " / ".join(line.strip() for line in said.stdout.splitlines()[-6:])
    return found


def resumed(toy: bool, folder: Path) -> dict:
    """Whether a run that is stopped and goes on ends with the weights of one that is not, to the last bit; and whether
    two that are not stopped do, for not all of a GPU's kernels add in the same order every time."""
    from prelude.data.shapes import write_shards

    write_shards(folder / "few", "train", 128 if toy else 512)
    settings = [f"data.shards={folder}/few/train-*.tar", "train.global_batch=64", "train.epochs=6"]
    settings += ["optimizer.warmup_epochs=1", "checkpoint.every_steps=100", "log.every_steps=1"]
    weights, after = {}, {}
    for name in ("whole", "stopped") if toy else ("whole", "again", "stopped"):
        run_dir = folder / f"resumed-{name}"
        shutil.rmtree(run_dir, ignore_errors=True)
        if name == "stopped":
            after[name] = len(_trained("mae_cifar10", settings, run_dir, 60, stop_after=4 if toy else 20))
        ended = _trained("mae_cifar10", settings, run_dir, 60)[-1]
        if ended["step"] != ended["num_steps"]:
            raise RuntimeError("a run did not come to its end in a minute")
        *_, last = sorted((run_dir / "checkpoints").glob("step-*"))
        parts = [file.read_bytes() for file in sorted(last.glob("model*"))]
        weights[name] = hashlib.blake2b(b"".join(parts)).hexdigest()
    found = {"bitwise": weights["stopped"] == weights["whole"], "stopped_after": after["stopped"]}
    return found if toy else found | {"bitwise_unstopped": weights["again"] == weights["whole"]}


def _trained(recipe: str, settings: list[str], run_dir: Path, seconds: float, stop_after: int = 0) -> list[dict]:
    """Its log, of a run that is asked to stop after so many seconds, or logged steps. Raises RuntimeError where it
    failed."""
    (run_dir / "STOP").unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "launch/pretrain.py"), "--config", recipe, f"run_dir={run_dir}", *settings]
    errors = tempfile.TemporaryFile("w+")
    training = subprocess.Popen(command, env=_plain_env(), stderr=errors)
    log, until = run_dir / "metrics.jsonl", time.monotonic() + seconds
    while training.poll() is None and time.monotonic() < until:
        if stop_after and log.is_file() and log.read_text().count("\n") >= stop_after:
            break
        time.sleep(0.02)
    if training.poll() is None:
        (run_dir / "STOP").touch()
    if (code := training.wait(timeout=120)) not in (0, 75):
        errors.seek(0)
        said = (errors.read().strip().splitlines() or [""])[-1]
        raise RuntimeError(f"training ended with exit code {code}: {said}")
    return [json.loads(line) for line in log.read_text().splitlines()]


def _speeds(records: list[dict]) -> dict:
    half = records[len(records) // 2 :]
    return {key: statistics.median(r[key] for r in half) for key in ("images_per_second", "data_wait", "mfu")}


def _plain_env() -> dict[str, str]:
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in ranks}


def write_photos(folder: Path, num_shards: int, images_a_shard: int, size: tuple[int, int]) -> None:
    """Coarse colours under fine grain: JPEGs of about a hundred kilobytes at 500 x 375."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(folder / f"photos-{shard:06d}.tar", shard, images_a_shard, size) for shard in range(num_shards)]
    workers = min(num_shards, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:  # none of them uses a GPU
        list(pool.map(_write_shard, *zip(*wanted, strict=True)))


def _write_shard(path: Path, shard: int, num_images: int, size: tuple[int, int]) -> None:
    from PIL import Image

    generator = np.random.default_rng(shard)
    with tarfile.open(path, "w") as tar:
        for nth in range(num_images):
            coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, 3)
            grain = generator.normal(0, 22, (size[1], size[0], 1))
            picture = Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=90)
            for name, content in ((f"{shard:03d}{nth:05d}.jpg", file.getvalue()), (f"{shard:03d}{nth:05d}.cls", b"0")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
