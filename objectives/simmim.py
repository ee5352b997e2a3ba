"""SimMIM (Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", arXiv 2111.09886), and its form in Swin
V2 (Liu et al., arXiv 2111.09883).

Square cells of an image are hidden. All of its patches go through the encoder, those of hidden cells as one learned
vector, and one linear layer predicts the pixels:

    map       = encoder(patches, mask token where hidden)                     (B, D, H / s, W / s)
    predicted = pixel_shuffle(conv1x1(map), s)                                (B, C, H, W)
    loss      = mean over hidden pixels and channels of |predicted - target|

- The target is the normalised image or, with `target_window`, the image standardised at each pixel by the window around
  it (Swin V2).
- Visible pixels carry no loss and hidden ones never reach the encoder.
- Targets and loss are float32 at least, under any autocast; statistics of windows are float64.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from prelude.data.batch import Batch, View, ViewPlan
from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.objectives.local_statistics import window_statistics
from prelude.objectives.masking import PatchMask, advised_ratio, mask_noise, random_mask
from prelude.objectives.options import SimMIMOptions
from prelude.objectives.pictures import evaluating, sheet
from prelude.objectives.replaced_patches import ReplacedPatches, check_replaceable, total_stride
from prelude.objectives.token_blocks import added_by
from prelude.pretrain.batch_norm import synchronise
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import lay_out_encoder
from prelude.pretrain.feature_health import TRIVIAL_LOSS, feature_health
from prelude.pretrain.images import denormalise
from prelude.pretrain.images import images as device_images
from prelude.pretrain.kept_patches import gather_patches, is_transformer, prefix_tokens
from prelude.pretrain.objective import Loss, Objective
from prelude.pretrain.schedules import Progress
from prelude.pretrain.warm_start import is_warm

_INIT_STD = 0.02
_NUM_PICTURES = 8


@dataclass(frozen=True)
class Reconstruction:
    """What is said of the R hidden cells of each image, and what they are."""

    predicted: Tensor  # (B, R, C, c, c)
    pixels: Tensor  # (B, R, C, c, c), normalised
    mean: Tensor | float  # target = (pixels - mean) / scale; (B, R, C, c, c) or a number
    scale: Tensor | float


class SimMIM(Objective):
    Options = SimMIMOptions

    def __init__(self, encoder: nn.Module, options: SimMIMOptions, *, image_size, mean, std):
        super().__init__(encoder, options, image_size=image_size, mean=mean, std=std)
        view = View(size=image_size, scale=options.crop_scale, interpolation="bilinear", flip=options.flip)
        self.views = ViewPlan(views=(view,), mean=mean, std=std)
        self.cell = options.mask_patch
        self.grid = (image_size[0] // self.cell, image_size[1] // self.cell)  # of cells
        self.num_cells = self.grid[0] * self.grid[1]
        self.num_hidden = num_hidden(self.num_cells, options.mask_ratio)
        self.stride = total_stride(encoder)
        self.replaced = ReplacedPatches(encoder)
        self.mask_token = nn.Parameter(torch.empty(1, 1, encoder.patch_embed.proj.out_channels))
        self.head = nn.Conv2d(encoder.num_features, self.views.channels * self.stride[0] * self.stride[1], 1)
        self._initialise()
        synchronise(self)

    @classmethod
    def check(cls, options: SimMIMOptions, encoder: EncoderConfig) -> None:
        super().check(options, encoder)
        model = lay_out_encoder(encoder)
        check_replaceable(model, encoder.name, encoder.size)
        cell, patch = options.mask_patch, model.patch_embed.patch_size
        sides = math.lcm(*patch)
        if cell % sides or any(side % cell for side in encoder.size):
            fits = [s for s in range(sides, min(encoder.size) + 1, sides) if not any(side % s for side in encoder.size)]
            near = min(fits, key=lambda fit: abs(fit - max(min(encoder.size) // 6, sides)), default=sides)
            raise UserError(
                f"objective.mask_patch={cell} neither holds whole patches of {patch[0]}x{patch[1]} nor cuts "
                f"encoder.image_size={encoder.size[0]}x{encoder.size[1]} into whole cells; write "
                f"objective.mask_patch={near}."
            )
        cells = encoder.size[0] // cell * (encoder.size[1] // cell)
        if num_seen(cells, options.mask_ratio) <= 0:
            raise UserError(
                f"objective.mask_ratio={options.mask_ratio} of {counted(cells, 'cell')} of {counted(cell, 'pixel')} "
                f"leaves none to see; write {advised_ratio(0.6, cells, num_seen)}a smaller objective.mask_patch."
            )

    def forward(self, batch: Batch, progress: Progress) -> Loss:
        (images,) = device_images(batch, self.views)  # (B, C, H, W)
        mask = self.mask(mask_noise(batch.seeds, self.num_cells))
        features = self.encode(images, mask.hidden)  # (B, D, h, w)
        loss = self.loss(self.reconstruction(images, self.decode(features), mask))
        return Loss(loss.total, loss.parts | feature_health(features.detach().float().mean((2, 3))))

    def mask(self, noise: Tensor) -> PatchMask:
        """noise: (B, L); the cells with the largest noise are hidden."""
        return random_mask(noise, self.num_cells - self.num_hidden)

    def encode(self, images: Tensor, hidden: Tensor) -> Tensor:
        """images: (B, C, H, W) normalised. hidden: (B, L) bool, of cells. Returns (B, D, H / s, W / s)."""
        height, width = self.encoder.patch_embed.patch_size
        cells = hidden.unflatten(1, self.grid)
        patches = cells.repeat_interleave(self.cell // height, 1).repeat_interleave(self.cell // width, 2)
        return self.replaced(images, patches, self.mask_token.flatten())

    def decode(self, features: Tensor) -> Tensor:
        """(B, D, h, w) to (B, C, H, W). The head's channels are pixels by channel, row, column, the channel slowest."""
        height, width = self.stride
        return rearrange(self.head(features), "b (c i j) h w -> b c (h i) (w j)", i=height, j=width)

    def reconstruction(self, images: Tensor, predicted: Tensor, mask: PatchMask) -> Reconstruction:
        """images, predicted: (B, C, H, W)."""
        mean, scale = 0.0, 1.0
        if self.options.target_window:
            mean, scale = (
                self._hidden(of_pixels, mask) for of_pixels in window_statistics(images, self.options.target_window)
            )
        return Reconstruction(self._hidden(predicted, mask), self._hidden(images, mask), mean, scale)

    def loss(self, reconstruction: Reconstruction) -> Loss:
        """Mean absolute error on hidden pixels.

        `pixel_mse` in the parts is the squared error in normalised pixels whatever the target. `trivial_loss` is the
        loss of the same prediction everywhere: of 0 with `target_window`, else of the batch's median.
        """
        pixels = reconstruction.pixels
        with torch.autocast(pixels.device.type, enabled=False):
            target = (pixels - reconstruction.mean) / reconstruction.scale
            error = reconstruction.predicted.to(target.dtype) - target
            parts = {
                "pixel_mse": (error.detach() * reconstruction.scale).square().mean(),
                TRIVIAL_LOSS: self._blind_error(target.detach()),
            }
            return Loss(error.abs().mean(), parts)

    def _blind_error(self, target: Tensor) -> Tensor:
        """Mean absolute error, of a target (B, R, P), of one prediction for every cell of every image."""
        if self.options.target_window or len(target) == 1:  # of one image nothing is known but its distance from 0
            return target.abs().mean()
        return (target - target.flatten(0, 1).median(0).values).abs().mean()

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Image.Image]:
        """One row an image: what the encoder sees, what is predicted, the original.

        Locally standardised predictions are brought back to pixels with the true mean and scale of their windows,
        which the model does not know, and visible cells are pasted as they are.
        """
        batch = batch.head(_NUM_PICTURES)
        (images,) = device_images(batch, self.views)
        mask = self.mask(mask_noise(batch.seeds, self.num_cells))
        with evaluating(self):
            predicted = self.decode(self.encode(images, mask.hidden)).to(images.dtype)
        if self.options.target_window:
            mean, scale = window_statistics(images, self.options.target_window)
            predicted = predicted * scale + mean
        hidden = mask.hidden.unflatten(1, self.grid)[:, None]  # (B, 1, rows, columns)
        hidden = hidden.repeat_interleave(self.cell, 2).repeat_interleave(self.cell, 3)
        panels = [images.masked_fill(hidden, 0.0), torch.where(hidden, predicted, images), images]
        return {"reconstruction": sheet(torch.stack([denormalise(panel, self.views) for panel in panels], dim=1))}

    def _hidden(self, images: Tensor, mask: PatchMask) -> Tensor:
        """(B, C, H, W) to (B, R, C, c, c)."""
        return gather_patches(images, (self.cell, self.cell), mask.removed)

    def _initialise(self) -> None:
        """As the official code starts: a plain transformer's weights cut at one standard deviation, and what block l
        adds divided by sqrt(2 l); Swin's as timm draws them, which is the same; torch's own for the head."""
        if not is_transformer(self.encoder):
            nn.init.trunc_normal_(self.mask_token, std=_INIT_STD)
            return
        _draw_cut(self.mask_token)
        if is_warm(self.encoder):
            return
        for module in self.encoder.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                _draw_cut(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for token in prefix_tokens(self.encoder):
            _draw_cut(token)
        for layer, block in enumerate(self.encoder.blocks, start=1):
            for written in added_by(block):
                written.weight.data.div_((2 * layer) ** 0.5)


def num_hidden(num_cells: int, mask_ratio: float) -> int:
    """L * mask_ratio, rounded up. Products are not exact: 100 cells at 0.55 would give 56."""
    return math.ceil(round(num_cells * mask_ratio, 9))


def num_seen(num_cells: int, mask_ratio: float) -> int:
    return num_cells - num_hidden(num_cells, mask_ratio)


def _draw_cut(weight: Tensor) -> None:
    nn.init.trunc_normal_(weight, std=_INIT_STD, a=-_INIT_STD, b=_INIT_STD)
