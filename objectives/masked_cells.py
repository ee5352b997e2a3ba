"""What objectives share that hide square cells of an image from a convnet, and predict their pixels.

    maps      = encoder(visible cells)                              one a stage, packed
    predicted = what a decoder makes of them
    loss      = mean over hidden cells and their values of (predicted - target)^2

- The encoder is a sparse convnet (see `objectives/sparse_encoder.py`): hidden pixels never reach it.
- A cell is as large as the encoder's total stride, or a multiple: each stage then has whole positions in it.
- Batch norms, in the encoder over active positions alone, have the statistics of the global batch.
- Targets and loss are float32 at least, under any autocast.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from prelude.data.batch import Batch, View, ViewPlan
from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.objectives.masking import PatchMask, advised_ratio, mask_noise, num_kept, random_mask
from prelude.objectives.options import MaskedCellsOptions
from prelude.objectives.patches import as_pixels, panels, patch_values, pixel_loss
from prelude.objectives.pictures import evaluating, sheet
from prelude.objectives.sparse_check import Survey, survey, total_stride
from prelude.objectives.sparse_encoder import Encoded, SparseEncoder
from prelude.pretrain.behind_stages import idle_layers
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import lay_out_encoder
from prelude.pretrain.feature_health import feature_health
from prelude.pretrain.images import denormalise
from prelude.pretrain.images import images as device_images
from prelude.pretrain.objective import Loss, Objective
from prelude.pretrain.schedules import Progress

_NUM_PICTURES = 8


@dataclass(frozen=True)
class Reconstruction:
    """What the decoder says of the R hidden cells of each image, and what they are."""

    predicted: Tensor  # (B, R, p * p * C): a cell's values by row, column, channel, the channel fastest
    pixels: Tensor  # (B, R, p * p * C), the same order
    mask: PatchMask


class MaskedCells(Objective):
    """Mask, sparse encoder, target, loss and pictures; a subclass adds the decoder."""

    standardised = True  # whether each cell's target has mean 0 and variance 1
    kept = staticmethod(num_kept)  # (cells, mask ratio) to the number of visible cells

    def __init__(self, encoder: nn.Module, options: MaskedCellsOptions, *, image_size, mean, std):
        super().__init__(encoder, options, image_size=image_size, mean=mean, std=std)
        view = View(size=image_size, scale=options.crop_scale, interpolation="bicubic", flip=options.flip)
        self.views = ViewPlan(views=(view,), mean=mean, std=std)
        self.found, self.cell, self.grid = fitted(encoder, type(encoder).__name__, self._side(options), image_size)
        self.num_cells = self.grid[0] * self.grid[1]
        self.num_keep = self.kept(self.num_cells, options.mask_ratio)
        for name, parameter in encoder.named_parameters():
            if name in self.found.idle:  # a classifier's norm: no stage depends on it, and no gradient would ever come
                parameter.requires_grad_(False)
        self.untrained = idle_layers(encoder, self.found.idle)
        self.sparse_encoder = SparseEncoder(encoder)

    @classmethod
    def check(cls, options: MaskedCellsOptions, encoder: EncoderConfig) -> None:
        model = lay_out_encoder(encoder)
        _, _, (rows, columns) = fitted(model, encoder.name, cls._side(options), encoder.size)
        kept = cls.kept(rows * columns, options.mask_ratio)
        if not 0 < kept < rows * columns:
            raise UserError(
                f"objective.mask_ratio={options.mask_ratio} of {rows} x {columns} cells leaves none to "
                f"{'hide' if kept else 'see'}; write {advised_ratio(0.6, rows * columns, cls.kept)}a larger "
                "encoder.image_size."
            )

    @classmethod
    def fewest_samples(cls, options: MaskedCellsOptions, encoder: EncoderConfig) -> int:
        model = lay_out_encoder(encoder)
        found, cell, (rows, columns) = fitted(model, encoder.name, cls._side(options), encoder.size)
        positions = cls.kept(rows * columns, options.mask_ratio) * (cell // found.stages[0].stride) ** 2
        return 2 if found.uses_batch_norm and positions < 2 else 1

    @staticmethod
    def _side(options: MaskedCellsOptions) -> int | None:
        """Of a cell in pixels, where the settings say it."""
        return None

    def notes(self) -> list[str]:
        if not self.untrained:
            return []
        name, layers = type(self).__name__, ", ".join(self.untrained)
        return [
            f"not trained by {name}, and in front of the features `pool`: {layers}; judge the encoder by "
            "--features stages"
        ]

    @abstractmethod
    def predict(self, encoded: Encoded, mask: PatchMask) -> Tensor:
        """encoded: what the encoder makes of the visible cells. Returns (B, R, p * p * C), of the hidden ones."""

    def forward(self, batch: Batch, progress: Progress) -> Loss:
        (images,) = device_images(batch, self.views)  # (B, C, H, W)
        mask = random_mask(mask_noise(batch.seeds, self.num_cells), self.num_keep)
        encoded = self.sparse_encoder(images, mask.keep, self.grid)
        loss = self.loss(self.decode(images, encoded, mask))
        coarsest = encoded.maps[self.found.stages[0].index].detach()  # (B, C, 1, m)
        return Loss(loss.total, loss.parts | feature_health(coarsest.float().mean((2, 3))))

    def reconstruct(self, images: Tensor, noise: Tensor) -> Reconstruction:
        """Predicts the hidden cells of normalised images.

        images: (B, C, H, W) normalised. noise: (B, L); the cells with the smallest noise stay visible.
        """
        mask = random_mask(noise, self.num_keep)
        return self.decode(images, self.sparse_encoder(images, mask.keep, self.grid), mask)

    def decode(self, images: Tensor, encoded: Encoded, mask: PatchMask) -> Reconstruction:
        """encoded: what the encoder makes of the visible cells."""
        return Reconstruction(self.predict(encoded, mask), self.hidden(images, mask), mask)

    def loss(self, reconstruction: Reconstruction) -> Loss:
        """`pixel_loss` on hidden cells."""
        return pixel_loss(reconstruction.predicted, reconstruction.pixels, self.standardised)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Image.Image]:
        """One row an image: what the encoder sees, what is predicted, the original.

        Predictions are brought back to pixels with the true mean and variance of their cell, which the model does not
        know, and visible cells are pasted as they are.
        """
        (images,) = device_images(batch, self.views)
        images = images[:_NUM_PICTURES]
        with evaluating(self):
            result = self.reconstruct(images, mask_noise(batch.seeds[:_NUM_PICTURES], self.num_cells))
        restored = as_pixels(result.predicted, result.pixels, self.standardised)  # (B, R, P)
        found = panels(images, restored, (self.cell, self.cell), result.mask.removed)
        drawn = [denormalise(panel, self.views) for panel in found]
        return {"reconstruction": sheet(torch.stack(drawn, dim=1))}

    def hidden(self, images: Tensor, mask: PatchMask) -> Tensor:
        """(B, C, H, W) to (B, R, p * p * C), the hidden cells."""
        return patch_values(images, (self.cell, self.cell), mask.removed)


def fitted(
    model: nn.Module, name: str, mask_patch: int | None, image_size: tuple[int, int]
) -> tuple[Survey, int, tuple[int, int]]:
    """What the encoder gives, the side of a cell in pixels, and the grid of cells. Raises UserError."""
    stride = total_stride(model, name, image_size)
    cell = mask_patch or stride
    if cell % stride:
        fits = max(cell // stride, 1) * stride
        raise UserError(
            f"objective.mask_patch={cell} is no multiple of {stride}, the total stride of encoder.name={name}, whose "
            f"last stage would mix visible and hidden pixels; write objective.mask_patch={fits}, or an encoder of "
            "smaller stride."
        )
    height, width = image_size
    if height % cell or width % cell or height * width < 2 * cell * cell:
        fits = sorted(
            {max(side // cell, 2) * cell for side in image_size} | {max(-(-max(image_size) // cell), 2) * cell}
        )
        raise UserError(
            f"encoder.image_size={height}x{width} is not cut into two or more whole cells of "
            f"{counted(cell, 'pixel')} (the total "
            f"stride of encoder.name={name} is {stride}); write encoder.image_size={' or '.join(map(str, fits))}, or "
            "give the encoder a smaller stride (encoder.kwargs={output_stride: 8} for a ResNet, encoder.patch_size=1 "
            "for a ConvNeXt)."
        )
    grid = (height // cell, width // cell)
    return survey(model, name, image_size, grid), cell, grid
