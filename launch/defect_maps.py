"""The work of `prelude defects`: every source judged by its maps, and a sheet of some of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from prelude.data.batch import ViewPlan
from prelude.evaluators.dense.anomaly_maps import gaussian_maps, reconstruction_maps
from prelude.evaluators.dense.correspondence import sheet
from prelude.evaluators.dense.drawing import cells, heat, tile, to_png
from prelude.evaluators.dense.judging import DenseJudging
from prelude.evaluators.dense.samples import read_samples
from prelude.evaluators.features.dense import dense_plan
from prelude.evaluators.features.extraction import evaluation_plan
from prelude.evaluators.results import Result
from prelude.launch.autoencoder import hidden_errors, open_autoencoder
from prelude.pretrain import distributed
from prelude.pretrain.images import shown as as_shown


@dataclass(frozen=True)
class DefectJudging(DenseJudging):
    """Gaussians for every source, and for a run of MAE what it fills in wrongly."""

    num_masks: int = 16
    num_shown: int = 0  # images with a defect whose maps are drawn
    blocks: list = field(default_factory=list)  # of the sheet, a source each

    def results(self, source: str, sources: Sequence[str]) -> list[Result]:
        found: dict[str, Tensor] = {}
        encoder = self.opened(source, sources, self.seed)
        plan = dense_plan(evaluation_plan(encoder))
        evaluators = [partial(gaussian_maps, drawn=found.__setitem__)]
        autoencoder = open_autoencoder(source)
        if autoencoder is not None:
            index, device = self.indexes[1], distributed.device()
            errors = partial(hidden_errors, autoencoder, index, plan, num_masks=self.num_masks, device=device)
            settings = {"num_masks": self.num_masks, "drawn": found.__setitem__}
            evaluators.append(partial(reconstruction_maps, errors=errors, **settings))
        results = DenseJudging.results(replace(self, evaluators=evaluators), source, sources)
        if self.num_shown:
            _, test = self.features(source, sources, encoder)
            self.blocks.append((encoder.name, self._rows(next(iter(test.values())), plan, found)))
        return results

    def picture(self) -> bytes | None:
        """A PNG of all sources' maps; None where none were asked for, and on all ranks but the first."""
        return to_png(sheet(self.blocks, shared=2)) if self.blocks else None

    def _rows(self, places, plan: ViewPlan, found: dict[str, Tensor]) -> list[tuple[str, list[Image.Image]]]:
        """(what it is, tiles) of the first images that have a defect."""
        rows = (places.labels == 1).flatten(1).any(1).nonzero()[: self.num_shown, 0]
        images = as_shown(read_samples(self.indexes[1], plan, places.sample_ids[rows].tolist()), plan)
        masks = (places.labels[rows] == 1)[..., None].expand(-1, -1, -1, 3).to(torch.uint8) * 255
        lines = [("images", [tile(image) for image in images])]
        lines.append(("defects", [cells(mask, tuple(images.shape[2:])) for mask in masks]))
        for what, maps in found.items():
            limits = maps.min().item(), maps.max().item()
            lines.append((what, [heat(image, one, limits) for image, one in zip(images, maps[rows], strict=True)]))
        return lines
