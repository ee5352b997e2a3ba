"""What `on_gpu.py` measures, one function an entry. Each returns a flat dictionary of numbers and words.

All data are made on the spot. `toy` is the same at a size for a CPU, whose figures say nothing.
"""

import argparse
import gc
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))  # so that it runs as a script from anywhere

import numpy as np  # noqa: E402
import torch  # noqa: E402

# name: (recipe, encoder where it is another, images at once, recipe of the toy)
STEPS = {
    "mae-b": ("mae_vit_base", None, 256, "mae_cifar10"),
    "ijepa-b": ("ijepa_vit_base", None, 128, "ijepa_cifar10"),
    "barlow-r50": ("barlow_resnet50", None, 256, "barlow_cifar10"),
    "spark-convnext-b": ("spark_convnext_base", None, 128, "spark_convnext_cifar10"),
    "dseqjepa-b": ("dseqjepa_vit_base", None, 128, "dseqjepa_cifar10"),
    "rotation-r50": ("rotation_resnet50", None, 128, "rotation_cifar10"),
    "mae-l": ("mae_vit_large", None, 128, "mae_cifar10"),
    "ijepa-l": ("ijepa_vit_large", None, 64, "ijepa_cifar10"),
    "mae-s": ("mae_vit_base", "vit_small_patch16_224", 512, "mae_cifar10"),
    "ijepa-s": ("ijepa_vit_base", "vit_small_patch16_224", 256, "ijepa_cifar10"),
    "spark-r50": ("spark_resnet50", None, 128, "spark_resnet18_cifar10"),
}
_NUM_STEPS, _LOGGED_EVERY = 30, 10
_TOY_STEPS, _TOY_IMAGES = 5, 8


def host_waits(toy: bool) -> dict:
    """How often a step that is not logged makes the host wait, for every objective: by torch's own alarm, and by the
    runtime calls that a profile shows. Batches come from the device, so that only the step is looked at."""
    found = {}
    for name in list(STEPS)[:6]:
        engine, batches, meter = _begun(name, toy, compiled=False)
        for _ in range(3):
            engine._watch(engine._step(batches, meter), meter)
        found[name] = _waits_of(lambda e=engine, b=batches, m=meter: e._watch(e._step(b, m), m))
    return found


def _waits_of(step) -> str:
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    with (
        warnings.catch_warnings(record=True) as told,
        profile(activities=list(_activities(ProfilerActivity))) as profiler,
    ):
        warnings.simplefilter("always")
        if cuda:
            torch.cuda.set_sync_debug_mode("warn")
        step()
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
    alarms = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in told if "synchroniz" in str(w.message))
    calls = Counter(e.name for e in profiler.events() if "Synchronize" in e.name)
    places = ", ".join(f"{place} x {count}" for place, count in alarms.most_common(4))
    return f"{sum(alarms.values())} alarms {places}".strip() + f"; calls {dict(calls) or 'none'}"


def _activities(kinds):
    yield kinds.CPU
    if torch.cuda.is_available():
        yield kinds.CUDA


def step(name: str, compiled: bool, toy: bool) -> dict:
    """Milliseconds, MFU and memory of a whole step of the engine: objective, reduction, optimizer."""
    from prelude.pretrain.preview import preview

    images, started, done = _TOY_IMAGES if toy else STEPS[name][2], time.perf_counter(), None
    if toy:
        torch.compiler.set_stance("force_eager" if compiled else "default")  # compiling takes longer than all the rest
    while done is None:
        try:
            done = _trained(name, toy, compiled, images)
        except torch.OutOfMemoryError:
            if images < 16:
                raise
        if done is None:
            images //= 2
            gc.collect()
            torch.cuda.empty_cache()
    engine, records, objective = done
    seconds = statistics.median(record.step_seconds for record in records[1:])
    found = {
        "images": images,
        "ms": 1000 * seconds,
        "images_per_second": images / seconds,
        "mfu": statistics.median(record.mfu for record in records[1:]),
        "gflops_an_image": engine.utilisation.flops_an_image / 1e9,
        "peak_tflops": engine.utilisation.peak_flops / 1e12,
        "start_s": time.perf_counter() - started - seconds * records[-1].step,  # compiling included
        "memory_gib": records[-1].peak_memory / 2**30,
    }
    if not compiled and not toy:
        said = preview(engine.config, objective, num_samples=images, world_size=1, precision="bf16").rank_memory()
        found["predicted_memory_gib"] = said.peak / 2**30
    return found


def check_recipe(name: str) -> None:
    """What a GPU would be given."""
    from prelude.objectives import check_objective, options_for
    from prelude.pretrain.recipes import load_config

    recipe, encoder, images, _ = STEPS[name]
    settings = ["data.shards=unused", "train.epochs=1", "optimizer.warmup_epochs=0", f"train.global_batch={images}"]
    settings += [f"encoder.name={encoder}"] if encoder else []
    check_objective(load_config(recipe, settings, options_for))


def _trained(name: str, toy: bool, compiled: bool, images: int):
    from prelude.launch.planning import Kept

    kept = Kept()
    engine, objective = _engine(name, toy, compiled, images, [kept])
    engine.run()
    return engine, kept.records, objective


def _begun(name: str, toy: bool, compiled: bool):
    from prelude.pretrain.meter import Meter

    engine, _ = _engine(name, toy, compiled, _TOY_IMAGES if toy else 32, [])
    batches, meter = iter(engine.loader), Meter(engine.config.train.global_batch)
    engine._fetch_first(batches, meter)
    return engine, batches, meter


def _engine(name: str, toy: bool, compiled: bool, images: int, monitors: list):
    from prelude.launch.made_up_data import MemoryLoader, made_up_batch
    from prelude.launch.planning import Nowhere
    from prelude.objectives import options_for
    from prelude.objectives.building import build_objective
    from prelude.pretrain import distributed
    from prelude.pretrain.devices import peak_flops
    from prelude.pretrain.engine import Engine
    from prelude.pretrain.recipes import load_config

    device = distributed.start()
    recipe, encoder, _, toy_recipe = STEPS[name]
    settings = ["data.shards=unused", f"run_dir={tempfile.gettempdir()}/unused", "optimizer.warmup_epochs=0"]
    settings += [f"train.epochs={_TOY_STEPS if toy else _NUM_STEPS}", f"train.global_batch={images}"]
    settings += [f"train.precision={'fp32' if toy else 'bf16'}", f"train.compile={str(compiled).lower()}"]
    settings += [f"log.every_steps={1 if toy else _LOGGED_EVERY}", "log.pictures_every_steps=0"]
    settings += [f"encoder.name={encoder}"] if encoder and not toy else []
    config = load_config(toy_recipe if toy else recipe, settings, options_for)
    objective = build_objective(config)
    batch = made_up_batch(torch.arange(min(images, 32)), objective.views, 32)
    repeated = batch._map(lambda tensor: tensor.repeat(-(-images // len(tensor)), *[1] * (tensor.ndim - 1))[:images])
    repeated = repeated._map(lambda tensor: tensor.to(device))
    loader = MemoryLoader(images, images, lambda positions: repeated)
    return Engine(config, objective, loader, Nowhere(), monitors, peak_flops), objective


def regions(toy: bool) -> dict:
    """DSeq-JEPA's regions of a batch at once against OpenCV, one image after another."""
    import regions as benchmark

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for side in (14,) if toy else (14, 28):
        maps = benchmark.smooth_maps(8 if toy else 256, (side, side)).to(device)
        of_side = benchmark.compare(maps, (side, side), 1 if toy else 7)
        found |= {f"{key}_{side}": of_side[key] for key in ("times_faster", "batched_ms", "one_by_one_ms")}
    return found


def photometric(toy: bool) -> dict:
    """Colours of a batch at once against one image after another, on one core."""
    import photometric as benchmark

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    size, images, rounds = (32, 4, 1) if toy else (224, 256, 3)
    return benchmark.compare(argparse.Namespace(device=device, size=size, batch_size=images, rounds=rounds))


def save(toy: bool) -> dict:
    """How long a save keeps training waiting."""
    import save as benchmark

    from prelude.pretrain import distributed

    distributed.start()
    engine = benchmark.trained_once(benchmark.MODELS["tiny" if toy else "base"], stage=0)
    arms = {"background": benchmark.stalled, "plain": benchmark.plain, "torch_save": benchmark.torch_save}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    with tempfile.TemporaryDirectory() as folder:
        for nth in range(2 if toy else 4):
            for name, arm in arms.items():
                seconds[name].append(arm(engine, Path(folder) / name, nth))
    return {f"{name}_s": statistics.median(taken[1:]) for name, taken in seconds.items()}


def loader(toy: bool) -> dict:
    """Images a second of the data path with all cores, of JPEGs as large as ImageNet's."""
    from prelude.data.batch import View, ViewPlan
    from prelude.data.loader import Loader
    from prelude.data.shards import ShardIndex
    from prelude.pretrain import distributed

    workers = 1 if toy else distributed.num_cores()
    found = {"workers": workers}
    with tempfile.TemporaryDirectory() as folder:
        size = (120, 90) if toy else (500, 375)
        write_photos(Path(folder), num_shards=max(workers, 2), images_a_shard=16 if toy else 100, size=size)
        plan = ViewPlan((View((32, 32) if toy else (224, 224)),))
        batch = 8 if toy else 128
        reading = Loader(
            ShardIndex(f"{folder}/photos-*.tar", "cls"),
            plan,
            seed=0,
            micro_batch=batch,
            num_workers=workers,
            label="cls",
        )
        batches = iter(reading)
        for _ in range(2 if toy else 3 * workers):
            next(batches)
        started, count = time.perf_counter(), 2 if toy else 100
        for _ in range(count):
            next(batches)
        found["images_per_second"] = count * batch / (time.perf_counter() - started)
        reading.close()
    return found


def write_photos(folder: Path, num_shards: int, images_a_shard: int, size: tuple[int, int]) -> None:
    """Coarse colours under fine grain: JPEGs of about a hundred kilobytes at 500 x 375."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for shard in range(num_shards):
        with tarfile.open(folder / f"photos-{shard:06d}.tar", "w") as tar:
            for nth in range(images_a_shard):
                coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, 3)
                grain = generator.normal(0, 22, (size[1], size[0], 1))
                picture = Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))
                file = io.BytesIO()
                picture.save(file, "JPEG", quality=90)
                for name, content in (
                    (f"{shard:03d}{nth:05d}.jpg", file.getvalue()),
                    (f"{shard:03d}{nth:05d}.cls", b"0"),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def run(toy: bool, seconds: float, folder: Path) -> dict:
    """Barlow Twins with a ResNet-18 on the embedded data, for so many seconds, and k-NN of what it learned. Run
    again, it goes on."""
    from prelude.data.shapes import write_shards

    count = 64 if toy else 20_000
    write_shards(folder / "shapes", "train", count)
    write_shards(folder / "shapes", "test", 32 if toy else 2_000)
    train, test, run_dir = f"{folder}/shapes/train-*.tar", f"{folder}/shapes/test-*.tar", folder / "barlow"
    (run_dir / "STOP").unlink(missing_ok=True)
    settings = ["--config", "barlow_cifar10", f"data.shards={train}", f"run_dir={run_dir}"]
    settings += ["train.global_batch=16", "train.epochs=1", "optimizer.warmup_epochs=0"] if toy else []
    python = [sys.executable]
    training = subprocess.Popen([*python, str(ROOT / "launch/pretrain.py"), *settings], env=_plain_env())
    try:
        code = training.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        (run_dir / "STOP").touch()
        code = training.wait(timeout=120)
    if code not in (0, 75):
        raise RuntimeError(f"training ended with exit code {code}")
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    half = records[len(records) // 2 :]
    found = {"steps": records[-1]["step"], "of": records[-1]["num_steps"], "loss": records[-1]["loss"]}
    found |= {key: statistics.median(r[key] for r in half) for key in ("images_per_second", "data_wait", "mfu")}
    if not toy:
        judged = [
            *python,
            str(ROOT / "launch/knn.py"),
            str(run_dir),
            f"random:{run_dir}",
            "--train",
            train,
            "--test",
            test,
        ]
        said = subprocess.run(judged, env=_plain_env(), capture_output=True, text=True, timeout=200)
        found["knn"] = " / ".join(line.strip() for line in said.stdout.splitlines()[-6:])
    return found


def _plain_env() -> dict[str, str]:
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in ranks}
