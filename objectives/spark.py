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

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from prelude.data.errors import UserError
from prelude.objectives.active_positions import ActivePositions
from prelude.objectives.masked_cells import MaskedCells, fitted
from prelude.objectives.masking import PatchMask
from prelude.objectives.options import SparKOptions
from prelude.objectives.sparse_check import Stage, Survey
from prelude.objectives.sparse_encoder import Encoded
from prelude.objectives.unet_decoder import UNetDecoder
from prelude.pretrain.batch_norm import synchronise
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import lay_out_encoder

_NUM_SCALES = 4  # maps that reach the decoder, from the coarsest: strides 32, 16, 8 and 4 of most convnets


class SparK(MaskedCells):
    Options = SparKOptions

    def __init__(self, encoder: nn.Module, options: SparKOptions, *, image_size, mean, std):
        super().__init__(encoder, options, image_size=image_size, mean=mean, std=std)
        self.stages = _decoded(self.found)
        stride, dim = self.stages[0].stride, options.decoder_dim
        self.densify = nn.ModuleList(
            Densify(stage, dim * stage.stride // stride, self.found.uses_batch_norm, first=stage is self.stages[0])
            for stage in self.stages
        )
        self.decoder = UNetDecoder(dim, stride, self.views.channels)
        synchronise(self)

    @classmethod
    def check(cls, options: SparKOptions, encoder: EncoderConfig) -> None:
        super().check(options, encoder)
        stride = fitted(lay_out_encoder(encoder), encoder.name, options.mask_patch, encoder.size)[0].stages[0].stride
        if options.decoder_dim % stride:
            near = max(round(options.decoder_dim / stride), 1) * stride
            raise UserError(
                f"objective.decoder_dim={options.decoder_dim} cannot be halved at each doubling of a map of stride "
                f"{stride}; write objective.decoder_dim={near}."
            )

    @staticmethod
    def _side(options: SparKOptions) -> int | None:
        return options.mask_patch

    def predict(self, encoded: Encoded, mask: PatchMask) -> Tensor:
        maps = {
            stage.stride: densify(encoded.maps[stage.index], encoded.positions)
            for stage, densify in zip(self.stages, self.densify, strict=True)
        }
        return self.hidden(self.decoder(maps), mask)


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


def _decoded(found: Survey) -> tuple[Stage, ...]:
    """The stages that reach the decoder; a map as large as the image would come after its last block."""
    return tuple(stage for stage in found.stages if stage.stride > 1)[:_NUM_SCALES]
