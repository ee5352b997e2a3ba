"""CPU time of colour augmentation: a batch at once on tensors, against image by image, in one run.

Three ways to the two views of Barlow Twins, from uint8 crops to normalised float32: with PIL images and torchvision
(what most pipelines do in their workers), with torchvision's v2 functions on uint8 tensors, and this project's
`prelude.pretrain.images.images`. All three draw the same kind of parameters for every image of its own. On an
accelerator the third costs the host nothing; here it runs on the CPU like the others.

- Ways take turns within a round, and a round's ratio compares its own ways: what else the machine does hits all.
- CPU time is user + system of this process, on one thread.

python benchmarks/views.py --size 224 --batch 32 --rounds 5
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # so that it runs as a script from anywhere

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torchvision import transforms  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

from prelude.data.batch import Batch, Photometric, View, ViewPlan  # noqa: E402
from prelude.pretrain.images import images  # noqa: E402

COLOURS = {"jitter": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "grey": 0.2}


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    blurs = (0.0, 0.0) if args.no_blur else (1.0, 0.1)
    plan = ViewPlan(
        tuple(
            View((args.size, args.size), photometric=Photometric(**COLOURS, blur=blur, solarise=solarise))
            for blur, solarise in zip(blurs, (0.0, 0.2), strict=True)
        )
    )
    batch = a_batch(args.batch, plan)
    ways: dict[str, Callable[[], object]] = {
        "image by image, PIL": one_by_one(batch, plan, pil=True),
        "image by image, v2 on uint8 tensors": one_by_one(batch, plan, pil=False),
        "this project, in bulk": lambda: images(batch, plan),
    }
    for way in ways.values():
        way()  # what is allocated and chosen once
    rounds = []
    for nth in range(args.rounds):
        order = list(ways) if nth % 2 == 0 else list(reversed(ways))
        rounds.append({name: cpu_milliseconds(ways[name]) / args.batch for name in order})
    report(list(ways), rounds, args)


def a_batch(num: int, plan: ViewPlan) -> Batch:
    """Smooth images with noise on them, laid out as the loader lays them out."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(num, 3, 8, 8, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, plan.views[0].size, mode="bilinear")
    pixels = (255 * (0.9 * pixels + 0.1 * torch.rand(pixels.shape, generator=generator))).to(torch.uint8)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    return Batch(
        views=(pixels, pixels.clone()),
        boxes=torch.zeros(num, 2, 4, dtype=torch.int32),
        flips=torch.rand(num, 2, generator=generator) < 0.5,
        seeds=torch.arange(num),
        sample_ids=torch.arange(num),
        positions=torch.arange(num),
    )


def one_by_one(batch: Batch, plan: ViewPlan, *, pil: bool) -> Callable[[], object]:
    """The classical transforms of the two views, mapped over the images."""
    pipelines = [pipeline(view.photometric, plan, pil=pil) for view in plan.views]
    sources = []
    for view in batch.views:
        arrays = [image.permute(1, 2, 0).contiguous().numpy() for image in view]
        sources.append([Image.fromarray(array) for array in arrays] if pil else [image.contiguous() for image in view])

    def run() -> list[torch.Tensor]:
        return [
            torch.stack([transform(image) for image in view])
            for transform, view in zip(pipelines, sources, strict=True)
        ]

    return run


def pipeline(colours: Photometric, plan: ViewPlan, *, pil: bool) -> Callable:
    space = transforms if pil else v2
    jitter = space.ColorJitter(colours.brightness, colours.contrast, colours.saturation, colours.hue)
    # PIL's pipelines blur with PIL's filter; a kernel of a tenth of the image is what SimCLR and BYOL use on tensors.
    blur = PilBlur(colours.blur_sigma) if pil else v2.GaussianBlur(plan.views[0].size[0] // 20 * 2 + 1)
    last = [transforms.ToTensor()] if pil else [v2.ToDtype(torch.float32, scale=True)]
    return space.Compose(
        [
            space.RandomHorizontalFlip(0.5),
            space.RandomApply([jitter], colours.jitter),
            space.RandomGrayscale(colours.grey),
            *([space.RandomApply([blur], colours.blur)] if colours.blur else []),
            space.RandomSolarize(128, colours.solarise),
            *last,
            space.Normalize(plan.mean, plan.std),
        ]
    )


class PilBlur:
    def __init__(self, sigma: tuple[float, float]):
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        from PIL import ImageFilter

        low, high = self.sigma
        return image.filter(ImageFilter.GaussianBlur(low + (high - low) * torch.rand(()).item()))


def cpu_milliseconds(way: Callable[[], object]) -> float:
    start = time.process_time()
    way()
    return 1000 * (time.process_time() - start)


def report(names: list[str], rounds: list[dict], args: argparse.Namespace) -> None:
    table = Table(title=f"two views of {args.size} pixels, batches of {args.batch}, {args.rounds} rounds")
    for column in ("", "CPU ms an image, median", "range", "times this project's"):
        table.add_column(column, justify="left" if not column else "right")
    ours, result = names[-1], {}
    for name in names:
        spent = [row[name] for row in rounds]
        ratio = statistics.median(row[name] / row[ours] for row in rounds)
        result[name] = {"cpu_ms": statistics.median(spent), "ratio": ratio}
        table.add_row(name, f"{statistics.median(spent):.2f}", f"{min(spent):.2f} to {max(spent):.2f}", f"{ratio:.2f}")
    Console().print(table)
    if args.json:
        Path(args.json).write_text(json.dumps({"arguments": vars(args), "ways": result, "rounds": rounds}, indent=2))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--size", type=int, default=224, help="pixels of a view")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-blur", action="store_true", help="as recipes for small images do")
    parser.add_argument("--json", help="also write the numbers here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
