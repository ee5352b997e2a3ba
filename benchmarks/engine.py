"""What the engine adds to a step: a run of it against a bare loop over the same objective, data and optimizer.

Arms: `engine`, `Engine.run` as `prelude pretrain` calls it, with metrics.jsonl, TensorBoard and the watch for collapse,
logged every ten steps; `bare`, the loop of a tutorial: zero_grad, forward, backward, optimizer.step, the momentum
teacher. With several ranks the bare loop is torch's DistributedDataParallel.

- Both are fed by one loader, which lets the bare loop take its turn after every block of the engine's steps.
- Batches are made beforehand, so that no data path is measured.
- The figures are CPU time and wall time of this process; a block's ratio and difference compare neighbours in time.

python benchmarks/engine.py --case tiny
deepspeed --num_accelerators 2 --module benchmarks.engine --case tiny
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # so that it runs as a script from anywhere

import torch  # noqa: E402

from prelude.checkpoints.store import Store  # noqa: E402
from prelude.launch.made_up_data import MemoryLoader, made_up_batch  # noqa: E402
from prelude.objectives import options_for  # noqa: E402
from prelude.objectives.building import build_objective  # noqa: E402
from prelude.pretrain import distributed, optimizers  # noqa: E402
from prelude.pretrain.collapse import CollapseWatch  # noqa: E402
from prelude.pretrain.engine import Engine  # noqa: E402
from prelude.pretrain.monitors import CurvesMonitor, JsonlMonitor  # noqa: E402
from prelude.pretrain.recipes import validate_config  # noqa: E402

TINY = {
    "name": "vit_tiny_patch16_224",
    "image_size": 32,
    "patch_size": 4,
    "kwargs": {"depth": 2, "embed_dim": 16, "num_heads": 2},
}
VIT_TI = {"name": "vit_tiny_patch16_224", "image_size": 64}
SMALL = {"name": "vit_small_patch16_224", "image_size": 224}
RESNET = {"name": "resnet18", "image_size": 64}
MAE = {"name": "mae", "decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
IJEPA = {"name": "ijepa", "predictor_dim": 16, "predictor_depth": 1}
BARLOW = {"name": "barlow_twins", "projector": [64, 64]}
CASES = {
    "tiny": (MAE, TINY),
    "tiny ijepa": (IJEPA, TINY),
    "vit-ti": (MAE, VIT_TI),
    "resnet18 barlow": (BARLOW, RESNET),
    "vit-s": ({"name": "mae"}, SMALL),
    "vit-s ijepa": ({"name": "ijepa"}, SMALL),
}


class BareLoop:
    """The same work without an engine."""

    def __init__(self, objective, config):
        self.objective = self.module = objective
        self.optimizer = optimizers.build_optimizer(objective, config)
        if distributed.world_size() > 1:
            self.module = torch.nn.parallel.DistributedDataParallel(objective, broadcast_buffers=False)

    def step(self, batch, progress) -> None:
        self.optimizer.zero_grad()
        self.module(batch, progress).total.backward()
        self.optimizer.step()
        self.objective.after_step(progress, torch.ones(()))


class TakingTurns(MemoryLoader):
    """Hands out `block` batches to the engine, then lets the bare loop have as many, and notes when each was done."""

    def __init__(self, micro_batch: int, batches: list, block: int):
        super().__init__(micro_batch, len(batches) * micro_batch, lambda positions: None)
        self.batches, self.block, self.engine = batches, block, None
        self.taken: list[tuple[tuple[float, float], tuple[float, float]]] = []  # (engine, bare), each (CPU, wall)

    def let_take_turns(self, engine, bare: BareLoop) -> None:
        self.engine, self.bare = engine, bare

    def __iter__(self):
        start = now()
        number = 0
        while True:
            number += 1
            yield self.batches[number % len(self.batches)]
            if number % self.block == 0:
                by_engine = since(start)
                start = now()
                for nth in range(self.block):
                    self.bare.step(self.batches[nth % len(self.batches)], self.engine.progress)
                self.taken.append((by_engine, since(start)))
                start = now()


def now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def since(start: tuple[float, float]) -> tuple[float, float]:
    return tuple(after - before for after, before in zip(now(), start, strict=True))


def main() -> None:
    args = parse_arguments()
    distributed.start()
    with tempfile.TemporaryDirectory() as folder:
        taken = measured(args, Path(distributed.from_main(folder)))
        distributed.barrier()  # rank 0's folder is everybody's
    if distributed.is_main():
        report(args, taken)
    distributed.stop()
    distributed.leave(0)


def measured(args, folder: Path) -> list:
    objective_values, encoder = CASES[args.case]
    values = {
        "run_dir": str(folder),
        "data": {"shards": "none"},
        "encoder": encoder,
        "objective": objective_values,
        "train": {
            "epochs": args.block * (args.rounds + 1),  # a batch an epoch
            "global_batch": args.batch * distributed.world_size(),
            "precision": "fp32",
            "zero_stage": args.zero_stage,
        },
        "optimizer": {"name": "adamw", "lr": 1e-4},
        "log": {"pictures_every_steps": 0},
        "checkpoint": {"every_steps": 10**9},
        "deepspeed": json.loads(args.deepspeed),
    }
    config = validate_config(values, args.case, options_for)
    torch.manual_seed(0)
    objective = build_objective(config)
    bare = BareLoop(copy.deepcopy(objective), config)
    loader = loader_for(args, objective.views)
    store = Store(folder / "checkpoints", keep=1)
    engine = Engine(config, objective, loader, store, monitors(config, folder, store))
    loader.let_take_turns(engine, bare)
    engine.run()
    return loader.taken[1:]  # the first block warms up


def loader_for(args, views) -> TakingTurns:
    positions = [torch.arange(args.batch) + args.batch * nth for nth in range(4)]
    batches = [made_up_batch(at, views, 4 * args.batch) for at in positions]
    loader = TakingTurns(args.batch, batches, args.block)
    loader.num_samples = args.batch * distributed.world_size()  # a batch an epoch
    return loader


def monitors(config, folder: Path, store: Store) -> list:
    if not distributed.is_main():
        return []
    watch = CollapseWatch(config.collapse, store, {}, 0.0, folder)
    return [watch, JsonlMonitor(folder / "metrics.jsonl"), CurvesMonitor(folder)]


def report(args, taken: list) -> None:
    print(
        f"{args.case}, batch {args.batch} on each of {distributed.world_size()}, ZeRO {args.zero_stage}, "
        f"{len(taken)} blocks of {args.block} steps, {torch.get_num_threads()} threads"
    )
    for index, kind in enumerate(["CPU", "wall"]):
        pairs = [(engine[index] / args.block * 1e3, bare[index] / args.block * 1e3) for engine, bare in taken]
        ratios = [engine / bare for engine, bare in pairs]
        print(
            f"{kind:5} engine / bare {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), added "
            f"{statistics.median(engine - bare for engine, bare in pairs):.2f} ms a step; bare "
            f"{statistics.median(bare for _, bare in pairs):.2f} ms (fastest block {min(b for _, b in pairs):.2f}, "
            f"of the engine {min(e for e, _ in pairs):.2f})"
        )
    if args.json:
        args.json.write_text(json.dumps(vars(args) | {"json": None, "seconds": taken}, indent=1, default=str) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, default="tiny")
    parser.add_argument("--batch", type=int, default=16, help="images a rank")
    parser.add_argument("--zero-stage", type=int, default=0)
    parser.add_argument("--block", type=int, default=20, help="steps until the other arm has its turn")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--deepspeed", default="{}", help="settings to pass through, as JSON")
    parser.add_argument("--json", type=Path, help="where the figures are written too")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
