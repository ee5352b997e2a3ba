"""A run from its config to its end: the parts are built, handed to each other, and told on the console."""

import sys
from pathlib import Path
from typing import Any

from prelude.checkpoints.starting import start_of
from prelude.checkpoints.store import Store
from prelude.data.absent import told_as
from prelude.data.counting import counted
from prelude.data.data_sets import Data, DataSet, check_there, check_volumes_there
from prelude.data.loader import AlternatingLoader, Loader, alternating_loader, build_loader
from prelude.data.order import Shuffle
from prelude.data.remote_shards import keep_remote_shards
from prelude.data.shards import indexable_shards
from prelude.data.waiting import moves, stop_when, wait_at_most
from prelude.data.workers import start_workers_by
from prelude.evaluators.labelled import selection
from prelude.evaluators.online import monitor as online
from prelude.launch.outlook import print_with_outlook
from prelude.launch.planning import Asked, plan, tell_measured
from prelude.launch.run_folder import run_folder
from prelude.objectives import check_objective, objective_class
from prelude.objectives.building import build_objective
from prelude.pretrain import attendance, compiling, deepspeed_config, distributed
from prelude.pretrain.batch_norm import has_batch_norms
from prelude.pretrain.collapse import CollapseWatch
from prelude.pretrain.config import Config, DataConfig
from prelude.pretrain.data_wait import DataWaitWatch
from prelude.pretrain.devices import peak_flops
from prelude.pretrain.engine import Engine
from prelude.pretrain.files import Tolerant
from prelude.pretrain.monitors import ConsoleMonitor, CurvesMonitor, JsonlMonitor, Monitor, ReportsMonitor
from prelude.pretrain.resume import with_found_range
from prelude.pretrain.stopping import PREEMPTED
from prelude.pretrain.trackers import tracker
from prelude.pretrain.trackers.tracker import trackers_of


def check(config: Config, world_size: int | None = None) -> None:
    """Refuses, before anything is built, what cannot work here, or with that number of ranks. Raises UserError."""
    check_settings(config, world_size)
    wait_at_most(config.data.timeout_seconds, "data.timeout_seconds")
    keep_remote_shards(config.data.cache_dir, config.data.cache_gib)
    start_workers_by(config.data.start_method)
    # A shard that this node lacks is told before any rank waits for another.
    check_there(data_of(config.data), config.data.allow_commands)
    if config.data.volumes:
        check_volumes_there(config.data.volumes.shards)
    if config.evaluate and config.evaluate.every_steps:
        for name in ("evaluate.train_shards", "evaluate.test_shards"):
            with told_as(f"{name}="):
                indexable_shards(getattr(config.evaluate, name.removeprefix("evaluate.")))
        online.check(config)


def check_settings(config: Config, world_size: int | None = None) -> None:
    """What of this needs no data. Raises UserError."""
    world_size = world_size or distributed.launched_world_size()
    check_objective(config, world_size)
    tracker.check(config.log)
    config.batching(world_size)
    deepspeed_config.passed_through(config)


def train(config: Config) -> int:
    """The exit code of the run."""
    device = distributed.start(config.train.rank_timeout_seconds)
    deepspeed_config.check(config)
    store = Store(Path(config.run_dir) / "checkpoints", keep=config.checkpoint.keep)
    start = start_of(config, store)
    config = start.config
    with run_folder(config) as folder:
        objective = build_objective(config, start.warm)
        attendance.goes_by(moves)
        attendance.reach("indexing shards")
        loader = loader_of(config, objective.views)
        config = with_found_range(config, images_of(loader).value_range)
        folder.record(config)
        monitors = [*folder.monitors, *monitors_of(config, folder.path, store, loader.num_workers)]
        engine = Engine(config, objective, loader, store, monitors, peak_flops)
        stop_when(engine.stop_wanted)
        folder.note(precision=str(engine.precision))
        introduce(config, engine, loader, device)
        tell_weights(start.sentence)
        outcome = engine.run()
        loader.close()
    distributed.stop()
    return 0 if outcome.reason == "finished" else PREEMPTED


def loader_of(config: Config, views, world_size: int | None = None):
    """world_size: where it is not that of the ranks that are here."""
    of_data = {key: getattr(config.data, key) for key in ("num_samples", "max_bad_share", "allow_commands")}
    settings, seen = loader_settings(config, world_size), seen_as(config.data)
    if config.data.volumes is None:
        return build_loader(data_of(config.data), views, **settings, **of_data, **seen)
    workers, of = settings.pop("num_workers"), config.data.volumes
    images = build_loader(data_of(config.data), views, num_workers=-(-workers // 2), **settings, **of_data, **seen)
    return alternating_loader(
        images,
        volumes_of(config.data),
        views.volumes,
        of.share,
        config.train.global_batch,
        num_workers=-(-workers // 2),  # each kind has half of them, and rests while it is the other's turn
        max_bad_share=config.data.max_bad_share,
        max_pixels=config.data.max_pixels,
        value_range=of.range,
        **settings,
    )


def images_of(loader):
    """The index of a run's images, or the stream of them."""
    images = loader.loaders["images"] if isinstance(loader, AlternatingLoader) else loader
    return getattr(images, "index", images)


def data_of(data: DataConfig) -> Data:
    if data.shards:
        return data.shards
    return {
        name: DataSet(part.shards, part.weight, part.image or "", selection(part.select))
        for name, part in data.mix.items()
    }


def volumes_of(data: DataConfig) -> DataSet:
    """Where there are any."""
    of = data.volumes
    return DataSet(of.shards, image=of.image or "", select=selection(of.select))


def seen_as(data: DataConfig) -> dict[str, Any]:
    """What of the shards is read, and how."""
    return {
        "value_range": data.range,
        "max_pixels": data.max_pixels,
        "image": data.image or "",
        "select": selection(data.select),
    }


def loader_settings(config: Config, world_size: int | None = None) -> dict[str, Any]:
    """What a loader is told of a run, whatever it reads. world_size: where it is not that of the ranks here."""
    workers, world_size = config.data.num_workers, world_size or distributed.world_size()
    micro_batch, _ = config.batching(world_size)
    return {
        "seed": config.seed,
        "micro_batch": micro_batch,
        "rank": distributed.rank(),
        "world_size": world_size,
        "num_workers": distributed.default_num_workers() if workers == "auto" else workers,
        "shuffle": Shuffle(**config.data.shuffle.model_dump()),
        "bad_samples_log": Path(config.run_dir) / "bad_samples.jsonl",
    }


def monitors_of(config: Config, run_dir: Path, store: Store, num_workers: int) -> list[Monitor]:
    if not distributed.is_main():
        return []
    probes = [online.OnlineProbe(config)] if config.evaluate and config.evaluate.every_steps else []
    remedies = objective_class(config.objective["name"]).remedies
    momentum = config.objective.get("momentum", 1.0)  # at 1 a teacher does not follow at all, so no lag excuses it
    teacher_steps = 1 / (1 - momentum) if momentum < 1 else 0.0
    watch = CollapseWatch(config.collapse, store, remedies, teacher_steps, run_dir)
    return [*probes, watch, ReportsMonitor(run_dir / "online.jsonl"), *logs_of(config, num_workers)]


def logs_of(config: Config, num_workers: int) -> list[Monitor]:
    """num_workers: of a rank's loader."""
    if not distributed.is_main():
        return []
    run_dir, waiting = Path(config.run_dir), DataWaitWatch(num_workers, distributed.cores_per_rank())
    curves = CurvesMonitor(run_dir, trackers_of(config))
    return [waiting, ConsoleMonitor(), JsonlMonitor(run_dir / "metrics.jsonl"), curves]


def introduce(config: Config, engine: Engine, loader, device) -> None:
    """The values that were derived and not asked for."""
    if not distributed.is_main():
        return
    samples = "images and volumes" if isinstance(loader, AlternatingLoader) else "images"
    text = (
        f"{config.objective['name']} with {config.encoder.name} on {loader.num_samples} {samples}, "
        f"{distributed.world_size()} x {device.type} in {engine.precision}: "
        f"{counted(engine.progress.num_steps, 'step')} of {counted(config.train.global_batch, 'image')} "
        f"({engine.micro_batch} a rank x {engine.accumulation}), peak learning rate {config.peak_lr:.3g}, "
        f"{counted(loader.num_workers, 'loader worker')} a rank; everything goes to {config.run_dir}"
    )
    if config.train.compile:
        text += f"\ntrain.compile: {compiling.advice(device)}"
    if engine.accumulation > 1 and has_batch_norms(engine.objective):
        at_once = counted(engine.micro_batch * distributed.world_size(), "image")
        text += (
            f"\nbatch norms see {at_once} at once, so that another train.micro_batch or number of ranks trains "
            "otherwise; without accumulation they see the whole batch"
        )
    text = "\n".join([text, *mixture_of(loader), *engine.objective.notes()])
    with Tolerant("the console"):
        print(text, file=sys.stderr)


def mixture_of(loader) -> list[str]:
    """A line where several data sets are mixed, one where images have partners, one where volumes take turns."""
    if isinstance(loader, AlternatingLoader):
        return [f"kinds: {', '.join(loader.kinds())}", *mixture_of(loader.loaders["images"])]
    found = {"mixed": loader.mixture(), "pairs": loader.pairing()} if isinstance(loader, Loader) else {}
    return [f"{what}: {'; '.join(told)}" for what, told in found.items() if told]


def tell_weights(sentence: str) -> None:
    """How much was loaded, where an encoder starts from weights."""
    if sentence and distributed.is_main():
        with Tolerant("the console"):
            print(sentence, file=sys.stderr)


def dry_run(config: Config, asked: Asked) -> int:
    """Raises UserError, once all is told, where a start would be refused for what is in its run folder."""
    start = start_of(config, Store(Path(config.run_dir) / "checkpoints"))
    config = start.config
    objective = build_objective(config, start.warm)
    loader = loader_of(config, objective.views, asked.world_size)
    planned = plan(config, objective, loader.num_samples, asked)
    if start.sentence:
        planned.add_row("weights", start.sentence)
    planned.add_row("data", f"{counted(loader.num_samples, 'sample')} in {counted(loader.num_shards, 'shard')}")
    for line in mixture_of(loader):
        planned.add_row(*line.split(": ", 1))
    for line in objective.notes():
        planned.add_row("note", line)
    planned.add_row("first samples", ", ".join(loader.preview(5)) or "whatever the stream brings")
    print_with_outlook(planned, config, loader, type(objective.options))
    if asked.measure:
        tell_measured(config, objective, lambda config: loader_of(config, objective.views), planned)
    return 0
