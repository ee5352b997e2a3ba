"""FCMAE, the fully convolutional masked autoencoder of ConvNeXt V2 (Woo et al., "ConvNeXt V2: Co-designing and Scaling
ConvNets with Masked Autoencoders", arXiv 2301.00808).

Most cells of an image, each as large as the encoder's total stride, are hidden. The encoder sees the others alone, as a
sparse convnet; one convolutional block over its last map, thrown away afterwards, predicts the pixels of the hidden:

    map       = encoder(visible cells)                                    (B, D, 1, K), the last stage's, packed
    predicted = project(blocks(project(map), mask token where hidden))    read out at the hidden cells
    loss      = mean over hidden cells and their values of (predicted - target)^2

- The target is a cell's pixels, brought to mean 0 and variance 1 within the cell where `norm_pix_loss` is on.
- Global response norms are those of each image, over its visible positions: no image depends on another.
- Targets and loss are float32 at least, under any autocast.
"""

import math

import torch
from einops import rearrange
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from prelude.objectives.masked_cells import MaskedCells
from prelude.objectives.masking import PatchMask
from prelude.objectives.options import FCMAEOptions
from prelude.objectives.sparse_encoder import Encoded
from prelude.pretrain.batch_norm import synchronise

_INIT_STD = 0.02


def num_visible(num_cells: int, mask_ratio: float) -> int:
    """L * (1 - mask_ratio), rounded down, as in the official code: 19 of 49 at 0.6. Products are not exact: of 25 cells
    at 0.8 that code keeps 4."""
    return math.floor(round(num_cells * (1 - mask_ratio), 9))


class FCMAE(MaskedCells):
    Options = FCMAEOptions
    kept = staticmethod(num_visible)

    def __init__(self, encoder: nn.Module, options: FCMAEOptions, *, image_size, mean, std):
        super().__init__(encoder, options, image_size=image_size, mean=mean, std=std)
        self.standardised, dim = options.norm_pix_loss, options.decoder_dim
        self.last = self.found.stages[0]
        self.project = nn.Conv2d(self.last.channels, dim, 1)
        self.mask_token = nn.Parameter(torch.empty(1, dim, 1, 1))
        self.decoder = nn.Sequential(
            *(ConvNeXtBlock(dim, use_grn=True, ls_init_value=None) for _ in range(options.decoder_depth))
        )
        self.to_pixels = nn.Conv2d(dim, self.cell * self.cell * self.views.channels, 1)
        self._initialise()
        synchronise(self)

    def predict(self, encoded: Encoded, mask: PatchMask) -> Tensor:
        visible = self.project(encoded.maps[self.last.index])  # (B, dim, 1, K)
        whole = self.decoder(encoded.positions.unpack_onto(visible, self.mask_token.flatten()))  # (B, dim, h, w)
        index = mask.removed[:, None].expand(-1, whole.shape[1], -1)
        hidden = whole.flatten(2).gather(2, index)[:, :, None]  # (B, dim, 1, R)
        return rearrange(self.to_pixels(hidden), "b p 1 r -> b r p")

    def _initialise(self) -> None:
        """Every convolution and linear layer of the decoder as timm draws those of the encoder: normal of standard
        deviation 0.02, no bias. The official code leaves out the deviation, so that predictions start at 10^5."""
        for layer in (*self.project.modules(), *self.decoder.modules(), *self.to_pixels.modules()):
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(layer.weight, std=_INIT_STD)
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.mask_token, std=_INIT_STD)
