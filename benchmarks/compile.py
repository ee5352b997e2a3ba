"""What `train.compile=true` brings: speed-up, seconds to compile, graphs and graph breaks, by objective.

Each entry is a process of its own: the objective twice, as it is and compiled as a run compiles it, forward and
backward; steps of the two take turns. An entry that the file of results already has is not measured again.

python benchmarks/compile.py --size tiny --results compile.json
"""

import argparse
import copy
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # so that it runs as a script from anywhere

import torch  # noqa: E402

from prelude.launch.made_up_data import made_up_batch  # noqa: E402
from prelude.objectives import options_for  # noqa: E402
from prelude.objectives.building import build_objective  # noqa: E402
from prelude.pretrain import distributed  # noqa: E402
from prelude.pretrain.compiling import compile_objective  # noqa: E402
from prelude.pretrain.recipes import validate_config  # noqa: E402
from prelude.pretrain.schedules import Progress  # noqa: E402

TINY_VIT = {"depth": 4, "embed_dim": 64, "num_heads": 2}
ENCODERS = {
    "tiny": {
        "vit": {"name": "vit_tiny_patch16_224", "image_size": 64, "patch_size": 8, "kwargs": TINY_VIT},
        "resnet": {"name": "resnet18", "image_size": 64},
    },
    "small": {
        "vit": {"name": "vit_small_patch16_224", "image_size": 224},
        "resnet": {"name": "resnet50", "image_size": 224},
    },
}
NARROW = {
    "mae": {"decoder_dim": 64, "decoder_depth": 2, "decoder_num_heads": 2},
    "ijepa": {"predictor_dim": 64, "predictor_depth": 2},
    "dseqjepa": {"predictor_dim": 64, "predictor_depth": 2, "lambda_start": 1.0},
    "barlow_twins": {"projector": [128, 128]},
}
OBJECTIVES = {
    "mae": "vit",
    "ijepa": "vit",
    "dseqjepa": "vit",
    "barlow_twins": "resnet",
    "spark": "resnet",
    "rotation": "resnet",
}


def main() -> None:
    args = parse_arguments()
    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    for name in args.objectives:
        key = f"{name} {args.size}"
        if key not in results:
            # Alone in its process, so that what one entry compiled is not found by the next.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                results[key] = pool.apply(measured, (name, args.size, args.batch, args.steps))
            args.results.write_text(json.dumps(results, indent=1) + "\n")
        print(line(key, results[key]), flush=True)


def measured(name: str, size: str, batch_size: int, steps: int) -> dict:
    import torch._dynamo as dynamo

    values = {
        "run_dir": "none",
        "data": {"shards": "none"},
        "encoder": ENCODERS[size][OBJECTIVES[name]],
        "objective": {"name": name} | (NARROW.get(name, {}) if size == "tiny" else {}),
        "train": {"epochs": 1, "global_batch": batch_size},
        "optimizer": {"name": "adamw", "lr": 1e-4},
    }
    torch.manual_seed(0)
    plain = build_objective(validate_config(values, name, options_for)).to(distributed.device())
    compiled = copy.deepcopy(plain)
    compile_objective(compiled)
    taken, first = {"eager": [], "compiled": []}, 0.0
    for step in range(steps + 3):
        batch = made_up_batch(torch.arange(batch_size) + batch_size * step, plain.views, 4 * batch_size)
        batch = batch.to(distributed.device())
        eager_seconds, compiled_seconds = (one_step(objective, batch, step) for objective in (plain, compiled))
        if step < 3:  # a compiler works in the first steps, and where lengths change in the next ones
            first += compiled_seconds - (eager_seconds if step else 0)
        else:
            taken["eager"].append(eager_seconds)
            taken["compiled"].append(compiled_seconds)
    return taken | {
        "seconds_to_compile": first,
        "graphs": dynamo.utils.counters["stats"]["unique_graphs"],
        "graph_breaks": sum(dynamo.utils.counters["graph_break"].values()),
        "device": str(distributed.device()),
        "batch": batch_size,
    }


def one_step(objective, batch, step: int) -> float:
    wait()
    start = time.perf_counter()
    objective(batch, Progress(step, 1000, 100.0)).total.backward()
    wait()
    taken = time.perf_counter() - start
    objective.zero_grad()
    return taken


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def line(key: str, found: dict) -> str:
    ratios = [eager / compiled for eager, compiled in zip(found["eager"], found["compiled"], strict=True)]
    return (
        f"{key:20} eager / compiled {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), fastest "
        f"{1e3 * min(found['eager']):.1f} and {1e3 * min(found['compiled']):.1f} ms; "
        f"{found['seconds_to_compile']:.0f} s to compile, {found['graphs']} graphs, {found['graph_breaks']} breaks"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", choices=ENCODERS, default="tiny")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=15, help="that are timed, after three that compile")
    parser.add_argument("--results", type=Path, default=Path("compile.json"), help="what is measured, and was before")
    return parser.parse_args()


if __name__ == "__main__":
    main()
