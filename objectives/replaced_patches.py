"""Hierarchical and plain vision transformers of timm on images some of whose patches are replaced by a learned vector.

No token is left out: a replaced one attends and is attended to. The vector takes the place of what the patch embedding
makes of a patch, its norm included, so that class token and positions come to it afterwards, as to any other.

- Hidden pixels are set to 0 before the embedding, and its output there is not used: not even NaN gets through, forward
  or backward.
- The encoder's own code runs as it is; a hook on its patch embedding puts the vector in, and does nothing outside.
- With nothing replaced, the map is the encoder's own.
"""

from contextlib import contextmanager

import torch
from einops import rearrange
from timm.layers import PatchEmbed
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from prelude.data.errors import UserError
from prelude.pretrain.encoders import forward_tokens
from prelude.pretrain.kept_patches import check_tokens, is_transformer

Size = tuple[int, int]  # (height, width)


class ReplacedPatches:
    """Maps of `encoder`, any that `check_replaceable` has accepted."""

    def __init__(self, encoder: nn.Module):
        self.encoder = encoder
        self._replaced: tuple[Tensor, Tensor] | None = None
        encoder.patch_embed.register_forward_hook(self._put_in)

    def __call__(self, images: Tensor, hidden: Tensor, token: Tensor) -> Tensor:
        """images: (B, C, H, W). hidden: (B, rows, columns) bool, of the grid of patches. token: (D_embed,).

        Returns (B, D, h, w), the map after the final norm.
        """
        height, width = self.encoder.patch_embed.patch_size
        pixels = hidden.repeat_interleave(height, 1).repeat_interleave(width, 2)  # (B, H, W)
        with self._replacing(hidden, token):
            return final_map(self.encoder, images.masked_fill(pixels[:, None], 0.0))

    @contextmanager
    def _replacing(self, hidden: Tensor, token: Tensor):
        self._replaced = (hidden, token)
        try:
            yield
        finally:
            self._replaced = None

    def _put_in(self, layer: nn.Module, args: tuple, patches: Tensor) -> Tensor | None:
        if self._replaced is None:
            return None
        hidden, token = self._replaced
        hidden = hidden if patches.ndim == 4 else hidden.flatten(1)  # (B, rows, columns, D) or (B, L, D)
        return torch.where(hidden[..., None], token.to(patches.dtype), patches)


def final_map(encoder: nn.Module, images: Tensor) -> Tensor:
    """(B, D, h, w), the encoder's features after its final norm, without prefix tokens."""
    if _is_hierarchical(encoder):
        return rearrange(encoder.forward_features(images), "b h w d -> b d h w")
    tokens = forward_tokens(encoder, images)[:, encoder.num_prefix_tokens :]
    return rearrange(tokens, "b (h w) d -> b d h w", h=encoder.patch_embed.grid_size[0])


def total_stride(encoder: nn.Module) -> Size:
    """Pixels of the image from one position of the final map to the next, along height and width."""
    doublings = len(encoder.layers) - 1 if _is_hierarchical(encoder) else 0
    height, width = encoder.patch_embed.patch_size
    return height << doublings, width << doublings


def check_replaceable(model: nn.Module, name: str, image_size: Size) -> None:
    """Raises UserError for an architecture whose patches cannot be replaced, and for images that it cuts unevenly."""
    if is_transformer(model):
        check_tokens(model, name)
    elif not _is_hierarchical(model) or type(model.patch_embed) is not PatchEmbed:
        raise UserError(
            f"encoder.name={name} builds a {type(model).__name__}, whose patches cannot be replaced by a token; write "
            "a timm Swin, Swin V2, vision transformer, EVA or BEiT, such as encoder.name=swin_base_patch4_window7_224."
        )
    stride = total_stride(model)
    if any(side % part for side, part in zip(image_size, stride, strict=True)):
        fits = [max(-(-side // part), 1) * part for side, part in zip(image_size, stride, strict=True)]
        raise UserError(
            f"encoder.image_size={image_size[0]}x{image_size[1]} is no whole number of positions of "
            f"encoder.name={name}, whose total stride is {stride[0]}; write "
            f"encoder.image_size={fits[0] if fits[0] == fits[1] else fits}."
        )


def _is_hierarchical(model: nn.Module) -> bool:
    return isinstance(model, (SwinTransformer, SwinTransformerV2))
