"""Sheets of what is said of places: `--pictures FILE.png` of the doors whose evaluators read features of places."""

import argparse
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from prelude.data.batch import ViewPlan
from prelude.evaluators.dense.correspondence import sheet
from prelude.evaluators.dense.drawing import FILE_BYTES, tile, to_png
from prelude.evaluators.dense.judging import DenseJudging
from prelude.evaluators.dense.samples import read_samples
from prelude.launch.frozen import judge_by
from prelude.launch.neighbours import keep
from prelude.pretrain.images import shown

Row = tuple[str, list[Image.Image]]  # what it is, and a tile for each image


@dataclass(frozen=True)
class DrawnJudging(DenseJudging):
    """Leaves a block of rows for each source; the first two, images and masks, are alike in all."""

    num_shown: int = 0  # test images that are drawn
    blocks: list[tuple[str, list[Row]]] = field(default_factory=list)

    def images(self, plan: ViewPlan, sample_ids: Tensor) -> tuple[Tensor, Row]:
        """Test images as an encoder sees them, (N, 3, H, W) uint8, and their row."""
        found = shown(read_samples(self.indexes[1], plan, sample_ids.tolist()), plan)
        return found, ("images", [tile(image) for image in found])


def judge_and_draw(args: argparse.Namespace, judging: DrawnJudging) -> int:
    code = judge_by(args, judging)
    if judging.blocks:  # on the first rank
        keep(args.pictures, to_png(sheet(judging.blocks, shared=2), FILE_BYTES))
    return code
