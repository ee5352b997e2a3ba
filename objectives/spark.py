"""SparK (Tian et al., "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling",
arXiv 2301.03580).

Masked image modelling for convnets. Square cells of an image are hidden; the encoder sees the others alone, as a
sparse convnet; a light decoder, thrown away afterwards, predicts the pixels of hidden cells from the maps of all
stages:

    maps      = encoder(visible cells)                              one a stage, packed
    dense_i   = project_i(norm_i(map_i), mask token_i where hidden)  width D / 2^i, coarse to fine
    predicted = decoder(dense_0, dense_1, ...)                      doubled in size and added, stage by stage
    loss      = mean over hidden cells and their values of (predicted - target)^2

- The target is a cell's pixels (all channels together), brought to mean 0 and variance 1 within the cell.
- A cell is as large as the encoder's total stride, or a multiple: each stage then has whole positions in it.
- Batch norms, in the encoder over active positions alone, have the statistics of the global batch.
- Targets and loss are float32 at least, under any autocast.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from PIL import Image
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from prelude.data.batch import Batch, View, ViewPlan
from prelude.data.errors import UserError
from prelude.objectives.active_positions import ActivePositions
from prelude.objectives.masking import PatchMask, mask_noise, num_kept, random_mask
from prelude.objectives.options import SparKOptions
from prelude.objectives.pictures import sheet
from prelude.objectives.sparse_check import Stage, Survey, survey, total_stride
from prelude.objectives.sparse_encoder import Encoded, SparseEncoder
from prelude.objectives.unet_decoder import UNetDecoder
from prelude.pretrain.batch_norm import synchronise
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import lay_out_encoder
from prelude.pretrain.feature_health import TRIVIAL_LOSS, feature_health
from prelude.pretrain.images import denormalise
from prelude.pretrain.images import images as device_images
from prelude.pretrain.kept_patches import gather_patches
from prelude.pretrain.objective import Loss, Objective
from prelude.pretrain.schedules import Progress

_EPSILON = 1e-6  # added to a cell's variance, so that a flat cell has target 0
_NUM_SCALES = 4  # maps that reach the decoder, from the coarsest: strides 32, 16, 8 and 4 of most convnets
_NUM_PICTURES = 8


@dataclass(frozen=True)
class Reconstruction:
    """What the decoder says of the R hidden cells of each image, and what they are."""

    predicted: Tensor  # (B, R, p * p * C): a cell's values by row, column, channel, the channel fastest
    pixels: Tensor  # (B, R, p * p * C), the same order
    mask: PatchMask


class SparK(Objective):
    Options = SparKOptions

    def __init__(self, encoder: nn.Module, options: SparKOptions, *, image_size, mean, std):
        super().__init__(encoder, options, image_size=image_size, mean=mean, std=std)
        view = View(size=image_size, scale=options.crop_scale, interpolation="bicubic", flip=options.flip)
        self.views = ViewPlan(views=(view,), mean=mean, std=std)
        found, self.cell, self.grid = _fitted(encoder, type(encoder).__name__, options, image_size)
        self.num_cells = self.grid[0] * self.grid[1]
        self.num_keep = num_kept(self.num_cells, options.mask_ratio)
        self.stages = _decoded(found)

        for name, parameter in encoder.named_parameters():
            if name in found.idle:  # a classifier's norm: no stage depends on it, and no gradient would ever come
                parameter.requires_grad_(False)
        self.sparse_encoder = SparseEncoder(encoder)
        stride, dim = self.stages[0].stride, options.decoder_dim
        self.densify = nn.ModuleList(
            Densify(stage, dim * stage.stride // stride, found.uses_batch_norm, first=stage is self.stages[0])
            for stage in self.stages
        )
        self.decoder = UNetDecoder(dim, stride, self.views.channels)
        synchronise(self)

    @classmethod
    def check(cls, options: SparKOptions, encoder: EncoderConfig) -> None:
        model = lay_out_encoder(encoder)
        found, _, (rows, columns) = _fitted(model, encoder.name, options, encoder.size)
        kept = num_kept(rows * columns, options.mask_ratio)
        if not 0 < kept < rows * columns:
            raise UserError(
                f"objective.mask_ratio={options.mask_ratio} of {rows} x {columns} cells leaves none to "
                f"{'hide' if kept else 'see'}; write objective.mask_ratio=0.6, or a larger encoder.image_size."
            )
        stride = found.stages[0].stride
        if options.decoder_dim % stride:
            near = max(round(options.decoder_dim / stride), 1) * stride
            raise UserError(
                f"objective.decoder_dim={options.decoder_dim} cannot be halved at each doubling of a map of stride "
                f"{stride}; write objective.decoder_dim={near}."
            )

    def forward(self, batch: Batch, progress: Progress) -> Loss:
        (images,) = device_images(batch, self.views)  # (B, C, H, W)
        mask = random_mask(mask_noise(batch.seeds, self.num_cells), self.num_keep)
        encoded = self.sparse_encoder(images, mask.keep, self.grid)
        loss = self.loss(self.decode(images, encoded, mask))
        coarsest = encoded.maps[self.stages[0].index].detach()  # (B, C, 1, m)
        return Loss(loss.total, loss.parts | feature_health(coarsest.float().mean((2, 3))))

    def reconstruct(self, images: Tensor, noise: Tensor) -> Reconstruction:
        """Predicts the hidden cells of normalised images.

        images: (B, C, H, W) normalised. noise: (B, L); the cells with the smallest noise stay visible.
        """
        mask = random_mask(noise, self.num_keep)
        return self.decode(images, self.sparse_encoder(images, mask.keep, self.grid), mask)

    def decode(self, images: Tensor, encoded: Encoded, mask: PatchMask) -> Reconstruction:
        """encoded: what the encoder makes of the visible cells."""
        maps = {
            stage.stride: densify(encoded.maps[stage.index], encoded.positions)
            for stage, densify in zip(self.stages, self.densify, strict=True)
        }
        predicted, pixels = (self._hidden(pixels, mask) for pixels in (self.decoder(maps), images))
        return Reconstruction(predicted, pixels, mask)

    def loss(self, reconstruction: Reconstruction) -> Loss:
        """Mean squared error on hidden cells.

        `pixel_mse` in the parts is the same error in normalised pixels: each cell's, times its variance.
        `trivial_loss` is the loss of a prediction of 0 everywhere: (n - 1) / n, n being the values of a cell, and less
        where cells are flat.
        """
        with torch.autocast(reconstruction.pixels.device.type, enabled=False):
            mean, scale = _target_statistics(reconstruction.pixels)
            target = (reconstruction.pixels - mean) / scale
            residual = reconstruction.predicted.to(target.dtype) - target  # (B, R, p * p * C)
            error = residual.square().mean(dim=-1, keepdim=True)  # (B, R, 1)
            parts = {
                "pixel_mse": (error.detach() * scale.square()).mean(),
                TRIVIAL_LOSS: target.detach().square().mean(),
            }
            return Loss(error.mean(), parts)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Image.Image]:
        """One row an image: what the encoder sees, what is predicted, the original.

        Predictions are brought back to pixels with the true mean and variance of their cell, which the model does not
        know, and visible cells are pasted as they are.
        """
        (images,) = device_images(batch, self.views)
        images = images[:_NUM_PICTURES]
        training = self.training
        self.eval()  # one rank alone draws: batch statistics would wait for the others, and be moved
        result = self.reconstruct(images, mask_noise(batch.seeds[:_NUM_PICTURES], self.num_cells))
        self.train(training)
        mean, scale = _target_statistics(result.pixels)
        restored = result.predicted.to(images.dtype) * scale + mean  # (B, R, P)
        original = rearrange(images, "b c (r h) (k w) -> b (r k) (h w c)", h=self.cell, w=self.cell)  # (B, L, P)
        where = result.mask.removed[..., None].expand_as(restored)
        panels = [original.scatter(1, where, 0.0), original.scatter(1, where, restored), original]
        drawn = [denormalise(self._assembled(panel), self.views) for panel in panels]
        return {"reconstruction": sheet(torch.stack(drawn, dim=1))}

    def _hidden(self, images: Tensor, mask: PatchMask) -> Tensor:
        """(B, C, H, W) to (B, R, p * p * C), the hidden cells."""
        cells = gather_patches(images, (self.cell, self.cell), mask.removed)  # (B, R, C, p, p)
        return rearrange(cells, "b r c h w -> b r (h w c)")

    def _assembled(self, cells: Tensor) -> Tensor:
        rows, columns = self.grid
        return rearrange(cells, "b (r k) (h w c) -> b c (r h) (k w)", r=rows, k=columns, h=self.cell, w=self.cell)


class Densify(nn.Module):
    """A packed map of one stage as a whole map for the decoder (section 3.2): normed where it is active, a learned
    token elsewhere, and projected to the decoder's width."""

    def __init__(self, stage: Stage, dim: int, uses_batch_norm: bool, *, first: bool):
        super().__init__()
        channels = stage.channels
        self.norm = nn.BatchNorm2d(channels) if uses_batch_norm else LayerNorm2d(channels, eps=1e-6)
        self.mask_token = nn.Parameter(torch.empty(1, channels, 1, 1))
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        if not first:
            self.projection = nn.Conv2d(channels, dim, 3, padding=1)
        else:
            self.projection = nn.Identity() if channels == dim else nn.Conv2d(channels, dim, 1)

    def forward(self, packed: Tensor, positions: ActivePositions) -> Tensor:
        """(B, C, 1, m) to (B, D, H, W)."""
        return self.projection(positions.unpack_onto(self.norm(packed), self.mask_token.flatten()))


def _target_statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, scale) of each cell, so that target = (pixels - mean) / scale. Each (B, R, 1)."""
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True, correction=1)  # unbiased, as in the official code
    return mean, (variance + _EPSILON).sqrt()


def _decoded(found: Survey) -> tuple[Stage, ...]:
    """The stages that reach the decoder; a map as large as the image would come after its last block."""
    return tuple(stage for stage in found.stages if stage.stride > 1)[:_NUM_SCALES]


def _fitted(
    model: nn.Module, name: str, options: SparKOptions, image_size: tuple[int, int]
) -> tuple[Survey, int, tuple[int, int]]:
    """What the encoder gives, the side of a cell in pixels, and the grid of cells. Raises UserError."""
    stride = total_stride(model, name, image_size)
    cell = options.mask_patch or stride
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
            f"encoder.image_size={height}x{width} is not cut into two or more whole cells of {cell} pixels (the total "
            f"stride of encoder.name={name} is {stride}); write encoder.image_size={' or '.join(map(str, fits))}, or "
            "give the encoder a smaller stride (encoder.kwargs={output_stride: 8} for a ResNet, encoder.patch_size=1 "
            "for a ConvNeXt)."
        )
    grid = (height // cell, width // cell)
    return survey(model, name, image_size, grid), cell, grid
