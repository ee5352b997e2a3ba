"""Uni4Eye: a masked autoencoder for images and volumes, with pixels and gradient maps as targets (code:
Davidczy/Uni4Eye_pp, whose released run never takes its path for volumes).

A batch is of images or of volumes. For images all is as in `objectives/mae.py` with `gradient_weight`. For volumes:

    latent    = ViT(class token, projected boxes of voxels that are visible + their positions in three dimensions)
    predicted = decoder(latent, mask token + position of every hidden box), for voxels and for the gradient map
    loss      = |predicted voxels - voxels|^2 + gradient_weight * |predicted map - map|^2, each a mean over hidden ones

- Kinds share the ViT and the blocks of either decoder. Each has a patch projection, tables of positions and last layers
  of its own, which the other kind leaves without gradient.
- The ViT stays a plain one for images: that is what is exported. What embeds volumes lies beside it in a checkpoint.
- Voxels are standardised within each volume, as `pretrain/volumes.py` says; the gradient map is that of the volume
  before it, without noise.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from prelude.data.batch import Batch, VolumePlan
from prelude.data.errors import UserError
from prelude.objectives.cubes import cut, gather_cubes, join
from prelude.objectives.gradient_map import gradient_map
from prelude.objectives.mae import MAE, Gradients, Reconstruction
from prelude.objectives.masking import PatchMask, advised_ratio, mask_noise, num_kept, random_mask
from prelude.objectives.options import Uni4EyeOptions
from prelude.objectives.patch_decoder import DecodesPatches
from prelude.objectives.patches import refuse_single_values
from prelude.objectives.pictures import evaluating, sheet
from prelude.objectives.token_blocks import xavier_init
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import lay_out_encoder
from prelude.pretrain.feature_health import OF_VOLUMES, feature_health
from prelude.pretrain.kept_patches import features_of_tokens, is_plain
from prelude.pretrain.objective import Loss
from prelude.pretrain.own_encoder import is_own
from prelude.pretrain.position import volume_table
from prelude.pretrain.schedules import Progress
from prelude.pretrain.volumes import Volumes
from prelude.pretrain.volumes import volumes as device_volumes

_NUM_PICTURES = 8
_SHOWN = (0.25, 0.5, 0.75)  # slices of a volume, as shares of its depth
_QUIET = 0.01  # of the initial weights of last layers: what is first predicted is hardly more than 0
_OWN_NAMES = {"pixel_mse": "voxel_mse"}  # in the log, of parts of the loss whose names say image


class Uni4Eye(MAE):
    Options = Uni4EyeOptions
    takes_volumes = True

    def __init__(self, encoder: nn.Module, options: Uni4EyeOptions, *, image_size, mean, std):
        super().__init__(encoder, options, image_size=image_size, mean=mean, std=std)
        size, channels = options.volume_size, options.volume_channels
        of_volumes = VolumePlan(size, channels, options.volume_flip, options.volume_noise)
        self.views = replace(self.views, volumes=of_volumes)
        self.cube, self.volume_grid = options.cube, options.volume_grid
        rows, columns, depths = self.volume_grid
        self.num_cubes = rows * columns * depths
        self.num_keep_cubes = num_kept(self.num_cubes, options.mask_ratio)

        voxels, dim = self.cube[0] * self.cube[1] * self.cube[2], options.decoder_dim
        self.volume_embed = nn.Conv3d(channels, encoder.embed_dim, self.cube, stride=self.cube)
        self.volume_pred = nn.Linear(dim, voxels * channels)
        self.volume_gradient_pred = nn.Linear(dim, voxels) if options.gradient_weight else None
        for name, width in (("volume_pos_embed", encoder.embed_dim), ("volume_decoder_pos_embed", dim)):
            self.register_buffer(name, volume_table(width, self.volume_grid), persistent=False)  # (L, width)
        self._initialise_patches(self.volume_embed)
        self._quieten_heads()

    @classmethod
    def check(cls, options: Uni4EyeOptions, encoder: EncoderConfig) -> None:
        super().check(options, encoder)
        model = lay_out_encoder(encoder)
        if is_own(encoder) or not is_plain(model) or encoder.pos_embed != "sincos":
            raise UserError(
                f"encoder.name={encoder.name} with encoder.pos_embed={encoder.pos_embed} tells only places of a plane "
                "apart; write a plain vision transformer with encoder.pos_embed=sincos, such as "
                "encoder.name=vit_large_patch16_224."
            )
        for key, width in (
            ("encoder.kwargs.embed_dim", model.embed_dim),
            ("objective.decoder_dim", options.decoder_dim),
        ):
            if width < 8:
                raise UserError(f"{key}={width} is too narrow for places in three dimensions; write 8 or more.")
        num_values = math.prod(options.cube) * options.volume_channels
        refuse_single_values(num_values, options.norm_pix_loss, "patches of a volume")
        rows, columns, depths = options.volume_grid
        num_cubes = rows * columns * depths
        if not 0 < num_kept(num_cubes, options.mask_ratio) < num_cubes:
            raise UserError(
                f"objective.mask_ratio={options.mask_ratio} of the {num_cubes} patches of a volume leaves none to "
                f"{'hide' if options.mask_ratio < 0.5 else 'see'}; write "
                f"{advised_ratio(0.5, num_cubes, num_kept)}a smaller objective.volume_patch."
            )

    def _quieten_heads(self) -> None:
        """Of volumes, and of the map of images: by Xavier's weights a first map varies a hundred times as much as a
        true one. To silence it the encoder makes all volumes alike: a mean cosine of 0.9999 after 160 steps of volumes
        alone with maps weighed by 30, and 0.96 where first predictions are 0."""
        of_images = None if self.gradient_decoder is None else self.gradient_decoder.decoder_pred
        for head in filter(None, (self.volume_pred, self.volume_gradient_pred)):
            xavier_init(head)
        with torch.no_grad():
            for head in filter(None, (self.volume_pred, self.volume_gradient_pred, of_images)):
                head.weight.mul_(_QUIET)

    def forward(self, batch: Batch, progress: Progress) -> Loss:
        if not batch.of_volumes:
            return super().forward(batch, progress)
        seen = device_volumes(batch, self.views.volumes)
        mask = self.volume_mask(mask_noise(batch.seeds, self.num_cubes))
        latent = self.encode_volumes(seen.standardised, mask.keep)  # (B, prefix + K, D)
        loss = self.loss(self.decode_volumes(seen, latent, mask))
        parts = loss.parts | feature_health(latent[:, -self.num_keep_cubes :].detach().float().mean(1))
        return Loss(loss.total, {_OWN_NAMES.get(name, OF_VOLUMES + name): value for name, value in parts.items()})

    def volume_mask(self, noise: Tensor) -> PatchMask:
        """noise: one number a patch of a volume, (B, L)."""
        return random_mask(noise, self.num_keep_cubes)

    def encode_volumes(self, volumes: Tensor, keep: Tensor) -> Tensor:
        """Features (B, prefix + K, D), after the final norm, of patches `keep` (B, K) of standardised volumes
        (B, C, H, W, Z)."""
        cubes = gather_cubes(volumes, self.cube, keep).flatten(2)  # (B, K, C * p_h * p_w * p_d)
        tokens = F.linear(cubes, self.volume_embed.weight.flatten(1), self.volume_embed.bias)
        return features_of_tokens(self.encoder, tokens + self.volume_pos_embed[keep])

    def volume_features(self, volumes: Tensor) -> Tensor:
        """(B, D): the mean feature of all patches of standardised volumes, for whoever judges the encoder by them."""
        keep = torch.arange(self.num_cubes, device=volumes.device).expand(len(volumes), -1)
        return self.encode_volumes(volumes, keep)[:, -self.num_cubes :].mean(1)

    def decode_volumes(self, seen: Volumes, latent: Tensor, mask: PatchMask) -> Reconstruction:
        gradient = None
        if self.gradient_decoder is not None:
            predicted = self._predict(self.gradient_decoder, self.volume_gradient_pred, latent, mask)
            gradient = Gradients(predicted, self._voxels(volume_map(seen), mask.removed))
        predicted = self._predict(self, self.volume_pred, latent, mask)
        return Reconstruction(predicted, self._voxels(seen.standardised, mask.removed), mask, mask.removed, gradient)

    def _predict(self, decoder: DecodesPatches, head: nn.Module, latent: Tensor, mask: PatchMask) -> Tensor:
        """(B, R, values of a patch) of the hidden patches."""
        checkpointing = self.encoder.grad_checkpointing
        decoded = decoder.decode_tokens(latent, mask, self.volume_decoder_pos_embed, checkpointing)
        return head(decoder.decoder_norm(decoded))

    def _voxels(self, volumes: Tensor, ids: Tensor) -> Tensor:
        """(B, R, p_h * p_w * p_d * C) of patches ids."""
        return rearrange(gather_cubes(volumes, self.cube, ids), "b r c h w d -> b r (h w d c)")

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Image.Image]:
        """Of the kind that the batch is. One row a volume: for each of three slices, what the encoder sees of it, what
        is predicted, the original."""
        if not batch.of_volumes:
            return super().pictures(batch)
        batch = batch.head(_NUM_PICTURES)
        seen = device_volumes(batch, self.views.volumes)
        mask = self.volume_mask(mask_noise(batch.seeds, self.num_cubes))
        with evaluating(self):
            result = self.decode_volumes(seen, self.encode_volumes(seen.standardised, mask.keep), mask)
        pictures = {"volume_reconstruction": self._slices(seen.standardised, self.restored(result), result.ids)}
        if result.gradient is not None:
            pictures["volume_gradient"] = self._slices(volume_map(seen), result.gradient.predicted, result.ids)
        return pictures

    def _slices(self, volumes: Tensor, predicted: Tensor, ids: Tensor) -> Image.Image:
        """volumes: (B, C, H, W, Z). predicted: (B, R, P), of patches ids. Each volume is as bright as its own values
        allow; what is hidden is black."""
        low, high = volumes.flatten(1).aminmax(dim=1)
        low, span = low[:, None, None], (high - low).clamp(min=1e-6)[:, None, None]
        original = (cut(volumes, self.cube) - low) / span  # (B, L, P)
        where = ids[..., None].expand_as(predicted)
        restored = (predicted.to(original.dtype) - low) / span
        panels = [original.scatter(1, where, 0.0), original.scatter(1, where, restored), original]
        drawn = torch.stack([join(panel, self.cube, self.volume_grid) for panel in panels], dim=1)  # (B, 3, C, ..., Z)
        colours = drawn if drawn.shape[2] == 3 else drawn[:, :, :1].expand(-1, -1, 3, -1, -1, -1)
        slices = [colours[..., int(share * colours.shape[-1])] for share in _SHOWN]
        return sheet((255 * torch.cat(slices, dim=1)).round().clamp(0, 255).to(torch.uint8))


def volume_map(seen: Volumes) -> Tensor:
    """The gradient map of volumes as they are before they are standardised, (B, 1, H, W, Z), in float32 at least."""
    with torch.autocast(seen.unit.device.type, enabled=False):
        return gradient_map(seen.unit)
