"""What `on_gpu.py` measures, one function an entry. Each returns a flat dictionary of numbers and words.

All data are made on the spot. `toy` is the same at a size for a CPU, whose figures say nothing.
"""

import argparse
import dataclasses
import gc
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))  # so that it runs as a script from anywhere

import gpu_runs  # noqa: E402
import kernel_times  # noqa: E402
import torch  # noqa: E402

# name: (recipe, encoder where it is another, images at once, recipe of the toy)
STEPS = {
    "mae-b": ("mae_vit_base", None, 1024, "mae_cifar10"),
    "ijepa-b": ("ijepa_vit_base", None, 256, "ijepa_cifar10"),
    "barlow-r50": ("barlow_resnet50", None, 256, "barlow_cifar10"),
    "spark-convnext-b": ("spark_convnext_base", None, 256, "spark_convnext_cifar10"),
    "dseqjepa-b": ("dseqjepa_vit_base", None, 256, "dseqjepa_cifar10"),
    "rotation-r50": ("rotation_resnet50", None, 128, "rotation_cifar10"),
    "mae-l": ("mae_vit_large", None, 512, "mae_cifar10"),
    "ijepa-l": ("ijepa_vit_large", None, 128, "ijepa_cifar10"),
    "mae-s": ("mae_vit_base", "vit_small_patch16_224", 1024, "mae_cifar10"),
    "ijepa-s": ("ijepa_vit_base", "vit_small_patch16_224", 512, "ijepa_cifar10"),
    "spark-r50": ("spark_resnet50", None, 256, "spark_resnet18_cifar10"),
}
# What comes before the first log line warms up, longer where a run meets every length of its sequences first; then two
# intervals are timed, and a last one is profiled.
_LOGGED_EVERY, _LONG_WARM_UP, _TIMED = 10, 70, 2
_TOY_IMAGES = 8


def host_waits(toy: bool) -> dict:
    """How often a step that is not logged makes the host wait, for every objective: by torch's own alarm, and by the
    runtime calls that a profile shows. Batches come from the device, so that only the step is looked at."""
    from prelude.pretrain import attention

    found = {}
    for name in list(STEPS)[:6]:
        engine, batches, meter = _begun(name, toy, compiled=False)
        with attention.kernels_for(engine.objective):
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
    # The alarm says of itself, too, that it is a prototype.
    said = [w for w in told if "synchroniz" in str(w.message) and "prototype" not in str(w.message)]
    alarms = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in said)
    calls = Counter(e.name for e in profiler.events() if "Synchronize" in e.name)
    places = ", ".join(f"{place} x {count}" for place, count in alarms.most_common(4))
    return f"{sum(alarms.values())} alarms {places}".strip() + f"; calls {dict(calls) or 'none'}"


def _activities(kinds):
    yield kinds.CPU
    if torch.cuda.is_available():
        yield kinds.CUDA


def step(name: str, compiled: bool, toy: bool) -> dict:
    """Milliseconds, MFU and memory of a whole step of the engine: objective, reduction, optimizer."""
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
            tidy(torch.get_num_threads())
    engine, records, kernels = done
    timed = records[-1 - _TIMED : -1]
    seconds = statistics.median(record.step_seconds for record in timed)
    found = {
        "images": images,
        "ms": 1000 * seconds,
        "images_per_second": images / seconds,
        "mfu": statistics.median(record.mfu for record in timed),
        "gflops_an_image": engine.utilisation.flops_an_image / 1e9,
        "peak_tflops": engine.utilisation.peak_flops / 1e12,
        "start_s": time.perf_counter() - started - seconds * records[-1].step,  # compiling included
        "memory_gib": records[-1].peak_memory / 2**30,
        **kernels.shares(),
    }
    return found


def predicted(toy: bool) -> dict:
    """GiB that the dry run tells for each step that is not compiled, with as many images at once as were planned."""
    from prelude.objectives import options_for
    from prelude.objectives.building import build_objective
    from prelude.pretrain.preview import preview
    from prelude.pretrain.recipes import load_config

    found = {}
    for name, (recipe, encoder, images, toy_recipe) in list(STEPS.items())[: 1 if toy else None]:
        images = _TOY_IMAGES if toy else images
        settings = [
            "data.shards=unused",
            "optimizer.warmup_epochs=0",
            "optimizer.warmup_lr=0",
            f"train.global_batch={images}",
        ]
        settings += ["train.precision=bf16", *([f"encoder.name={encoder}"] if encoder and not toy else [])]
        config = load_config(toy_recipe if toy else recipe, settings, options_for)
        said = preview(config, build_objective(config), num_samples=images, world_size=1, precision="bf16")
        found[name] = said.rank_memory().peak / 2**30
    return found


def check_recipe(name: str) -> None:
    """What a GPU would be given."""
    from prelude.objectives import check_objective, options_for
    from prelude.pretrain.recipes import load_config

    recipe, encoder, images, _ = STEPS[name]
    settings = [
        "data.shards=unused",
        "train.epochs=1",
        "optimizer.warmup_epochs=0",
        "optimizer.warmup_lr=0",
        f"train.global_batch={images}",
    ]
    settings += [f"encoder.name={encoder}"] if encoder else []
    check_objective(load_config(recipe, settings, options_for))


def _trained(name: str, toy: bool, compiled: bool, images: int):
    from prelude.launch.planning import Kept

    kept, kernels = Kept(), kernel_times.KernelTimes(_num_steps(name, toy) - _every(toy))
    engine = _engine(name, toy, compiled, images, [kept, kernels])
    engine.run()
    return engine, kept.records, kernels


def _num_steps(name: str, toy: bool) -> int:
    warm_up = _LONG_WARM_UP if "jepa" in name and not toy else _every(toy)
    return warm_up + (_TIMED + 1) * _every(toy)


def _every(toy: bool) -> int:
    return 1 if toy else _LOGGED_EVERY


def _begun(name: str, toy: bool, compiled: bool):
    from prelude.pretrain.meter import Meter

    engine = _engine(name, toy, compiled, _TOY_IMAGES if toy else 32, [])
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
    settings = [
        "data.shards=unused",
        f"run_dir={tempfile.gettempdir()}/unused",
        "optimizer.warmup_epochs=0",
        "optimizer.warmup_lr=0",
    ]
    settings += [f"train.epochs={_num_steps(name, toy)}", f"train.global_batch={images}"]
    settings += [f"train.precision={'fp32' if toy else 'bf16'}", f"train.compile={str(compiled).lower()}"]
    settings += [f"log.every_steps={_every(toy)}", "log.pictures_every_steps=0"]
    settings += [f"encoder.name={encoder}"] if encoder and not toy else []
    config = load_config(toy_recipe if toy else recipe, settings, options_for)
    objective = build_objective(config)
    batch = made_up_batch(torch.arange(min(images, 32)), objective.views, 32)
    repeated = batch._map(lambda tensor: tensor.repeat(-(-images // len(tensor)), *[1] * (tensor.ndim - 1))[:images])
    repeated = repeated._map(lambda tensor: tensor.to(device))
    views = tuple(view.contiguous(memory_format=torch.channels_last) for view in repeated.views)
    repeated = dataclasses.replace(repeated, views=views)  # laid out as the loader's are
    loader = MemoryLoader(images, images, lambda positions: repeated)
    return Engine(config, objective, loader, Nowhere(), monitors, peak_flops)


def tidy(num_threads: int) -> None:
    """Leaves nothing of an entry to the next."""
    torch.set_num_threads(num_threads)
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


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
        gpu_runs.write_photos(Path(folder), num_shards=max(workers, 2), images_a_shard=16 if toy else 100, size=size)
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
