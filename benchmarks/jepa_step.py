"""A training step of DSeq-JEPA against one of I-JEPA: forward, backward and the teacher's update.

Arms: I-JEPA (`repeat`, as published, and `packed`), and DSeq-JEPA predicting regions of every image, with `causal` and
with `reencode` contexts. All see the same images. Saliency maps are blurred noise, so that images have several regions
as a trained teacher gives them; `--regions teacher` keeps those of the untrained one.

- Arms take turns within a round; a round's ratio compares its own arms.
- On a CPU the time is this process' CPU time and memory is what autograd kept for the backward pass; on a GPU time is
  between synchronisations and memory is the allocator's peak.
- FLOPs are counted, forward and backward; unlike time they do not depend on what else the machine does.

python benchmarks/jepa_step.py --model small --batch-size 32        (on a CPU)
python benchmarks/jepa_step.py --model base --batch-size 256        (on a GPU, in bf16)
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # so that it runs as a script from anywhere

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from prelude.data.batch import Batch  # noqa: E402
from prelude.objectives.dseqjepa import DSeqJEPA  # noqa: E402
from prelude.objectives.ijepa import IJEPA  # noqa: E402
from prelude.objectives.regions import normalised_saliency  # noqa: E402
from prelude.pretrain.config import EncoderConfig  # noqa: E402
from prelude.pretrain.encoders import build_encoder, seeded  # noqa: E402
from prelude.pretrain.schedules import Progress  # noqa: E402

SHAPES = {  # width, depth, heads, predictor depth
    "tiny": (192, 12, 3, 6),
    "small": (384, 12, 6, 6),
    "base": (768, 12, 12, 6),
    "large": (1024, 24, 16, 12),
}
ARMS = {
    "I-JEPA": (IJEPA, {}),
    "I-JEPA, packed": (IJEPA, {"predictor": "packed"}),
    "DSeq-JEPA, causal": (DSeqJEPA, {"lambda_start": 1.0}),
    "DSeq-JEPA, reencode": (DSeqJEPA, {"lambda_start": 1.0, "context": "reencode"}),
}
STEPS = 100  # of the run that the steps belong to


def main() -> None:
    args = parse_arguments()
    device = torch.device(args.device)
    batch = some_batch(args.batch_size, args.image_size).to(device)
    models = {name: build(name, args).to(device) for name in ARMS}
    results = {name: [] for name in ARMS}
    for nth in range(args.rounds + 1):  # the first round warms up; every arm takes the same steps
        for name in list(ARMS) if nth % 2 == 0 else list(reversed(ARMS)):
            results[name].append(measure(models[name], batch, nth))
    for name in ARMS:
        rows, base = results[name][1:], results["I-JEPA"][1:]
        ratios = [row["seconds"] / other["seconds"] for row, other in zip(rows, base, strict=True)]
        memory, of_base = (max(row["bytes"] for row in of) for of in (rows, base))
        report = {
            "arm": name,
            "milliseconds": 1000 * statistics.median(row["seconds"] for row in rows),
            "times_ijepa": statistics.median(ratios),
            "times_ijepa_range": [round(min(ratios), 3), round(max(ratios), 3)],
            "memory_mib": memory / 2**20,
            "memory_times_ijepa": memory / of_base,
            "gflops_an_image": flops(models[name], batch, args.rounds) / 1e9,
        }
        print(json.dumps({key: round(v, 3) if isinstance(v, float) else v for key, v in report.items()}), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.rpartition("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=SHAPES, default="small")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--min-area", type=float, default=0.02, help="objective.region_min_area")
    parser.add_argument("--regions", choices=["noise", "teacher"], default="noise")
    return parser.parse_args()


def build(name: str, args: argparse.Namespace):
    cls, options = ARMS[name]
    width, depth, heads, predictor_depth = SHAPES[args.model]
    kwargs = {"embed_dim": width, "depth": depth, "num_heads": heads, "global_pool": "avg", "fc_norm": False}
    encoder = EncoderConfig(
        name="vit_base_patch16_224",
        image_size=args.image_size,
        patch_size=args.patch_size,
        kwargs=kwargs | {"class_token": cls is DSeqJEPA},
    )
    options = {"predictor_dim": 384, "predictor_depth": predictor_depth, "predictor_num_heads": 12} | options
    if cls is DSeqJEPA:
        options["region_min_area"] = args.min_area
    with seeded(0):
        timm_model = build_encoder(encoder, seed=0)
        model = cls(timm_model, cls.Options(**options), image_size=encoder.size, mean=(0.5,) * 3, std=(0.25,) * 3)
    if cls is DSeqJEPA and args.regions == "noise":
        look, maps = model.look, smooth_maps(args.batch_size, model.grid)
        model.look = lambda images: (look(images)[0], maps.to(images.device))
    return model


def smooth_maps(count: int, grid: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = [torch.randn(count // 4 + 1, 1, side, side, generator=generator) for side in (4, 5, 6, 8)]
    maps = torch.stack([F.interpolate(noise, size=grid, mode="bicubic").flatten(1) for noise in coarse], dim=1)
    return normalised_saliency(maps.flatten(0, 1)[:count])


def some_batch(count: int, size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    boxes, flips = torch.zeros(count, 1, 4, dtype=torch.int32), torch.zeros(count, 1, dtype=torch.bool)
    ids = torch.arange(count)
    return Batch((pixels,), boxes, flips, seeds=ids * 1000, sample_ids=ids, positions=ids)


def step(model, batch: Batch, nth: int) -> None:
    with torch.autocast(batch.seeds.device.type, dtype=torch.bfloat16, enabled=batch.seeds.is_cuda):
        loss = model(batch, Progress(nth, STEPS, 10.0)).total
    loss.backward()
    model.zero_grad(set_to_none=True)
    model.after_step(Progress(nth + 1, STEPS, 10.0), torch.ones(()))


def measure(model, batch: Batch, nth: int) -> dict[str, float]:
    if batch.seeds.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        step(model, batch, nth)
        torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - start, "bytes": torch.cuda.max_memory_allocated()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    start = time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(model, batch, nth)
    spent = time.process_time() - start
    return {"seconds": spent, "bytes": sum(size for pointer, size in kept.items() if pointer not in parameters)}


def flops(model, batch: Batch, num_steps: int) -> float:
    """Of one image, forward and backward, over the measured steps."""
    counter = FlopCounterMode(display=False)
    with counter:
        for nth in range(1, num_steps + 1):
            model(batch, Progress(nth, STEPS, 10.0)).total.backward()
            model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / num_steps / len(batch)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
