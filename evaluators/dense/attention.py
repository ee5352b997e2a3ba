"""Where an encoder looks: a map over each image from its last block, or from a stage with enough places.

Nothing of the encoder is changed. Fused attention stays on, and hands nobody its weights: they are computed anew from
what it is given, queries and keys as they are after norms and rotations, and biases of pairs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prelude.pretrain.encoders import stage_maps
from prelude.pretrain.own_encoder import gives

PLACES = 6  # a side of a convnet's map: the deepest stage with as many is looked at


@dataclass(frozen=True)
class Maps:
    values: Tensor  # (B, h, w) float32, not below 0
    what: str  # for a caption


@torch.no_grad()
def maps(model: nn.Module, pixels: Tensor) -> Maps | None:
    """Of a batch (B, C, H, W), normalised. None for a model that has neither blocks nor stages.

    Plain ViTs, EVA and BEiT: attention that the class token, or else the mean patch token, pays to each patch in the
    last block, mean over heads. All others: the norm of activations.
    """
    if has_attention(model):
        prefix, grid = model.num_prefix_tokens, model.patch_embed.grid_size
        weights = attention(model, pixels).mean(1)[:, :, prefix:]  # (B, N, patches)
        of_class = getattr(model, "cls_token", None) is not None
        paid = weights[:, 0] if of_class else weights[:, prefix:].mean(1)  # (B, patches)
        who = "the class token pays" if of_class else "patches pay on average"
        return Maps(paid.unflatten(1, grid), f"attention that {who} to each patch in the last block, mean over heads")
    found = gives(model)
    if not (found.maps if found else hasattr(model, "forward_intermediates")):
        return None
    stages = stage_maps(model, pixels)  # (B, C, h, w) each
    enough = [i for i, stage in enumerate(stages) if min(stage.shape[2:]) >= PLACES] or [0]
    chosen = stages[enough[-1]]
    height, width = chosen.shape[2:]
    place = f"stage {enough[-1]} of {len(stages)} (counted from 0, {height} x {width} places)"
    return Maps(chosen.float().norm(dim=1), f"norm of the activations of {place}")


def attention(model: nn.Module, pixels: Tensor) -> Tensor:
    """(B, heads, N, N) weights of the last block, each row with sum 1, prefix tokens first."""
    with FusedAttention() as last:
        model.forward_features(pixels)
    return last.weights()


class FusedAttention(TorchFunctionMode):
    """Keeps what the latest call was given, while a model runs in its context."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            (self.queries, self.keys, _), self.biases = args, kwargs.get("attn_mask")
        return function(*args, **kwargs)

    @torch.no_grad()
    def weights(self, rows: slice = slice(None)) -> Tensor:
        """(B, heads, rows, N) of that call, each row with sum 1, float32. rows: of the queries."""
        queries, keys, biases = self.queries[:, :, rows], self.keys, self.biases  # (B, heads, N, d)
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)  # where several queries share a head
        scores = queries @ keys.transpose(2, 3) / queries.shape[-1] ** 0.5
        if biases is not None:
            scores = scores + (biases if biases.shape[-2] == 1 else biases[..., rows, :])
        return scores.float().softmax(3)


def has_attention(model: nn.Module) -> bool:
    """Whether the last block hands its queries and keys to torch's fused attention."""
    blocks = None if gives(model) else getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList):
        return False
    last = getattr(blocks[-1], "attn", None)
    known = isinstance(last, Attention | AttentionRope | EvaAttention | BeitAttention) and last.fused_attn
    return known and hasattr(model, "num_prefix_tokens") and hasattr(getattr(model, "patch_embed", None), "grid_size")
