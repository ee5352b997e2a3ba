"""The narrow transformer of I-JEPA and DSeq-JEPA: from features of context patches to features of target patches.

- A target patch enters as one learned mask token plus the position of its patch, and nothing else.
- Positions are a fixed sine and cosine table of the predictor's own width.
- It sees no prefix token: a class token has no place in the image.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from prelude.objectives.token_blocks import LayerNorm, transformer_blocks
from prelude.pretrain.kept_patches import run_blocks
from prelude.pretrain.position import sincos_table


class Predictor(nn.Module):
    def __init__(self, encoder_width: int, grid: tuple[int, int], *, width: int, depth: int, num_heads: int):
        super().__init__()
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = transformer_blocks(width, depth, num_heads)
        self.norm = LayerNorm(width)
        self.proj = nn.Linear(width, encoder_width)
        self.register_buffer("pos_embed", sincos_table(width, grid), persistent=False)  # (N, width)

    def forward(
        self,
        context: Tensor,
        context_ids: Tensor,
        target_ids: Tensor,
        visible: Tensor | None = None,
        *,
        checkpointing: bool = False,
    ) -> Tensor:
        """Predicts S sets of target patches from one context, each set in a sequence of its own.

        context: (B, K, D) features of patches context_ids (B, K). target_ids: (B, S, T).
        visible: bool, broadcast to (B * S, heads, K + T, K + T), True where a token (row) sees another (column);
        None: every token of a sequence sees every other. Returns (B, S, T, D).
        """
        sets = target_ids.shape[1]
        known = self.embed(context) + self.pos_embed[context_ids]  # (B, K, P)
        asked = self.mask_token + self.pos_embed[target_ids].flatten(0, 1)  # (B * S, T, P)
        tokens = torch.cat([repeat(known, "b k p -> (b s) k p", s=sets), asked], dim=1)
        tokens = run_blocks(self.blocks, tokens, checkpointing=checkpointing, visible=visible)
        predicted = self.proj(self.norm(tokens[:, context.shape[1] :]))
        return rearrange(predicted, "(b s) t d -> b s t d", s=sets)
