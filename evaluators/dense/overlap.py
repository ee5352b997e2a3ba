"""How well predicted masks lie over true ones: mean intersection over union, and the share of pixels that are right.

- Over all pixels of a test set together, as VOC, Cityscapes and ADE20K count them, and not by image.
- The mean is over the classes that the test masks have. Pixels that are `IGNORED` count for nothing.
- Intervals are bootstrapped over images: pixels of one image are no independent samples. The mean of a draw is over the
  classes that its images have, as that of the test set is: rare classes are in few images, and most draws lack one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from prelude.evaluators.dense.masks import IGNORED
from prelude.evaluators.frozen.ranking import bootstrapped
from prelude.evaluators.results import Percent


@dataclass(frozen=True)
class Overlap:
    """Pixels by image and class, each (N, C) float64."""

    both: Tensor  # predicted as the class that they are
    predicted: Tensor
    true: Tensor

    @classmethod
    def of(cls, predicted: Tensor, true: Tensor, num_classes: int) -> "Overlap":
        """predicted: (N, H, W) in 0..C-1; true: the same, or `IGNORED`."""
        counts = true != IGNORED
        image = torch.arange(len(true))[:, None, None].expand_as(true)
        where = lambda of, mask: torch.bincount(  # noqa: E731
            (image * num_classes + of.long())[mask], minlength=len(true) * num_classes
        ).view(len(true), num_classes)
        found = where(true, counts & (predicted == true)), where(predicted, counts), where(true, counts)
        return cls(*(count.double() for count in found))

    @classmethod
    def joined(cls, parts: list["Overlap"]) -> "Overlap":
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("both", "predicted", "true")))

    def iou(self, weights: Tensor | None = None) -> Tensor:
        """(B, C) in 0..1, NaN for a class that no true pixel has. weights: (B, N), by default one row of ones."""
        weights = torch.ones(1, len(self.true), dtype=torch.float64) if weights is None else weights
        both, predicted, true = (weights @ counts for counts in (self.both, self.predicted, self.true))
        return torch.where(true > 0, both / (predicted + true - both), torch.nan)

    def numbers(self, seed: int) -> dict[str, Percent]:
        """`miou` and `pixel_accuracy` in percent, with intervals at 95 %. seed: of the bootstrap."""
        total = self.true.sum(1)
        statistics = {
            "miou": lambda weights: self.iou(weights).nanmean(1),
            "pixel_accuracy": lambda weights: (weights @ self.both.sum(1)) / (weights @ total),
        }
        return {name: bootstrapped(one, len(self.true), seed, ends=True) for name, one in statistics.items()}
