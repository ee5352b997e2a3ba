"""DSeq-JEPA's regions of a whole batch at once against one image after another in OpenCV.

Both arms turn the same saliency maps, (B, N) in [0, 1], into the same map of ranked regions, which is checked before
anything is timed. The usual way is the released code's: each map to 8 bits, cv2.threshold with Otsu's method,
cv2.connectedComponents, and a loop over components; on a GPU it includes the copies to the host and back.

- Arms take turns within a round, and a round's ratio compares its own arms: what else the machine does hits all.
- On a CPU the time is this process' CPU time, on a GPU the time between two synchronisations.

python benchmarks/regions.py --rounds 7
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # so that it runs as a script from anywhere

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from prelude.objectives.regions import find_regions, normalised_saliency  # noqa: E402

NUM_REGIONS, MIN_AREA = 5, 0.02


def main() -> None:
    args = parse_arguments()
    device = torch.device(args.device)
    for side in args.sides:
        print(json.dumps(compare(smooth_maps(args.batch_size, (side, side)).to(device), (side, side), args.rounds)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.rpartition("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--sides", type=int, nargs="+", default=[14, 28], help="sides of the grid of patches")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def compare(saliency: torch.Tensor, grid: tuple[int, int], num_rounds: int) -> dict:
    arms = {"batched": batched, "one_by_one": one_by_one}
    agree = (batched(saliency, grid) == one_by_one(saliency, grid)).float().mean().item()
    if agree < 1:
        raise SystemExit(f"the arms disagree on {1 - agree:.2%} of the patches")
    rounds = []
    for nth in range(num_rounds):
        order = list(arms) if nth % 2 == 0 else list(reversed(arms))
        rounds.append({name: seconds(arms[name], saliency, grid) for name in order})
    ratios = [times["one_by_one"] / times["batched"] for times in rounds]
    return {
        "device": str(saliency.device),
        "grid": f"{grid[0]}x{grid[1]}",
        "batch": len(saliency),
        **{f"{name}_ms": round(1000 * statistics.median(times[name] for times in rounds), 3) for name in arms},
        "times_faster": round(statistics.median(ratios), 2),
        "times_faster_range": [round(min(ratios), 2), round(max(ratios), 2)],
    }


def smooth_maps(count: int, grid: tuple[int, int]) -> torch.Tensor:
    """Blurred noise of several degrees of smoothness, as a teacher's similarities are."""
    generator = torch.Generator().manual_seed(0)
    coarse = [torch.randn(count // 4 + 1, 1, side, side, generator=generator) for side in (4, 6, 8, 10)]
    maps = [F.interpolate(noise, size=grid, mode="bicubic").flatten(1) for noise in coarse]
    return normalised_saliency(torch.cat(maps)[:count])


def batched(saliency: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    return find_regions(saliency, grid, num_regions=NUM_REGIONS, min_area=MIN_AREA).rid


def one_by_one(saliency: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    found = []
    for values in saliency.cpu().numpy():
        image = values.reshape(grid)
        levels = (image * 255).astype(np.uint8)
        _, mask = cv2.threshold(levels, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
        count, labels = cv2.connectedComponents(mask, connectivity=8)
        regions = []
        for label in range(1, count):
            component = labels == label
            if component.sum() >= MIN_AREA * image.size:
                regions.append((-image[component].mean(dtype=np.float64), np.flatnonzero(component)[0], component))
        regions.sort(key=lambda region: region[:2])
        rid = np.full(grid, min(len(regions), NUM_REGIONS - 1) + 1)
        for rank, (_, _, component) in enumerate(regions[: NUM_REGIONS - 1], start=1):
            rid[component] = rank
        found.append(rid.ravel())
    return torch.from_numpy(np.stack(found)).to(saliency.device)


def seconds(arm: Callable, saliency: torch.Tensor, grid: tuple[int, int]) -> float:
    """One call of an arm, after one that warms it up."""
    arm(saliency, grid)
    if saliency.is_cuda:
        torch.cuda.synchronize()
    clock = time.perf_counter if saliency.is_cuda else time.process_time
    start = clock()
    arm(saliency, grid)
    if saliency.is_cuda:
        torch.cuda.synchronize()
    return clock() - start


if __name__ == "__main__":
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    main()
