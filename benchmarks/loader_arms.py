"""What `loader.py` compares: this loader, the pipelines that users write, and other loaders.

Every arm is a function that opens an endless iterator of batches; what it needs that is not installed is named by
ImportError. All draw RandomResizedCrop boxes of one distribution and resize with antialiasing, bicubic but where an
arm's name says otherwise. Arms of uint8 leave flip and normalisation to the device, as this loader does; the flips
that belong to a user's transforms are kept, since they cost next to nothing.
"""

import itertools
import random
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # so that it runs as a script from anywhere

import numpy as np  # noqa: E402
import photometric  # noqa: E402
import torch  # noqa: E402
import webdataset as wds  # noqa: E402
from torch.utils.data import DataLoader, Dataset, get_worker_info  # noqa: E402
from torchvision import io as torchvision_io  # noqa: E402
from torchvision import transforms  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

from prelude.data.batch import View, ViewPlan  # noqa: E402
from prelude.data.loader import Loader  # noqa: E402
from prelude.data.shards import ShardIndex  # noqa: E402
from prelude.data.views import read_views  # noqa: E402
from prelude.pretrain.images import images  # noqa: E402

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
BATCHES_AHEAD = 2  # that each worker prepares, in all arms
OURS = "this loader"
NORMALISED = "this loader, normalised on CPU"
LIMIT = "libjpeg-turbo alone, whole images"


def arms(args: Namespace, folder: Path) -> dict[str, Callable[[], Iterator]]:
    """By name, the usual pipeline first. folder: an empty one, for the formats of other loaders."""
    plan = ViewPlan((View((args.size, args.size), scale=SCALE, ratio=RATIO),))
    return {
        "webdataset and PIL, float32": lambda: usual_batches(args, plan),
        OURS: lambda: our_batches(args, plan, normalise=False),
        NORMALISED: lambda: our_batches(args, plan, normalise=True),
        "webdataset and torchvision v2, uint8": lambda: uint8_batches(args),
        "files and torchvision v2, uint8": lambda: file_batches(args, folder / "files"),
        "DALI on CPU, cubic": lambda: dali_batches(args, "INTERP_CUBIC"),
        "DALI on CPU, triangular": lambda: dali_batches(args, "INTERP_TRIANGULAR"),
        "litdata with this kernel": lambda: litdata_batches(args, plan, folder / "litdata"),
        "streaming with this kernel": lambda: streaming_batches(args, plan, folder / "streaming"),
        LIMIT: lambda: decoded_batches(args),
    }


def two_view_arms(args: Namespace) -> dict[str, Callable[[], Iterator]]:
    """From shards to both views of Barlow Twins, coloured and normalised: all that a run without a GPU does before
    its step."""
    of_both = [photometric.view_in_bulk(*view) for view in (photometric.FIRST, photometric.SECOND)]
    crop = View((args.size, args.size), scale=SCALE, ratio=RATIO)
    plan = ViewPlan(tuple(replace(crop, photometric=colours) for colours in of_both))
    return {
        "webdataset and PIL, float32": lambda: two_view_batches(args, plan, photometric.pil_view, "pil"),
        OURS: lambda: our_batches(args, plan, normalise=True),
        "webdataset and torchvision v2, uint8": lambda: two_view_batches(args, plan, photometric.tensor_view, None),
    }


# ---- this loader


def our_batches(args: Namespace, plan: ViewPlan, normalise: bool) -> Iterator:
    index = ShardIndex(args.shards, "cls")
    loader = Loader(index, plan, seed=0, micro_batch=args.batch_size, num_workers=args.workers, label="cls")
    try:
        for batch in loader:
            yield images(batch, plan) if normalise else batch
    finally:
        loader.close()


# ---- what users write


def usual_batches(args: Namespace, plan: ViewPlan) -> Iterator:
    """Without a shuffle buffer, which would only add to its cost."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(args.size, SCALE, RATIO, transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(plan.mean, plan.std),
        ]
    )
    samples = wds.WebDataset(args.shards, shardshuffle=False).repeat().decode("pil").to_tuple("jpg", "cls")
    yield from by_webloader(samples.map_tuple(transform, lambda label: label), args)


def uint8_batches(args: Namespace) -> Iterator:
    """The best that torchvision offers: its own decoder, and v2 on uint8 tensors."""
    samples = wds.WebDataset(args.shards, shardshuffle=False).repeat().to_tuple("jpg", "cls")
    yield from by_webloader(samples.map_tuple(Uint8Crop(args.size), int), args)


def two_view_batches(args: Namespace, plan: ViewPlan, colours: Callable, decoder: str | None) -> Iterator:
    """colours: makes what recolours a crop, from the probabilities of blur and solarising. decoder: of webdataset, or
    None for torchvision's."""
    pil_crop = transforms.Compose(
        [
            transforms.RandomResizedCrop(args.size, SCALE, RATIO, transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
        ]
    )
    cut = [pil_crop if decoder else Uint8Crop(args.size).transform]
    views = [
        transforms.Compose([*cut, colours(*view), transforms.Normalize(plan.mean, plan.std)])
        for view in (photometric.FIRST, photometric.SECOND)
    ]
    samples = wds.WebDataset(args.shards, shardshuffle=False).repeat()
    samples = (samples.decode(decoder) if decoder else samples.map_dict(jpg=decoded)).to_tuple("jpg", "cls")
    yield from by_webloader(samples.map_tuple(lambda image: [view(image) for view in views], int), args)


def by_webloader(samples, args: Namespace) -> Iterator:
    return iter(wds.WebLoader(samples, batch_size=args.batch_size, **workers(args)))


class Uint8Crop:
    """From a JPEG's bytes to a uint8 crop (C, size, size)."""

    def __init__(self, size: int):
        crop = v2.RandomResizedCrop(size, SCALE, RATIO, v2.InterpolationMode.BICUBIC, antialias=True)
        self.transform = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def __call__(self, jpeg: bytes) -> torch.Tensor:
        return self.transform(decoded(jpeg))


def decoded(jpeg: bytes) -> torch.Tensor:
    encoded = torch.frombuffer(bytearray(jpeg), dtype=torch.uint8)
    return torchvision_io.decode_jpeg(encoded, torchvision_io.ImageReadMode.RGB)


class Files(Dataset):
    """One file an image, as ImageFolder reads them."""

    def __init__(self, paths: list[Path], size: int):
        self.paths, self.crop = [str(path) for path in paths], Uint8Crop(size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, nth: int) -> tuple[torch.Tensor, int]:
        return self.crop(Path(self.paths[nth]).read_bytes()), nth


def file_batches(args: Namespace, folder: Path) -> Iterator:
    if not folder.exists():
        folder.mkdir()
        for nth, (jpeg, _) in enumerate(samples_of(args)):
            (folder / f"{nth:07}.jpg").write_bytes(jpeg)
    yield from by_dataloader(Files(sorted(folder.iterdir()), args.size), args)


# ---- other loaders


def dali_batches(args: Namespace, interpolation: str) -> Iterator:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=args.batch_size, num_threads=max(args.workers, 1), device_id=None, seed=0)
    def crops():
        jpegs, labels = fn.readers.webdataset(
            paths=wds.shardlists.expand_urls(args.shards), ext=["jpg", "cls"], random_shuffle=True, initial_fill=256
        )
        cut = fn.decoders.image_random_crop(
            jpegs, device="cpu", output_type=types.RGB, random_area=SCALE, random_aspect_ratio=RATIO
        )
        interp_type = getattr(types, interpolation)
        return fn.resize(cut, size=(args.size, args.size), interp_type=interp_type, antialias=True), labels

    pipeline = crops()
    pipeline.build()
    while True:
        pixels, labels = pipeline.run()
        yield np.array(pixels.as_tensor()), [bytes(np.array(label)) for label in labels]


def litdata_batches(args: Namespace, plan: ViewPlan, folder: Path) -> Iterator:
    import litdata
    from litdata.streaming.writer import BinaryWriter

    if not folder.exists():
        folder.mkdir()
        writer = BinaryWriter(str(folder), chunk_bytes="64MB")
        for nth, (jpeg, label) in enumerate(samples_of(args)):
            writer.add_item(nth, {"jpg": jpeg, "cls": label})
        writer.done()
        writer.merge(1)
    crop = Kernel(plan)

    class Crops(litdata.StreamingDataset):
        def __getitem__(self, at):
            return crop(super().__getitem__(at))

    dataset = Crops(str(folder), shuffle=True, seed=0)
    yield from by_dataloader(dataset, args, litdata.StreamingDataLoader, shuffle=None)


def streaming_batches(args: Namespace, plan: ViewPlan, folder: Path) -> Iterator:
    import streaming

    if not folder.exists():
        with streaming.MDSWriter(out=str(folder), columns={"jpg": "bytes", "cls": "int"}) as writer:
            for jpeg, label in samples_of(args):
                writer.write({"jpg": jpeg, "cls": label})
    crop = Kernel(plan)

    class Crops(streaming.StreamingDataset):
        def __getitem__(self, at):
            return crop(super().__getitem__(at))

    streaming.base.util.clean_stale_shared_memory()
    # All shards are opened at once, because a thread that opens them later outlives the folder.
    dataset = Crops(local=str(folder), shuffle=True, batch_size=args.batch_size, predownload=2**40)
    yield from by_dataloader(dataset, args, shuffle=None)


class Kernel:
    """This project's decoding, cropping and resizing, for other loaders' samples."""

    def __init__(self, plan: ViewPlan):
        self.plan = plan

    def __call__(self, sample: dict) -> tuple[torch.Tensor, int]:
        pixels = np.empty((*self.plan.views[0].size, 3), np.uint8)
        read_views(bytes(sample["jpg"]), self.plan, random.getrandbits(63), [pixels])
        return torch.from_numpy(pixels), sample["cls"]


def decoded_batches(args: Namespace) -> Iterator:
    """In this process alone, from memory: what whoever decodes whole images with libjpeg-turbo has to pay."""
    import simplejpeg

    endless = itertools.cycle([jpeg for jpeg, _ in samples_of(args)])
    while True:
        yield [simplejpeg.decode_jpeg(jpeg, "RGB") for jpeg in itertools.islice(endless, args.batch_size)]


# ---- what they share


def workers(args: Namespace) -> dict:
    return dict(num_workers=args.workers, prefetch_factor=BATCHES_AHEAD if args.workers else None)


def by_dataloader(dataset, args: Namespace, kind: type = DataLoader, shuffle: bool | None = True) -> Iterator:
    """Pass after pass, by the same workers."""
    kept = dict(persistent_workers=bool(args.workers), worker_init_fn=seed_worker, drop_last=True)
    loader = kind(dataset, batch_size=args.batch_size, shuffle=shuffle, **workers(args), **kept)
    while True:
        yield from loader


def seed_worker(_: int) -> None:
    random.seed(get_worker_info().seed)


def samples_of(args: Namespace) -> Iterator[tuple[bytes, int]]:
    for jpeg, label in wds.WebDataset(args.shards, shardshuffle=False).to_tuple("jpg", "cls"):
        yield jpeg, int(label)
