"""The decoder of a masked autoencoder: from features of visible patches to values of hidden ones.

- `self`: blocks over the whole image, where a hidden patch is a learned token and its position (MAE, arXiv 2111.06377).
- `cross`: each hidden patch reads what is visible and no other hidden one (CrossMAE, see `objectives/cross_blocks.py`).
- An autoencoder with several targets has one of these for each, on the same features.
"""

import torch
from torch import Tensor, nn

from prelude.objectives.cross_blocks import CrossBlocks
from prelude.objectives.masking import PatchMask
from prelude.objectives.options import MAEOptions
from prelude.objectives.token_blocks import LayerNorm, transformer_blocks
from prelude.pretrain.kept_patches import run_blocks
from prelude.pretrain.own_encoder import TokenLayout
from prelude.pretrain.position import sincos_table


class DecodesPatches:
    """Mixed into a module, which then has the decoder's parameters under the names of MAE's official code."""

    def add_decoder(self, encoder: nn.Module, layout: TokenLayout, options: MAEOptions, num_values: int) -> None:
        """num_values: that are predicted of a patch."""
        dim, depth, heads = options.decoder_dim, options.decoder_depth, options.decoder_num_heads
        self.crosses = options.decoder == "cross"
        if not self.crosses:
            self.decoder_embed = nn.Linear(layout.width, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        if self.crosses:
            self.decoder_blocks = CrossBlocks(len(encoder.blocks) + 1, layout.width, dim, depth, heads)
        else:
            self.decoder_blocks = transformer_blocks(dim, depth, heads)
        self.decoder_norm = LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, num_values)
        self.register_buffer("decoder_pos_embed", sincos_table(dim, layout.grid), persistent=False)  # (L, dim)

    def predict(
        self, latent: Tensor | list[Tensor], mask: PatchMask, ids: Tensor, *, checkpointing: bool = False
    ) -> Tensor:
        """latent: features (B, prefix + K, D) of visible patches, or all maps of that shape; ids: (B, R), the hidden
        patches that are wanted. Returns (B, R, num_values)."""
        if self.crosses:
            queries = self.mask_token + self.decoder_pos_embed[ids]  # (B, R, dim)
            decoded = self.decoder_blocks(queries, latent, checkpointing=checkpointing)
        else:
            decoded = self.decode_tokens(latent, mask, self.decoder_pos_embed, checkpointing)
        return self.decoder_pred(self.decoder_norm(decoded))

    def decode_tokens(self, latent: Tensor, mask: PatchMask, positions: Tensor, checkpointing: bool) -> Tensor:
        """Over the whole image, read out at the hidden patches. positions: (L, dim). Returns (B, R, dim).

        Tokens stay in the order prefix, visible, hidden, each with the position of its own patch. Attention
        does not see the order, so the result is that of the paper's raster order without unshuffling.
        """
        prefix = latent.shape[1] - mask.keep.shape[1]  # prefix tokens have no place in the image: position zero
        tokens = self.decoder_embed(latent)  # (B, prefix + K, dim)
        tokens = torch.cat(
            [
                tokens[:, :prefix].to(positions.dtype),
                tokens[:, prefix:] + positions[mask.keep],
                self.mask_token + positions[mask.removed],
            ],
            dim=1,
        )  # (B, prefix + L, dim)
        tokens = run_blocks(self.decoder_blocks, tokens, checkpointing=checkpointing)
        return tokens[:, -mask.removed.shape[1] :]


class PatchDecoder(DecodesPatches, nn.Module):
    """One that stands by itself; settings as `add_decoder` takes them."""

    def __init__(self, encoder: nn.Module, layout: TokenLayout, options: MAEOptions, num_values: int):
        super().__init__()
        self.add_decoder(encoder, layout, options, num_values)
