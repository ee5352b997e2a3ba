"""CPU time of the data path against what else there is, in one run.

The arms are in loader_arms.py. Those that need what is not installed are left out, by name.

- Arms take turns within a round, and a round's ratio compares its own arms: what else the machine does hits all.
- CPU time is user + system of this process and of its workers, over a window in which every arm is warm.
- Speed (images/s) depends on what else runs; CPU time much less. Claims are made about CPU time.

python benchmarks/loader.py --shards '../shared/data/imagenet-sample/train-{000000..000005}.tar' --rounds 5 --workers 2
python benchmarks/loader.py --shards '../shared/data/cifar10/train-{000000..000005}.tar' --size 32 --batches 64
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
from loader_arms import BATCHES_AHEAD, LIMIT, NORMALISED, OURS, arms, two_view_arms
from rich.console import Console
from rich.table import Table

NOT_PEERS = (OURS, NORMALISED, LIMIT)


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        offered = two_view_arms(args) if args.two_views else arms(args, Path(folder))
        chosen = {name: arm for name, arm in offered.items() if args.only is None or name in args.only}
        rounds: list[dict] = []
        for nth in range(args.rounds):
            rounds.append(one_round(chosen, nth, args))
            spent = ", ".join(f"{name} {figures['cpu_seconds_per_1000']:.3f}" for name, figures in rounds[-1].items())
            print(f"round {nth + 1}: CPU seconds for 1000 images: {spent}", file=sys.stderr)
    result = summarise(list(chosen), rounds)
    console = Console(width=110)  # of a pipe, 80 would cut the names
    console.print(table(result, args))
    peers = {name: row["times_ours"] for name, row in result.items() if name not in NOT_PEERS}
    if peers and OURS in result:
        strongest = min(peers, key=peers.get)
        console.print(
            f"The strongest of the others, {strongest}, takes {peers[strongest]:.2f} times this loader's CPU."
        )
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
    parser.add_argument("--batches", type=int, default=48, help="measured batches of each arm in each round")
    parser.add_argument("--size", type=int, default=224, help="side of the crop in pixels")
    parser.add_argument("--two-views", action="store_true", help="both views of Barlow Twins, with their colours")
    parser.add_argument("--only", action="append", metavar="ARM", help="this arm alone; may be repeated")
    parser.add_argument("--json", metavar="FILE", help="write all figures there too")
    return parser.parse_args()


def one_round(chosen: dict[str, Callable], nth: int, args: argparse.Namespace) -> dict[str, dict]:
    """The figures of every arm that can run; one that cannot is taken out of `chosen`."""
    measured = {}
    for name in list(chosen) if nth % 2 == 0 else list(reversed(chosen)):
        try:
            measured[name] = measure(chosen[name], args)
        except ImportError as error:
            print(f"{name}: left out, {error.name or error} is not installed", file=sys.stderr)
            del chosen[name]
    return measured


def measure(open_batches: Callable, args: argparse.Namespace) -> dict[str, float]:
    """One arm's figures over `args.batches` batches, once its workers are warm and their queues full."""
    with closing(open_batches()) as batches:
        for _ in range(args.workers * (BATCHES_AHEAD + 1) + 1):
            next(batches)
        cpu, wall = cpu_seconds(), time.perf_counter()
        for _ in range(args.batches):
            next(batches)
        cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
    count = args.batches * args.batch_size
    return {"cpu_seconds_per_1000": 1000 * cpu / count, "images_per_second": count / wall}


def process_clock(pid: int) -> int:
    """The Linux clock of another process' CPU time, as clock_getcpuclockid(3) makes it."""
    return (~pid << 3) | 2


def cpu_seconds() -> float:
    """User + system time so far of this process and its workers: `getrusage` counts those that have ended, as some
    arms' do at each pass over the data, and only those."""
    alive = sum(time.clock_gettime(process_clock(child.pid)) for child in multiprocessing.active_children())
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + alive + ended.ru_utime + ended.ru_stime


def summarise(names: list[str], rounds: list[dict]) -> dict[str, dict[str, float]]:
    """Medians over the rounds; the ratio is the median of the rounds' own ratios to this loader."""
    summary = {}
    for name in names:
        spent = [measured[name]["cpu_seconds_per_1000"] for measured in rounds]
        first = OURS if OURS in names else names[0]
        ratios = [of / measured[first]["cpu_seconds_per_1000"] for of, measured in zip(spent, rounds, strict=True)]
        summary[name] = {
            "cpu_seconds_per_1000": statistics.median(spent),
            "images_per_second": statistics.median(measured[name]["images_per_second"] for measured in rounds),
            "times_ours": statistics.median(ratios),
            "times_ours_min": min(ratios),
            "times_ours_max": max(ratios),
        }
    return summary


def table(result: dict, args: argparse.Namespace) -> Table:
    workers = f"{args.workers} workers" if args.workers else "no workers"
    made = Table(
        title=f"{workers}, crops of {args.size}, batches of {args.batch_size}, medians of {args.rounds} rounds"
    )
    made.add_column("pipeline", no_wrap=True)
    for heading in ("CPU s/1000", "times ours", "over rounds", "images/s"):
        made.add_column(heading, justify="right", no_wrap=True)
    for name, row in result.items():
        made.add_row(
            name,
            f"{row['cpu_seconds_per_1000']:.3f}",
            f"{row['times_ours']:.2f}",
            f"{row['times_ours_min']:.2f}-{row['times_ours_max']:.2f}",
            f"{row['images_per_second']:.0f}",
        )
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
