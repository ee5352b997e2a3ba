"""A linear probe of many heads over a bank of frozen features: time, and the most memory that its process needs.

Features are drawn, not extracted: correlated Gaussians of overlapping classes, written as a bank is. Heads differ
in weight decay, half of them with batch norm and half without. `--knn` searches neighbours instead.

- Memory is the peak resident size of the whole process, Python and torch included, and what of it was there before the
  first feature was read. It counts pages of the mapped file, which the system may drop at any time.

python benchmarks/probe.py --samples 50000 --width 768 --classes 10 --heads 100
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # so that it runs as a script from anywhere

import numpy as np  # noqa: E402
import torch  # noqa: E402

from prelude.evaluators.features.extraction import Features  # noqa: E402
from prelude.evaluators.frozen.knn import knn  # noqa: E402
from prelude.evaluators.frozen.linear_probe import linear_probe  # noqa: E402

PIECE = 2000  # samples drawn at once


def main() -> None:
    args = parser().parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        train = drawn(Path(folder) / "train", args.samples, args.width, args.classes, seed=1)
        test = drawn(Path(folder) / "test", args.samples // 5, args.width, args.classes, seed=2)
        before, started, cpu = peak_mib(), time.monotonic(), time.process_time()
        if args.knn:
            outcome = knn(train, test)
        else:
            decays = np.logspace(-5, 0.5, args.heads // 2).tolist()
            outcome = linear_probe(train, test, weight_decays=decays, norms=("batch", "none"))
    report = {
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_mib": round(peak_mib()),
        "peak_mib_before": round(before),
        "threads": torch.get_num_threads(),
        "chosen": outcome.chosen,
        "top1": outcome.numbers["top1"].value,
    }
    if not args.knn:
        grid = outcome.details["grid"]
        report["heads"] = len(grid)
        report["converged"] = sum(row["converged"] for row in grid)
        report["passes"] = [min(row["passes"] for row in grid), max(row["passes"] for row in grid)]
    print(json.dumps(report))


def drawn(path: Path, num_samples: int, width: int, num_classes: int, seed: int) -> dict[str, Features]:
    """Standard deviations along the axes fall off over two decades, as those of an encoder's features do."""
    shared = torch.Generator().manual_seed(0)
    centres = torch.randn(num_classes, width, generator=shared)
    mixing = torch.randn(width, width, generator=shared) * torch.logspace(0, -2, width) / width**0.5
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_samples,), generator=generator)
    with open(path, "wb") as file:
        for part in labels.split(PIECE):
            noise = torch.randn(len(part), width, generator=generator)
            file.write(((centres[part] + 8 * noise) @ mixing).numpy().tobytes())
    values = torch.from_numpy(np.memmap(path, "<f4", "c", shape=(num_samples, width)))
    return {"mean": Features(values, labels, torch.arange(num_samples), "drawn", "mean")}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kilobytes on Linux


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--heads", type=int, default=100)
    parser.add_argument("--knn", action="store_true")
    parser.add_argument("--folder", help="for the drawn features (default: the system's temporary folder)")
    return parser


if __name__ == "__main__":
    main()
