"""SparK's encoder step, forward and backward, on active positions against masked whole maps.

Arms: `dense` (the plain timm encoder on the whole image, as is and with channels last), `masked` (every layer on whole
maps, multiplied by the mask: the usual way, and the reference of the tests), and `sparse` (packed active positions).
The last two give the same maps and gradients, which is checked before anything is timed.

- Arms take turns within a round; a round's ratio compares its own arms.
- On a CPU the time is this process' CPU time, on a GPU the time between two synchronisations.

python benchmarks/spark.py --model convnext_tiny --batch-size 8 --rounds 5
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "helpers")]  # so that it runs as a script from anywhere

import masked_dense  # noqa: E402
import torch  # noqa: E402

from prelude.objectives.masking import mask_noise, num_kept, random_mask  # noqa: E402
from prelude.objectives.sparse_check import survey, total_stride  # noqa: E402
from prelude.objectives.sparse_encoder import SparseEncoder  # noqa: E402
from prelude.pretrain.config import EncoderConfig  # noqa: E402
from prelude.pretrain.encoders import build_encoder  # noqa: E402


def main() -> None:
    args = parse_arguments()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    arms = build_arms(args, device)
    check(arms)
    rounds = []
    for nth in range(args.rounds):
        order = list(arms) if nth % 2 == 0 else list(reversed(arms))
        rounds.append({name: seconds(arms[name], device) for name in order})
    result = {"model": args.model, "image_size": args.image_size, "batch_size": args.batch_size, "device": str(device)}
    for name in arms:
        ratios = [times[name] / times["sparse"] for times in rounds]
        result[name] = {
            "ms": round(1000 * statistics.median(times[name] for times in rounds), 1),
            "times_sparse": round(statistics.median(ratios), 2),
            "range": [round(min(ratios), 2), round(max(ratios), 2)],
        }
    print(json.dumps(result))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.rpartition("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="convnext_tiny")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--mask-ratio", type=float, default=0.6)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def build_arms(args: argparse.Namespace, device: torch.device) -> dict:
    size = (args.image_size, args.image_size)
    model = build_encoder(EncoderConfig(name=args.model, image_size=args.image_size), seed=0)
    stride = total_stride(model, args.model, size)
    grid = (args.image_size // stride,) * 2
    idle = survey(model, args.model, size, grid).idle
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in idle)
    model.to(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch_size, 3, *size, generator=generator).to(device)
    keep = num_kept(grid[0] * grid[1], args.mask_ratio)
    visible = random_mask(mask_noise(torch.arange(args.batch_size), grid[0] * grid[1]), keep).keep.to(device)
    sparse = SparseEncoder(model)
    last = images.contiguous(memory_format=torch.channels_last)

    def unpacked():
        encoded = sparse(images, visible, grid)
        return [encoded.positions.unpack(packed) for packed in encoded.maps]

    forwards = {
        "dense": lambda: model.forward_intermediates(images, intermediates_only=True),
        "dense, channels last": lambda: model.forward_intermediates(last, intermediates_only=True),
        "masked": lambda: masked_dense.encode(model, images, visible, grid),
        "masked, channels last": lambda: masked_dense.encode(model, last, visible, grid),
        "sparse": unpacked,
    }
    return {name: lambda forward=forward: step(model, forward) for name, forward in forwards.items()}


def step(model: torch.nn.Module, forward) -> list[torch.Tensor]:
    """Maps of all stages, and gradients of the mean of their squares."""
    model.zero_grad(set_to_none=True)
    maps = forward()
    sum(features.float().square().mean() for features in maps).backward()
    return [*(features.detach() for features in maps), *(p.grad for p in model.parameters() if p.requires_grad)]


def check(arms: dict) -> None:
    for ours, reference in zip(arms["sparse"](), arms["masked"](), strict=True):
        if (ours - reference).norm() > 1e-3 * reference.norm() + 1e-6:
            raise SystemExit(f"the arms disagree: {(ours - reference).norm():.2e} of {reference.norm():.2e}")


def seconds(arm, device: torch.device) -> float:
    clock = time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize()
        clock = time.perf_counter
    start = clock()
    arm()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


if __name__ == "__main__":
    main()
