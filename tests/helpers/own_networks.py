"""Encoders that timm lacks, as a user writes them: named in a config as `own_networks:small_convnet`."""

import timm
import torch
from torch import nn


class SmallConvNet(nn.Module):
    """Three stages; the maps are what SparK and features of stages read."""

    def __init__(self, width):
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in zip([3, *widths], widths, strict=False)
        )

    def forward_maps(self, images):
        maps = []
        for stage in self.stages:
            images = stage(images)
            maps.append(images)
        return maps

    def forward(self, images):
        return self.forward_maps(images)[-1].mean((2, 3))


def small_convnet(image_size, width=8):
    return SmallConvNet(width)


class SmallTransformer(nn.Module):
    """A class token, learned positions, torch's own layers."""

    num_heads = 2

    def __init__(self, image_size, patch_size, width, depth):
        super().__init__()
        self.patch_size = patch_size
        grid = [side // patch_size for side in image_size]
        self.patch_embed = nn.Linear(3 * patch_size**2, width)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.1)
        self.positions = nn.Parameter(torch.randn(grid[0] * grid[1], width) * 0.1)
        layer = nn.TransformerEncoderLayer(
            width, self.num_heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward_tokens(self, images, keep=None):
        side = self.patch_size
        patches = nn.functional.unfold(images, side, stride=side).transpose(1, 2)  # (B, L, 3 * p * p)
        tokens = self.patch_embed(patches) + self.positions
        if keep is not None:
            tokens = tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[2]))
        return self.layers(torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1))

    def forward(self, images):
        return self.forward_tokens(images)[:, 1:].mean(1)


def small_transformer(image_size, patch_size=4, width=16, depth=1):
    return SmallTransformer(image_size, patch_size, width, depth)


class Normed(SmallTransformer):
    """Features behind a batch norm, whose statistics are of all tokens that are seen."""

    def __init__(self, image_size):
        super().__init__(image_size, 4, 16, 1)
        self.bn = nn.BatchNorm1d(16)

    def forward_tokens(self, images, keep=None):
        return self.bn(super().forward_tokens(images, keep).transpose(1, 2)).transpose(1, 2)


def normed(image_size):
    return Normed(image_size)


class Leaky(SmallTransformer):
    """Adds the mean of all patches to each that is kept: hidden pixels reach every token."""

    def forward_tokens(self, images, keep=None):
        return super().forward_tokens(images, keep) + images.mean()


class Blind(SmallTransformer):
    """Sees positions and no pixels."""

    def forward_tokens(self, images, keep=None):
        return super().forward_tokens(images * 0, keep)


class Unordered(SmallTransformer):
    """Gives positions to the first patches that are kept, whichever they are."""

    def forward_tokens(self, images, keep=None):
        tokens = super().forward_tokens(images, keep)
        return tokens + torch.linspace(0, 1, tokens.shape[1])[:, None]


def leaky(image_size):
    return Leaky(image_size, 4, 16, 1)


def blind(image_size):
    return Blind(image_size, 4, 16, 1)


def unordered(image_size):
    return Unordered(image_size, 4, 16, 1)


class NeedsNumbers(SmallConvNet):
    """Cannot run on the meta device: it looks at a value."""

    def forward_maps(self, images):
        return super().forward_maps(images if images.sum().item() > 1e30 else images.clamp(max=1e3))


def needs_numbers(image_size):
    return NeedsNumbers(4)


def resnet_for_small_images(image_size):
    """timm's own, with another beginning."""
    model = timm.create_model("resnet18", num_classes=0, channels=[4, 6, 8, 12], layers=[1, 1, 1, 1])
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


def swin_as_it_is(image_size):
    """It drops paths as timm has it, and takes no setting that says otherwise."""
    settings = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1), "window_size": 2, "num_classes": 0}
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=image_size, **settings)


def no_network(image_size):
    return {"a": 1}


def without_weights(image_size):
    return nn.Identity()


def maps_not_pooled(image_size):
    return nn.Conv2d(3, 4, 3)


def raises(image_size, depth=1):
    return [1, 2][depth + 5]


def without_image_size(width=8):
    return SmallConvNet(width)


def any_settings(image_size, **settings):
    return SmallConvNet(**settings)


class TwoTokensShort(SmallTransformer):
    def forward_tokens(self, images, keep=None):
        return super().forward_tokens(images, keep)[:, 3:]


def tokens_missing(image_size):
    return TwoTokensShort(image_size, 4, 16, 1)


class CoarseToFine(SmallConvNet):
    def forward_maps(self, images):
        return super().forward_maps(images)[::-1]

    def forward(self, images):
        return super().forward_maps(images)[-1].mean((2, 3))


def coarse_to_fine(image_size):
    return CoarseToFine(8)


_built = []


def another_each_time(image_size):
    """One channel wider at each call."""
    _built.append(image_size)
    return SmallConvNet(4 + len(_built))
