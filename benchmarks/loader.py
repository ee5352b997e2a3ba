"""CPU time of the data path against the usual pipeline, in one run.

The usual pipeline is webdataset with PIL and torchvision: decode("pil"), RandomResizedCrop (bicubic), flip, ToTensor,
Normalize, batches of float32. Ours is `prelude.data.loader.Loader`, whose batches are uint8 and are flipped and
normalised on the device; a second row adds that last step on the CPU, which is what a run without a GPU pays.

- Arms take turns within a round, and a round's ratio compares its own arms: what else the machine does hits all.
- CPU time is user + system of this process and of its workers, over a window in which every arm is warm.
- Speed (images/s) depends on what else runs; CPU time much less. Claims are made about CPU time.

python benchmarks/loader.py --shards '../shared/data/imagenet-sample/train-{000000..000005}.tar' --rounds 5 --workers 2
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # so that it runs as a script from anywhere

import torch  # noqa: E402
import webdataset as wds  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torchvision import transforms  # noqa: E402

from prelude.data.batch import View, ViewPlan  # noqa: E402
from prelude.data.loader import Loader  # noqa: E402
from prelude.data.shards import ShardIndex  # noqa: E402
from prelude.pretrain.images import images  # noqa: E402

SCALE = (0.2, 1.0)
BATCHES_AHEAD = 2  # that each worker prepares, in all arms


def main() -> None:
    args = parse_arguments()
    plan = ViewPlan((View((args.size, args.size), scale=SCALE),))
    arms = {
        "webdataset and PIL": lambda: usual_batches(args, plan),
        "this loader": lambda: our_batches(args, plan, normalise=False),
        "and normalised on CPU": lambda: our_batches(args, plan, normalise=True),
    }
    rounds = []
    for nth in range(args.rounds):
        order = list(arms) if nth % 2 == 0 else list(reversed(arms))
        rounds.append({name: measure(arms[name], args) for name in order})
        spent = ", ".join(f"{rounds[-1][name]['cpu_seconds_per_1000']:.2f}" for name in arms)
        print(f"round {nth + 1}: {spent} CPU seconds per 1000 images", file=sys.stderr)
    result = summarise(list(arms), rounds)
    Console().print(table(result, args))
    if args.json:
        Path(args.json).write_text(json.dumps({"arguments": vars(args), "arms": result, "rounds": rounds}, indent=2))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.rpartition("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", required=True, help="local tar shards with .jpg and .cls members; braces expand")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="worker processes; 0 loads in this process")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=16, help="measured batches of each arm in each round")
    parser.add_argument("--size", type=int, default=224, help="side of the crop in pixels")
    parser.add_argument("--json", metavar="FILE", help="write all figures there too")
    return parser.parse_args()


def our_batches(args: argparse.Namespace, plan: ViewPlan, normalise: bool) -> Iterator:
    loader = Loader(
        ShardIndex(args.shards, "cls"),
        plan,
        seed=0,
        micro_batch=args.batch_size,
        num_workers=args.workers,
        label="cls",
    )
    try:
        for batch in loader:
            yield images(batch, plan) if normalise else batch
    finally:
        loader.close()


def usual_batches(args: argparse.Namespace, plan: ViewPlan) -> Iterator:
    """Without a shuffle buffer, which would only add to its cost."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(args.size, SCALE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(plan.mean, plan.std),
        ]
    )
    dataset = (
        wds.WebDataset(args.shards, shardshuffle=False)
        .repeat()
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform, lambda label: label)
    )
    ahead = BATCHES_AHEAD if args.workers else None
    yield from wds.WebLoader(dataset, batch_size=args.batch_size, num_workers=args.workers, prefetch_factor=ahead)


def measure(open_batches: Callable, args: argparse.Namespace) -> dict[str, float]:
    """One arm's figures over `args.batches` batches, once its workers are warm and their queues full."""
    with closing(open_batches()) as batches:
        for _ in range(args.workers * (BATCHES_AHEAD + 1) + 1):
            next(batches)
        clocks = [process_clock(child.pid) for child in multiprocessing.active_children()]
        cpu, wall = cpu_seconds(clocks), time.perf_counter()
        for _ in range(args.batches):
            next(batches)
        cpu, wall = cpu_seconds(clocks) - cpu, time.perf_counter() - wall
    count = args.batches * args.batch_size
    return {"cpu_seconds_per_1000": 1000 * cpu / count, "images_per_second": count / wall}


def process_clock(pid: int) -> int:
    """The Linux clock of another process' CPU time, as clock_getcpuclockid(3) makes it."""
    return (~pid << 3) | 2


def cpu_seconds(clocks: list[int]) -> float:
    """User + system time so far: this process' and the workers', which `getrusage` counts only once they have ended."""
    return time.process_time() + sum(map(time.clock_gettime, clocks))


def summarise(names: list[str], rounds: list[dict]) -> dict[str, dict[str, float]]:
    """Medians over the rounds; the ratio is the median of the rounds' own ratios to the first arm."""
    summary = {}
    for name in names:
        ratios = [of[names[0]]["cpu_seconds_per_1000"] / of[name]["cpu_seconds_per_1000"] for of in rounds]
        summary[name] = {
            "cpu_seconds_per_1000": statistics.median(of[name]["cpu_seconds_per_1000"] for of in rounds),
            "images_per_second": statistics.median(of[name]["images_per_second"] for of in rounds),
            "times_less_cpu": statistics.median(ratios),
            "times_less_cpu_min": min(ratios),
            "times_less_cpu_max": max(ratios),
        }
    return summary


def table(result: dict, args: argparse.Namespace) -> Table:
    workers = f"{args.workers} workers" if args.workers else "no workers"
    made = Table(
        title=f"{workers}, crops of {args.size}, batches of {args.batch_size}, medians of {args.rounds} rounds"
    )
    made.add_column("pipeline", no_wrap=True)
    for heading in ("CPU s/1000", "times less", "over rounds", "images/s"):
        made.add_column(heading, justify="right", no_wrap=True)
    for name, row in result.items():
        made.add_row(
            name,
            f"{row['cpu_seconds_per_1000']:.2f}",
            f"{row['times_less_cpu']:.2f}",
            f"{row['times_less_cpu_min']:.2f}-{row['times_less_cpu_max']:.2f}",
            f"{row['images_per_second']:.0f}",
        )
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
