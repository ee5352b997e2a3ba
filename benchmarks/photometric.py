"""Barlow Twins' colour work on a batch at once against one image after another.

All arms take the same uint8 crops and do jitter, grey, blur and solarise with the paper's probabilities, both views
of every image. The crops themselves are not timed.

- batch: `prelude.pretrain.photometric.augment`, float32, on --device.
- PIL one by one: torchvision's transforms on PIL images, with PIL's Gaussian blur, as the official code does in the
  loader's workers; ToTensor included.
- tensors one by one: torchvision's v2 transforms on uint8 tensors.

Arms take turns within a round, and a round's ratio compares its own arms. The time is this process' CPU time, or on a
GPU the time between two synchronisations; there the other arms still run on one core of the CPU.

python benchmarks/photometric.py --size 224 --rounds 5
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # so that it runs as a script from anywhere

import torch  # noqa: E402
from PIL import ImageFilter, ImageOps  # noqa: E402
from torchvision import transforms as v1  # noqa: E402
from torchvision.transforms import v2  # noqa: E402
from torchvision.transforms.functional import to_pil_image  # noqa: E402

from prelude.data.batch import Photometric  # noqa: E402
from prelude.pretrain.photometric import augment  # noqa: E402

STRENGTHS = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
FIRST, SECOND = (1.0, 0.0), (0.1, 0.2)  # probabilities of blur and solarise


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.rpartition("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(json.dumps(compare(args)))


def compare(args: argparse.Namespace) -> dict:
    smooth = torch.rand(args.batch_size, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    crops = torch.nn.functional.interpolate(smooth, size=(args.size, args.size), mode="bicubic").clamp(0, 1)
    crops = (crops * 255).to(torch.uint8)
    on_device, pictures = crops.to(args.device), [to_pil_image(crop) for crop in crops]
    in_pil, on_tensors = [pil_view(*view) for view in (FIRST, SECOND)], [tensor_view(*view) for view in (FIRST, SECOND)]
    in_bulk = [view_in_bulk(*view) for view in (FIRST, SECOND)]
    seeds = torch.arange(args.batch_size, device=args.device)
    arms: dict[str, Callable[[], object]] = {
        "batch": lambda: [augment(on_device.float() / 255, view, seeds, v) for v, view in enumerate(in_bulk)],
        "pil": lambda: [torch.stack([view(picture) for picture in pictures]) for view in in_pil],
        "tensors": lambda: [torch.stack([view(crop) for crop in crops]) for view in on_tensors],
    }
    rounds = []
    for nth in range(args.rounds + 1):  # the first warms up
        order = list(arms) if nth % 2 == 0 else list(reversed(arms))
        rounds.append({name: seconds(arms[name], args.device if name == "batch" else "cpu") for name in order})
    result = {"device": args.device, "size": args.size, "batch": args.batch_size}
    for name in arms:
        result[f"{name}_ms_per_image"] = round(
            1000 * statistics.median(times[name] for times in rounds[1:]) / args.batch_size, 3
        )
    for name in ("pil", "tensors"):
        ratios = [times[name] / times["batch"] for times in rounds[1:]]
        result[f"times_less_than_{name}"] = round(statistics.median(ratios), 2)
        result[f"times_less_than_{name}_range"] = [round(min(ratios), 2), round(max(ratios), 2)]
    return result


def view_in_bulk(blur: float, solarise: float) -> Photometric:
    return Photometric(jitter=0.8, grey=0.2, blur=blur, solarise=solarise, **STRENGTHS)


def pil_view(blur: float, solarise: float) -> Callable:
    def maybe_blur(picture):
        if random.random() >= blur:
            return picture
        return picture.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    def maybe_solarise(picture):
        return ImageOps.solarize(picture) if random.random() < solarise else picture

    return v1.Compose(
        [
            v1.RandomApply([v1.ColorJitter(**STRENGTHS)], p=0.8),
            v1.RandomGrayscale(0.2),
            maybe_blur,
            maybe_solarise,
            v1.ToTensor(),
        ]
    )


def tensor_view(blur: float, solarise: float) -> Callable:
    return v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(**STRENGTHS)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(17, (0.1, 2.0))], p=blur),
            v2.RandomSolarize(128, p=solarise),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


def seconds(arm: Callable, device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    arm()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


if __name__ == "__main__":
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    main()
