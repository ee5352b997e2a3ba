"""What the data path hands over (`Batch`) and what an objective asks of it (`ViewPlan`).

This module is the seam between `data/` and everything above it; it depends on torch alone.
"""

import hashlib
from dataclasses import asdict, dataclass, fields, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Photometric:
    """How the colours of a view are changed on the device; see pretrain/photometric.py.

    Probabilities are those of the whole operation. Strengths are torchvision's: a brightness of 0.4 is a factor
    uniform in [0.6, 1.4], a hue of 0.1 a turn uniform in [-0.1, 0.1] of the colour circle.
    """

    jitter: float = 0.0  # probability of the four below, applied in an order drawn for each sample
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grey: float = 0.0  # probability
    blur: float = 0.0  # probability
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # standard deviation of the Gaussian, pixels of the view
    solarise: float = 0.0  # probability
    solarise_threshold: float = 0.5  # values from here up, of [0, 1], are inverted


@dataclass(frozen=True)
class AutoAugment:
    """Operations drawn for each view, on its uint8 pixels in the loader; see data/auto_augment.py.

    `rand` is RandAugment with timm's operations of growing strength (`rand-m9-mstd0.5-inc1`), `trivial` is
    TrivialAugment Wide, which has no settings.
    """

    policy: Literal["rand", "trivial"] = "rand"
    num_ops: int = 2  # drawn with replacement
    probability: float = 0.5  # of each operation that was drawn
    magnitude: float = 9.0  # 0..10
    magnitude_std: float = 0.5  # of a normal distribution around it, clipped to 0..10
    fill: tuple[int, int, int] = (124, 116, 104)  # what moves in from outside


@dataclass(frozen=True)
class View:
    """One crop of an image.

    `random_resized`: area share uniform in `scale`, aspect ratio (width / height) log-uniform in `ratio`,
    as torchvision's RandomResizedCrop. `center`: the largest centred box with the output's aspect ratio,
    its sides multiplied by `crop_share` (0.875 is the classical "resize 256, crop 224").
    """

    size: tuple[int, int]  # (height, width) of the view, pixels
    crop: Literal["random_resized", "center"] = "random_resized"
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_share: float = 1.0
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    flip: float = 0.5  # probability of a horizontal flip; the flip itself is done on the device
    shift: int = 0  # pixels; on the device, a random move by at most that much, black moving in (pad, then crop)
    photometric: Photometric | None = None  # on the device; None leaves the colours as they are
    augment: AutoAugment | None = None  # in the loader, after the crop and before the flip
    partner: bool = False  # of another image of the sample's group, see `ViewPlan.group`


@dataclass(frozen=True)
class VolumePlan:
    """What an objective wants of every volume: the whole of it, resampled, then changed on the device."""

    size: tuple[int, int, int]  # (height, width, depth), voxels
    channels: int = 1
    flip: float = 0.5  # probability, along each axis
    noise: float = 0.0  # probability of Gaussian noise, see pretrain/volumes.py
    group: ClassVar[str] = ""  # volumes have no partners

    def fingerprint(self) -> str:
        """As that of `ViewPlan`."""
        return _hashed(asdict(self))


@dataclass(frozen=True)
class ViewPlan:
    """The views that an objective wants of every sample, and how their pixels are normalised on the device."""

    views: tuple[View, ...]
    mean: tuple[float, ...] = IMAGENET_MEAN  # of each channel
    std: tuple[float, ...] = IMAGENET_STD
    shown: tuple[int, ...] = ()  # channels that pictures show as red, green and blue; (): see pretrain/images.py
    group: str = ""  # field that images of partner views have in common with the sample, such as json:patient
    volumes: VolumePlan | None = None  # where batches of volumes take turns with those of images

    @property
    def channels(self) -> int:
        """Of every view."""
        return len(self.mean)

    def fingerprint(self) -> str:
        """A short hash of everything that changes a pixel of an image; part of the loader's state."""
        decisive = {name: value for name, value in asdict(self).items() if name not in ("shown", "volumes")}
        if not self.group:  # as plans were written that knew of no partners
            del decisive["group"]
            for view in decisive["views"]:
                del view["partner"]
        return _hashed(decisive)


def _hashed(decisive: dict) -> str:
    return hashlib.blake2b(repr(sorted(decisive.items())).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Batch:
    """One rank's micro-batch of B samples with V views each.

    Every random choice about a sample derives from its seed, never from a rank, a worker or the time.
    `labels` are for monitors and evaluators, fine-tuning included; a self-supervised objective never reads them.
    """

    # V tensors, each (B, C, H, W), not flipped yet; uint8, or float32 on the same scale of 0 to 255 where the data set
    # has a range of values, whose 12 or 16 bits would not survive. A batch of volumes has one, (B, C, H, W, Z).
    views: tuple[Tensor, ...]
    boxes: Tensor  # (B, V, 4) int32: top, left, height, width of the crop in pixels of the decoded image
    flips: Tensor  # (B, V) bool: whether the device flips this view horizontally
    seeds: Tensor  # (B,) int64, a hash of (run seed, position in the endless order)
    sample_ids: Tensor  # (B,) int64, place in the data set's index, stable across runs
    positions: Tensor  # (B,) int64, place in the endless order: epoch = position // num_samples
    labels: Tensor | None = None  # (B, ...)
    partner_ids: Tensor | None = None  # (B,) int64, of the images that partner views are of; a sample's own if alone

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def of_volumes(self) -> bool:
        """Or else of images."""
        return self.views[0].ndim == 5

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`; copies are asynchronous where the memory is pinned."""
        if self.seeds.device == torch.device(device):
            return self
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def head(self, count: int) -> "Batch":
        """The first `count` samples."""
        return self._map(lambda tensor: tensor[:count])

    def pin_memory(self) -> "Batch":
        """In memory that a GPU can fetch from while the host goes on."""
        return self._map(Tensor.pin_memory)

    def _map(self, function) -> "Batch":
        changes = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                changes[field.name] = tuple(map(function, value))
            elif value is not None:
                changes[field.name] = function(value)
        return replace(self, **changes)
