"""SparK's decoder: from the coarsest map to pixels, each stage's map added on the way.

As in the official code: widths D, D/2, ...; a block doubles the map by a transposed convolution of 4 x 4, then two
3 x 3 convolutions, the second to half the width; a last 1 x 1 convolution gives the image's channels.
"""

import torch.nn as nn
from torch import Tensor


class UNetDecoder(nn.Module):
    """dim: D, the width at the coarsest map. stride: that map's, a power of two that divides D. channels: of pixels."""

    def __init__(self, dim: int, stride: int, channels: int = 3):
        super().__init__()
        num_blocks = stride.bit_length() - 1
        self.strides = [stride >> block for block in range(num_blocks)]  # of each block's input
        self.blocks = nn.ModuleList(_Block(dim >> block) for block in range(num_blocks))
        self.to_pixels = nn.Conv2d(dim >> num_blocks, channels, 1)
        for layer in self.modules():
            _initialise(layer)

    def forward(self, maps: dict[int, Tensor]) -> Tensor:
        """maps: stride to (B, D * stride / coarsest stride, H / stride, W / stride), the coarsest among them.

        Returns (B, C, H, W).
        """
        features = 0
        for stride, block in zip(self.strides, self.blocks, strict=True):
            features = block(features + maps[stride] if stride in maps else features)
        return self.to_pixels(features)


class _Block(nn.Sequential):
    """(B, D, H, W) to (B, D / 2, 2 H, 2 W)."""

    def __init__(self, dim: int):
        super().__init__(
            nn.ConvTranspose2d(dim, dim, 4, stride=2, padding=1),
            nn.Conv2d(dim, dim, 3, padding=1, bias=False),
            nn.BatchNorm2d(dim),
            nn.ReLU6(inplace=True),
            nn.Conv2d(dim, dim // 2, 3, padding=1, bias=False),
            nn.BatchNorm2d(dim // 2),
        )


def _initialise(layer: nn.Module) -> None:
    if isinstance(layer, nn.ConvTranspose2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(layer, nn.Conv2d):
        nn.init.trunc_normal_(layer.weight, std=0.02)
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) and layer.bias is not None:
        nn.init.zeros_(layer.bias)
