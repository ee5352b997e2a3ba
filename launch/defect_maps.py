"""The work of `prelude defects`: every source judged by its maps, and a sheet of some of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from prelude.data.batch import ViewPlan
from prelude.data.errors import UserError
from prelude.evaluators.dense.anomaly_maps import gaussian_maps, reconstruction_maps
from prelude.evaluators.dense.drawing import cells, heat
from prelude.evaluators.dense.judging import DenseJudging
from prelude.evaluators.features.dense import dense_plan
from prelude.evaluators.features.extraction import evaluation_plan
from prelude.evaluators.results import Result
from prelude.launch.autoencoder import hidden_errors, open_autoencoder
from prelude.launch.place_sheets import DrawnJudging, Row
from prelude.pretrain import distributed


@dataclass(frozen=True)
class DefectJudging(DrawnJudging):
    """Gaussians for every source, and for a run of MAE what it fills in wrongly."""

    num_masks: int = 16

    def results(self, source: str, sources: Sequence[str]) -> list[Result]:
        found: dict[str, Tensor] = {}
        encoder = self.opened(source, sources, self.seed)
        plan = dense_plan(evaluation_plan(encoder))
        evaluators = [partial(gaussian_maps, drawn=found.__setitem__)]
        autoencoder = open_autoencoder(source)
        if autoencoder is not None:
            refuse_unhidden(autoencoder.num_patches, autoencoder.num_keep, self.num_masks)
            index, device = self.indexes[1], distributed.device()
            errors = partial(hidden_errors, autoencoder, index, plan, num_masks=self.num_masks, device=device)
            settings = {"num_masks": self.num_masks, "drawn": found.__setitem__}
            evaluators.append(partial(reconstruction_maps, errors=errors, **settings))
        results = DenseJudging.results(replace(self, evaluators=evaluators), source, sources)
        if self.num_shown:
            _, test = self.features(source, sources, encoder)
            self._draw(encoder.name, next(iter(test.values())), plan, found)
        return results

    def _draw(self, name: str, places, plan: ViewPlan, found: dict[str, Tensor]) -> None:
        """The first images that have a defect."""
        defective = (places.labels == 1).flatten(1).any(1)
        rows = self.rows(places.sample_ids, lambda: defective.nonzero()[: self.num_shown, 0])

        def block() -> list[Row]:
            images, line = self.images(plan, places.sample_ids[rows])
            masks = (places.labels[rows] == 1)[..., None].expand(-1, -1, -1, 3).to(torch.uint8) * 255
            lines = [line, ("defects", [cells(mask, tuple(images.shape[2:])) for mask in masks])]
            for what, maps in found.items():
                limits = maps.min().item(), maps.max().item()
                lines.append((what, [heat(image, one, limits) for image, one in zip(images, maps[rows], strict=True)]))
            return lines

        self.add(name, places.sample_ids[rows], block)


def refuse_unhidden(num_patches: int, num_keep: int, num_masks: int) -> None:
    """Raises UserError where too few masks leave patches that none of them hides, and so nothing is said of."""
    hidden = num_patches - num_keep
    if -(-num_patches // num_masks) > hidden:
        raise UserError(
            f"--masks {num_masks} cannot hide each of {num_patches} patches, as a mask of this run hides {hidden}; "
            f"write {-(-num_patches // hidden)} or more."
        )
