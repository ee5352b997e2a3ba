"""Masked autoencoder (He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377).

Most patches of an image are hidden. A ViT encodes the visible ones; a small decoder, thrown away afterwards,
predicts the pixels of the hidden ones:

    latent    = encoder(visible patches)
    predicted = decoder(latent, mask token + position of every hidden patch)
    loss      = mean over hidden patches of |predicted - target|^2 / (pixels of a patch)

- The target is a patch's pixels, brought to mean 0 and variance 1 within the patch where `norm_pix_loss` is on.
- Visible patches carry no loss and hidden pixels never reach the encoder.
- Targets and loss are float32 at least, under any autocast.
- Two switches by later papers: `mask_block` hides squares of patches (Pixio), and `decoder: cross` predicts each hidden
  patch from the visible ones alone, a part of them if `predicted_share` says so (CrossMAE, see
  `objectives/cross_blocks.py`).
- A second target by a third one: with `gradient_weight` a decoder of its own predicts the gradient map of the hidden
  patches from the same features (Uni4Eye, see `objectives/gradient_map.py`).
"""

import math
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from prelude.data.batch import Batch, View, ViewPlan
from prelude.data.errors import UserError
from prelude.objectives.gradient_map import gradient_map
from prelude.objectives.masking import PatchMask, advised_ratio, in_squares, mask_noise, num_kept, random_mask
from prelude.objectives.options import MAEOptions
from prelude.objectives.patch_decoder import DecodesPatches, PatchDecoder
from prelude.objectives.patches import as_pixels, panels, patch_values, pixel_loss, refuse_single_values
from prelude.objectives.pictures import evaluating, sheet
from prelude.objectives.token_blocks import xavier_init
from prelude.pretrain.batch_norm import synchronise
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import EncoderSummary, block_maps, check_encoder, forward_tokens, token_layout
from prelude.pretrain.feature_health import TRIVIAL_LOSS, feature_health
from prelude.pretrain.images import denormalise, unit_pixels
from prelude.pretrain.images import images as device_images
from prelude.pretrain.kept_patches import prefix_tokens
from prelude.pretrain.objective import Loss, Objective
from prelude.pretrain.schedules import Progress
from prelude.pretrain.warm_start import drawn_parts, is_warm

_NUM_PICTURES = 8


@dataclass(frozen=True)
class Reconstruction:
    """What the decoder says of R hidden patches of each image, and what they are."""

    predicted: Tensor  # (B, R, p_h * p_w * C): a patch's values by row, column, channel, the channel fastest
    pixels: Tensor  # (B, R, p_h * p_w * C), the same order
    mask: PatchMask
    ids: Tensor  # (B, R): which patches these are, among `mask.removed`
    gradient: "Gradients | None" = None  # where the gradient map is a target


@dataclass(frozen=True)
class Gradients:
    """The same of the gradient map; each (B, R, p_h * p_w)."""

    predicted: Tensor
    target: Tensor


class MAE(DecodesPatches, Objective):
    Options = MAEOptions

    def __init__(self, encoder: nn.Module, options: MAEOptions, *, image_size, mean, std):
        super().__init__(encoder, options, image_size=image_size, mean=mean, std=std)
        view = View(size=image_size, scale=options.crop_scale, interpolation="bicubic", flip=options.flip)
        self.views = ViewPlan(views=(view,), mean=mean, std=std)
        layout = token_layout(encoder)
        self.patch_size, self.grid = layout.patch_size, layout.grid  # (p_h, p_w), (rows, columns)
        self.num_patches = self.grid[0] * self.grid[1]
        self.num_squares = self.num_patches // options.mask_block**2
        self.num_keep = num_kept(self.num_squares, options.mask_ratio) * options.mask_block**2
        hidden = self.num_patches - self.num_keep
        share = options.predicted_share
        self.num_predicted = hidden if share is None else min(max(round(self.num_patches * share), 1), hidden)

        area = self.patch_size[0] * self.patch_size[1]  # pixels
        self.add_decoder(encoder, layout, options, area * self.views.channels)
        if self.crosses:
            encoder.norm.requires_grad_(False)  # the decoder reads maps before it: no gradient would ever come
        self.gradient_decoder = PatchDecoder(encoder, layout, options, area) if options.gradient_weight else None
        self._initialise()
        synchronise(self)

    @classmethod
    def check(cls, options: MAEOptions, encoder: EncoderConfig) -> None:
        summary = check_encoder(encoder, tokens=True)
        _refuse_switches(options, encoder, summary)
        num_patches = summary.grid[0] * summary.grid[1] // options.mask_block**2
        if not 0 < num_kept(num_patches, options.mask_ratio) < num_patches:
            raise UserError(
                f"objective.mask_ratio={options.mask_ratio} of {num_patches} patches leaves none to "
                f"{'hide' if options.mask_ratio < 0.5 else 'see'}; write "
                f"{advised_ratio(0.75, num_patches, num_kept)}a smaller encoder.patch_size."
            )
        num_values = math.prod(summary.patch_size) * encoder.in_chans
        refuse_single_values(num_values, options.norm_pix_loss, "patches of an image")
        if options.decoder_dim % options.decoder_num_heads or options.decoder_dim % 4:
            raise UserError(
                f"objective.decoder_dim={options.decoder_dim} must be a multiple of 4 and of "
                f"objective.decoder_num_heads={options.decoder_num_heads}; write 512 and 16, as in the paper."
            )

    def forward(self, batch: Batch, progress: Progress) -> Loss:
        (images,) = device_images(batch, self.views)  # (B, C, H, W)
        mask = self.mask(mask_noise(batch.seeds, self.num_squares))
        latent = self.encode(images, mask)
        loss = self.loss(self.decode(images, latent, mask, mask.removed[:, : self.num_predicted]))
        last = latent[-1] if self.crosses else latent  # (B, prefix + K, D)
        return Loss(loss.total, loss.parts | feature_health(last[:, -self.num_keep :].detach().float().mean(1)))

    def reconstruct(self, images: Tensor, noise: Tensor) -> Reconstruction:
        """Predicts the hidden patches of normalised images.

        images: (B, C, H, W) normalised. noise: (B, L), or one a square; those with the smallest noise stay visible.
        """
        mask = self.mask(noise)
        return self.decode(images, self.encode(images, mask), mask, mask.removed)

    def mask(self, noise: Tensor) -> PatchMask:
        """noise: one number a square, (B, L / mask_block^2), or one a patch, (B, L), which then are hidden singly."""
        side = self.options.mask_block if noise.shape[1] == self.num_squares else 1
        return in_squares(random_mask(noise, self.num_keep // side**2), side, self.grid[1])

    def encode(self, images: Tensor, mask: PatchMask) -> Tensor | list[Tensor]:
        """What the decoder reads: the features (B, prefix + K, D) of visible patches, or all maps of that shape."""
        return (block_maps if self.crosses else forward_tokens)(self.encoder, images, mask.keep)

    def decode(self, images: Tensor, latent: Tensor | list[Tensor], mask: PatchMask, ids: Tensor) -> Reconstruction:
        """latent: what `encode` returns. ids: (B, R), the hidden patches that are predicted."""
        checkpointing, gradient = self.encoder.grad_checkpointing, None
        if self.gradient_decoder is not None:
            predicted = self.gradient_decoder.predict(latent, mask, ids, checkpointing=checkpointing)
            gradient = Gradients(predicted, patch_values(self.gradient_of(images), self.patch_size, ids))
        predicted = self.predict(latent, mask, ids, checkpointing=checkpointing)
        return Reconstruction(predicted, patch_values(images, self.patch_size, ids), mask, ids, gradient)

    def gradient_of(self, images: Tensor) -> Tensor:
        """The gradient map of normalised images, (B, C, H, W) to (B, 1, H, W), in float32 at least."""
        with torch.autocast(images.device.type, enabled=False):
            return gradient_map(unit_pixels(images, self.views))

    def loss(self, reconstruction: Reconstruction) -> Loss:
        """`pixel_loss` on hidden patches and, where gradient maps are a target, the weighted mean squared error on
        theirs, of which their mean everywhere is trivial."""
        loss = pixel_loss(reconstruction.predicted, reconstruction.pixels, self.options.norm_pix_loss)
        if reconstruction.gradient is None:
            return loss
        weight, target = self.options.gradient_weight, reconstruction.gradient.target
        with torch.autocast(target.device.type, enabled=False):
            error = (reconstruction.gradient.predicted.to(target.dtype) - target).square().mean()
            trivial = loss.parts[TRIVIAL_LOSS] + weight * target.var(correction=0)
            parts = loss.parts | {TRIVIAL_LOSS: trivial, "gradient_mse": error.detach()}
            return Loss(loss.total + weight * error, parts)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Image.Image]:
        """One row an image: what the encoder sees, what is predicted, the original.

        Predictions are brought back to pixels with the true mean and variance of their patch, which the model
        does not know, and visible patches are pasted as they are.
        """
        (images,) = device_images(batch, self.views)
        images = images[:_NUM_PICTURES]
        with evaluating(self):
            result = self.reconstruct(images, mask_noise(batch.seeds[:_NUM_PICTURES], self.num_squares))
        restored = self.restored(result).to(images.dtype)  # (B, R, P)
        drawn = [denormalise(panel, self.views) for panel in panels(images, restored, self.patch_size, result.ids)]
        pictures = {"reconstruction": sheet(torch.stack(drawn, dim=1))}
        if result.gradient is not None:
            pictures["gradient"] = self._gradient_picture(self.gradient_of(images), result)
        return pictures

    def _gradient_picture(self, maps: Tensor, result: Reconstruction) -> Image.Image:
        """Hidden, predicted and true gradient maps, (B, 1, H, W), each image's as bright as its true one allows."""
        brightest = maps.amax((1, 2, 3)).clamp(min=1e-6)[:, None, None]
        restored = result.gradient.predicted.to(maps.dtype) / brightest
        found = panels(maps / brightest[..., None], restored, self.patch_size, result.ids)
        drawn = [255 * panel.expand(-1, 3, -1, -1) for panel in found]
        return sheet(torch.stack(drawn, dim=1).round().clamp(0, 255).to(torch.uint8))

    def restored(self, reconstruction: Reconstruction) -> Tensor:
        """(B, R, p_h * p_w * C) predictions as normalised pixels, with the true mean and deviation of each patch where
        the model was not taught them."""
        return as_pixels(reconstruction.predicted, reconstruction.pixels, self.options.norm_pix_loss)

    def _initialise(self) -> None:
        """As the official code starts; an encoder that comes with weights keeps them."""
        for part in drawn_parts(self, *self.children()):
            xavier_init(part)
        of_decoders = [self.mask_token]
        if self.gradient_decoder is not None:
            of_decoders.append(self.gradient_decoder.mask_token)
        tokens = of_decoders
        if not is_warm(self.encoder):
            self._initialise_patches(self.encoder.patch_embed.proj)
            tokens = [*prefix_tokens(self.encoder), *of_decoders]
        for token in tokens:
            nn.init.normal_(token, std=0.02)

    def _initialise_patches(self, projection: nn.Module) -> None:
        nn.init.xavier_uniform_(projection.weight.view(len(projection.weight), -1))  # as the matrix it acts as
        if projection.bias is not None:  # not zero: the official code leaves the convolution's default
            bound = projection.weight[0].numel() ** -0.5
            nn.init.uniform_(projection.bias, -bound, bound)


def _refuse_switches(options: MAEOptions, encoder: EncoderConfig, summary: EncoderSummary) -> None:
    side, (rows, columns) = options.mask_block, summary.grid
    if rows % side or columns % side:
        fits = [s for s in range(2, min(rows, columns)) if rows % s == columns % s == 0] or [1]
        raise UserError(
            f"objective.mask_block={side} does not cut {rows} x {columns} patches into whole squares; write "
            f"objective.mask_block={min(fits, key=lambda fit: abs(fit - side))}."
        )
    if options.decoder == "cross" and summary.depth is None:
        raise UserError(
            f"objective.decoder=cross reads what leaves each of the encoder's blocks, which "
            f"encoder.name={encoder.name} does not offer; write a timm VisionTransformer, or objective.decoder=self."
        )
