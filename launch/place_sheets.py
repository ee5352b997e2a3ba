"""Sheets of what is said of places: `--pictures FILE.png` of the doors whose evaluators read features of places."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from prelude.data.batch import ViewPlan
from prelude.evaluators.dense.correspondence import sheet
from prelude.evaluators.dense.drawing import FILE_BYTES, PAPER, TILE, tile, to_png
from prelude.evaluators.dense.judging import DenseJudging
from prelude.evaluators.dense.samples import read_samples
from prelude.launch.frozen import judge_by, write_result
from prelude.pretrain.images import shown

Row = tuple[str, list[Image.Image]]  # what it is, and a tile for each image


@dataclass(frozen=True)
class DrawnJudging(DenseJudging):
    """Leaves a block of rows for each source; the first two, images and masks, are alike in all."""

    num_shown: int = 0  # test images that are drawn
    chosen: list[int] = field(default_factory=list)  # their sample ids, as the first source has chosen them
    blocks: list[tuple[str, list[Row]]] = field(default_factory=list)

    def rows(self, sample_ids: Tensor, choose: Callable[[], Tensor]) -> Tensor:
        """Rows of `sample_ids` that are drawn, in the order of `chosen`. choose: such rows, asked of the first source
        alone, as another sees other masks where its images have another size."""
        if not self.chosen:
            self.chosen.extend(sample_ids[choose()].tolist())
        places = {sample: row for row, sample in enumerate(sample_ids.tolist())}
        return torch.tensor([places[sample] for sample in self.chosen if sample in places], dtype=torch.long)

    def add(self, name: str, sample_ids: Tensor, block: Callable[[], list[Row]]) -> None:
        """A source's rows. sample_ids: of those that it can show; one that can show none is not in the picture."""
        if len(sample_ids):
            self.blocks.append((name, self.in_columns(sample_ids, block())))
        else:
            self.say(f"{name} can show none of the images of the picture, and is not in it.")

    def images(self, plan: ViewPlan, sample_ids: Tensor) -> tuple[Tensor, Row]:
        """Test images as an encoder sees them, (N, 3, H, W) uint8, and their row."""
        found = shown(read_samples(self.indexes[1], plan, sample_ids.tolist()), plan.shown)
        return found, ("images", [tile(image) for image in found])

    def in_columns(self, sample_ids: Tensor, rows: list[Row]) -> list[Row]:
        """A column for each of `chosen`: paper for those that this source cannot read. rows: a tile for each id."""
        paper, found = Image.new("RGB", (TILE, TILE), PAPER), []
        for what, tiles in rows:
            own = dict(zip(sample_ids.tolist(), tiles, strict=True))
            found.append((what, [own.get(sample, paper) for sample in self.chosen]))
        return found


def judge_and_draw(args: argparse.Namespace, judging: DrawnJudging) -> int:
    code = judge_by(args, judging)
    if judging.blocks:  # on the first rank
        write_result(args.pictures, to_png(sheet(judging.blocks, shared=2), FILE_BYTES))
    return code
