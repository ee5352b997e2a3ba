"""What the dry run says of a rank's memory against what a run takes, on the CPU.

Each case trains two steps of a recipe through the real launcher, engine and DeepSpeed, on made-up images. Measured is
what torch's allocator has held at most, as the profiler records every block: what `torch.cuda.max_memory_allocated`
tells on a GPU. Beside it stands what the process grew by (resident), to which Python's own objects, libraries that load
themselves and gaps between blocks belong. Loading and saving are not part of it.

    python benchmarks/memory.py                      (some 5 minutes on two cores)
    python benchmarks/memory.py --cases mae,tiny-mae-zero3
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from ports import free_port

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))  # so that it runs as a script from anywhere

SMALL = (
    "encoder.name=vit_small_patch16_224",
    "encoder.kwargs.depth=6",
    "train.epochs=1",
    "optimizer.warmup_epochs=0",
    "optimizer.warmup_lr=0",
    "train.precision=fp32",
)
TINY = (
    "train.epochs=1",
    "optimizer.warmup_epochs=0",
    "optimizer.warmup_lr=0",
    "train.precision=fp32",
    "train.global_batch=32",
)
# name: (ranks, recipe, overrides)
CASES = {
    "mae": (1, "mae_vit_base", (*SMALL, "train.global_batch=8")),
    "mae-bf16-checkpointing": (
        1,
        "mae_vit_base",
        (*SMALL, "train.global_batch=16", "train.precision=bf16", "train.gradient_checkpointing=true"),
    ),
    "ijepa-accumulated": (1, "ijepa_vit_base", (*SMALL, "train.global_batch=8", "train.micro_batch=4")),
    "barlow-lars": (
        1,
        "barlow_resnet50",
        (*SMALL[2:], "encoder.name=resnet18", "encoder.image_size=112", "train.global_batch=16"),
    ),
    "spark-lamb": (
        1,
        "spark_resnet50",
        (*SMALL[2:], "encoder.name=resnet18", "encoder.image_size=96", "train.global_batch=8"),
    ),
    "rotation-sgd": (
        1,
        "rotation_resnet50",
        (
            *SMALL[2:],
            "encoder.name=resnet18",
            "encoder.image_size=112",
            "train.global_batch=16",
            "optimizer.milestones=[]",
        ),
    ),
    "mae-zero1": (2, "mae_vit_base", (*SMALL, "train.global_batch=8", "train.zero_stage=1")),
    "ijepa-zero2": (2, "ijepa_vit_base", (*SMALL, "train.global_batch=8", "train.zero_stage=2")),
    "mae-zero3": (2, "mae_vit_base", (*SMALL, "train.global_batch=8", "train.zero_stage=3")),
    "tiny-mae": (1, "mae_cifar10", TINY),
    "tiny-mae-bf16-checkpointing": (
        1,
        "mae_cifar10",
        (*TINY, "train.precision=bf16", "train.gradient_checkpointing=true"),
    ),
    "tiny-ijepa-accumulated": (1, "ijepa_cifar10", (*TINY, "train.micro_batch=16")),
    "tiny-barlow": (1, "barlow_cifar10", TINY),
    "tiny-spark-lamb": (1, "spark_resnet18_cifar10", (*TINY, "optimizer.name=lamb")),
    "tiny-rotation-sgd": (1, "rotation_cifar10", (*TINY, "optimizer.name=sgd", "optimizer.betas=[0.9,0.95]")),
    "tiny-mae-zero1": (2, "mae_cifar10", (*TINY, "train.zero_stage=1")),
    "tiny-ijepa-zero2": (2, "ijepa_cifar10", (*TINY, "train.zero_stage=2")),
    "tiny-mae-zero3": (2, "mae_cifar10", (*TINY, "train.zero_stage=3")),
}
_STEPS = 2  # the second has what the optimizer made in the first


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(name for name in CASES if not name.startswith("tiny")))
    parser.add_argument("--inside", metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.cases.split(",")
    if args.inside:
        measure(names, Path(args.inside))
        return
    print(table(compare(names)))


def compare(names: list[str]) -> dict[str, dict[str, float]]:
    """Each case, measured by ranks of its own: bytes predicted, measured, and grown."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in sorted({CASES[name][0] for name in names}):
            of_world, out = [name for name in names if CASES[name][0] == world], Path(folder) / f"{world}.json"
            env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
            command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(world)]
            command += [
                "--master_port",
                str(free_port()),
                __file__,
                "--cases",
                ",".join(of_world),
                "--inside",
                str(out),
            ]
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            done = subprocess.run(command, env=env | {"PATH": path}, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
            found |= json.loads(out.read_text())
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    lines = [
        "| case | predicted ÷ measured | predicted, MiB | measured, MiB | the process grew by, MiB |",
        "|---|---|---|---|---|",
    ]
    for name, of in found.items():
        mib = [f"{of[key] / 2**20:.0f}" for key in ("predicted", "measured", "grown")]
        lines.append(f"| {name} | {of['predicted'] / of['measured']:.3f} | {' | '.join(mib)} |")
    ratios = [of["predicted"] / of["measured"] for of in found.values()]
    return "\n".join([*lines, "", f"median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}"])


def measure(names: list[str], out: Path) -> None:
    """On every rank. What the first rank finds is written."""
    from prelude.pretrain import distributed

    distributed.start()
    found = {}
    for name in names:
        found[name] = _measured(name)
        if distributed.is_main():
            out.write_text(json.dumps(found))
    distributed.stop()


def _measured(name: str) -> dict[str, float]:
    from torch.profiler import ProfilerActivity, profile

    from prelude.launch.made_up_data import MemoryLoader, made_up_batch
    from prelude.launch.planning import Nowhere
    from prelude.objectives import options_for
    from prelude.objectives.building import build_objective
    from prelude.pretrain import distributed, precision
    from prelude.pretrain.engine import Engine
    from prelude.pretrain.environment import peak_memory
    from prelude.pretrain.preview import preview
    from prelude.pretrain.recipes import load_config

    world, recipe, overrides = CASES[name]
    unused = ["data.shards=unused", "run_dir=unused", "log.every_steps=1", "log.pictures_every_steps=0"]
    config = load_config(recipe, [*unused, *overrides], options_for)
    num_samples = _STEPS * config.train.global_batch
    said = preview(
        config,
        build_objective(config),
        num_samples=num_samples,
        world_size=world,
        precision=precision.resolve(config, distributed.device(), {})[0].name,
    ).rank_memory()
    gc.collect()
    before = _resident()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        objective = build_objective(config)
        micro_batch, _ = config.batching(world)
        loader = MemoryLoader(micro_batch, num_samples, lambda at: made_up_batch(at, objective.views, num_samples))
        engine = Engine(config, objective, loader, Nowhere(), [])
        first = max(objective.telling_steps()[1] + 1 - _STEPS, 0)  # so that the last is the heaviest
        engine.progress = replace(engine.progress, step=first, num_steps=first + _STEPS)
        engine.run()
    blocks = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = measured = 0
    for block in sorted(blocks, key=lambda block: block.start_ns()):
        held += block.nbytes()
        measured = max(measured, held)
    return {"predicted": said.peak, "measured": measured, "grown": peak_memory() - before}


def _resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


if __name__ == "__main__":
    main()
