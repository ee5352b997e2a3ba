"""CrossMAE's decoder (Fu et al., "Rethinking Patch Dependence for Masked Autoencoders", arXiv 2401.14391).

Queries, a mask token and a position for each patch to be predicted, read the encoder's tokens and not each other:

    mix_j   = sum_i w_ji map_i                 the encoder's maps: what enters its first block, and what leaves each
    queries = queries + attention(norm(queries), layer_norm_j(mix_j))
    queries = queries + mlp(norm(queries))     for each block j

- What is predicted of a patch does not depend on which others are predicted: any part of them may be left out.
- The mix w, of k maps for each block, has no bias and starts normal, of variance 1 / k.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prelude.objectives.token_blocks import LayerNorm


class CrossBlocks(nn.Module):
    """num_maps: k. encoder_width: of the maps. width, depth, num_heads: of the blocks."""

    def __init__(self, num_maps: int, encoder_width: int, width: int, depth: int, num_heads: int):
        super().__init__()
        self.mix = nn.Parameter(torch.empty(depth, num_maps))
        self.norms = nn.ModuleList(LayerNorm(encoder_width) for _ in range(depth))
        self.blocks = nn.ModuleList(_CrossBlock(encoder_width, width, num_heads) for _ in range(depth))
        nn.init.normal_(self.mix, std=num_maps**-0.5)

    def forward(self, queries: Tensor, maps: Sequence[Tensor], *, checkpointing: bool) -> Tensor:
        """queries: (B, R, width). maps: k of (B, N, encoder width). Returns (B, R, width)."""
        stacked = torch.stack(list(maps))  # (k, B, N, D)
        for weights, norm, block in zip(self.mix, self.norms, self.blocks, strict=True):
            read = norm(torch.einsum("k,kbnd->bnd", weights.to(stacked.dtype), stacked))
            if checkpointing and torch.is_grad_enabled():
                queries = checkpoint(block, queries, read, use_reentrant=False)
            else:
                queries = block(queries, read)
        return queries


class _CrossBlock(nn.Module):
    def __init__(self, encoder_width: int, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(encoder_width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, queries: Tensor, read: Tensor) -> Tensor:
        """queries: (B, R, width). read: (B, N, encoder width). Returns (B, R, width)."""
        asked = self.query(self.norm1(queries)).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        keys, values = self.key_value(read).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(asked, keys, values)  # (B, heads, R, head width)
        queries = queries + self.proj(attended.transpose(1, 2).flatten(2))
        return queries + self.mlp(self.norm2(queries))
