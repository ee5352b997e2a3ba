"""Descriptors and memory of the loader over many batches, of this process and of its workers.

Memory is what a process has for itself (`Private_Clean` and `Private_Dirty` of Linux' smaps_rollup), so that pages
shared with its parent are counted once. After the first tenth of the batches nothing may grow.

python benchmarks/loader_memory.py --shards 'DATA/train-{000000..000019}.tar' --size 32 --batches 10000
"""

import argparse
import multiprocessing
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # so that it runs as a script from anywhere

import torch  # noqa: E402

from prelude.data.batch import View, ViewPlan  # noqa: E402
from prelude.data.loader import Loader  # noqa: E402
from prelude.data.shards import ShardIndex  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--shards", required=True, help="local tar shards with .cls members; braces expand")
    parser.add_argument("--batches", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args()
    plan = ViewPlan((View((args.size, args.size)),))
    index = ShardIndex(args.shards, "cls")
    loader = Loader(index, plan, seed=0, micro_batch=args.batch_size, num_workers=args.workers, label="cls")
    print(f"{'batches':>8}  descriptors  private memory, MiB (this process, then each worker)")
    for nth in range(1, args.batches + 1):
        next(loader)
        if nth % (args.batches // 10) == 0:
            pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
            opened = " ".join(str(len(os.listdir(f"/proc/{pid}/fd"))) for pid in pids)
            print(f"{nth:>8}  {opened:>11}  {' '.join(f'{private_mebibytes(pid):.1f}' for pid in pids)}", flush=True)
    loader.close()


def private_mebibytes(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))) / 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
