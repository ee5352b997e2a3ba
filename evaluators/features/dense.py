"""Dense features: what an encoder says of each place of an image, in the grid of its patches or of a stage's map.

| kind | of | what | width |
|---|---|---|---|
| `tokens` | transformers, and own encoders with tokens | the patch tokens after the final norm | D |
| `tokensK` | timm's transformers | those of the last K blocks, each normed, side by side (DINOv2: 4) | K x D |
| `map` | all others | the deepest stage's map with at least 8 rows and columns, else the finest | C |
| `mapK` | the same | stage K's map, numbered as timm's `out_indices` are | C_K |
| `patchesRxC` | no encoder | the pixels of each of R x C patches | C x p_h x p_w |

- The view is the whole centre square of an image at the encoder's size: what a crop leaves out would have no label.
- In a bank a sample is one row, its places in raster order, the features of a place side by side.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from prelude.data.batch import ViewPlan
from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.evaluators.features.pixels import Pixels
from prelude.pretrain.encoders import stage_maps
from prelude.pretrain.own_encoder import gives

PLACES = 8  # rows and columns that `map` has at least, where a stage has as many
_TOKENS, _MAP, _PATCHES = (re.compile(form) for form in (r"tokens([1-9]\d*)?", r"map(\d+)?", r"patches(\d+)x(\d+)"))


@dataclass(frozen=True)
class Layout:
    """Of one kind of dense feature of an encoder."""

    rows: int
    columns: int
    width: int  # of the features of a place

    @property
    def num_places(self) -> int:
        return self.rows * self.columns


def is_dense(kind: str) -> bool:
    return any(form.fullmatch(kind) for form in (_TOKENS, _MAP, _PATCHES))


def dense_plan(plan: ViewPlan) -> ViewPlan:
    """The evaluation's view without a margin that is cut off."""
    return replace(plan, views=tuple(replace(view, crop_share=1.0) for view in plan.views))


def default_dense_kind(model: nn.Module, name: str) -> str:
    """What an encoder is judged on unless told otherwise. Raises UserError for one that has neither tokens nor maps."""
    if has_tokens(model) or (gives(model) and gives(model).tokens):
        return "tokens"
    if num_stages(model):
        return "map"
    raise UserError(
        f"{name} gives neither patch tokens nor maps of stages, so that it says nothing of places; write an encoder "
        "with forward_tokens or forward_maps."
    )


def check_dense(model: nn.Module, kind: str, name: str) -> None:
    """Raises UserError for a kind that this model does not have."""
    have = default_dense_kind(model, name) if not isinstance(model, Pixels) else "patches8x8"
    tokens, of_map, patches = (form.fullmatch(kind) for form in (_TOKENS, _MAP, _PATCHES))
    if isinstance(model, Pixels) != bool(patches):
        raise UserError(f"{name} has no features={kind}; write {have}.")
    if tokens and not (have == "tokens" and (not tokens[1] or has_tokens(model))):
        raise UserError(f"{name} has no features={kind}; write {have}.")
    if tokens and tokens[1] and int(tokens[1]) > len(model.blocks):
        raise UserError(
            f"{name} has {counted(len(model.blocks), 'block')}, so features={kind} cannot be had; write less."
        )
    if of_map and not num_stages(model):
        raise UserError(f"{name} has no features={kind}; write {have}.")
    if of_map and of_map[1] and int(of_map[1]) >= num_stages(model):
        raise UserError(f"{name} has map0 to map{num_stages(model) - 1}, so features={kind} cannot be had.")


def dense(model: nn.Module, pixels: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
    """Each kind of one batch as (B, rows, columns, D) float32. pixels: (B, C, H, W), normalised."""
    tokens = {kind: int(match[1] or 1) for kind in kinds if (match := _TOKENS.fullmatch(kind))}
    maps = {kind: match[1] for kind in kinds if (match := _MAP.fullmatch(kind))}
    found = {kind: _patches(pixels, _PATCHES.fullmatch(kind)) for kind in kinds if _PATCHES.fullmatch(kind)}
    if tokens and gives(model):
        layout = gives(model).tokens
        grid = model.forward_tokens(pixels)[:, layout.num_prefix :].unflatten(1, layout.grid)
        found |= {kind: grid.float() for kind in tokens}
    elif tokens:
        deepest = max(tokens.values())
        blocks = model.forward_intermediates(pixels, indices=deepest, norm=True, intermediates_only=True)
        norm = norm_after_pooling(model)
        normed = [norm(_places(block)).float() for block in blocks]
        found |= {kind: torch.cat(normed[-count:], 3) for kind, count in tokens.items()}
    if maps:
        stages = stage_maps(model, pixels)
        found |= {kind: _places(stages[_stage(stages, number)]) for kind, number in maps.items()}
    return found


@torch.no_grad()
def layout_of(model: nn.Module, kind: str, size: tuple[int, int], channels: int) -> Layout:
    """Found out on one black image of `size` (height, width)."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    features = dense(model, torch.zeros(1, channels, *size, device=device), [kind])[kind]
    return Layout(*features.shape[1:])


def patches_like(layout: Layout, size: tuple[int, int]) -> str:
    """The kind of raw pixels whose grid is that of an encoder, or the finest that divides the view and is no finer."""
    rows, columns = (_divisor(side, most) for side, most in zip(size, (layout.rows, layout.columns), strict=True))
    return f"patches{rows}x{columns}"


def has_tokens(model: nn.Module) -> bool:
    """Whether it is one of timm's transformers."""
    return not gives(model) and hasattr(model, "num_prefix_tokens") and hasattr(model, "blocks")


def norm_after_pooling(model: nn.Module) -> nn.Module:
    """The final norm of a model trained with mean pooling may come after it, and none before."""
    return getattr(model, "fc_norm", None) or nn.Identity()


def num_stages(model: nn.Module) -> int:
    """0 for a model without maps of stages."""
    if found := gives(model):
        return len(found.maps)
    if isinstance(model, Pixels) or has_tokens(model) or not hasattr(model, "forward_intermediates"):
        return 0
    return len(model.feature_info)


def _stage(stages: Sequence[Tensor], number: str | None) -> int:
    if number is not None:
        return int(number)
    enough = [i for i, stage in enumerate(stages) if min(stage.shape[2:]) >= PLACES]
    return enough[-1] if enough else 0


def _places(maps: Tensor) -> Tensor:
    return rearrange(maps, "b c h w -> b h w c").float()


def _patches(pixels: Tensor, match: re.Match) -> Tensor:
    rows, columns = int(match[1]), int(match[2])
    height, width = pixels.shape[2] // rows, pixels.shape[3] // columns
    cut = F.interpolate(pixels.float(), (rows * height, columns * width), mode="nearest-exact")
    return rearrange(cut, "b c (h p) (w q) -> b h w (c p q)", p=height, q=width)


def _divisor(side: int, most: int) -> int:
    return next(count for count in range(min(most, side), 0, -1) if math.gcd(count, side) == count)
