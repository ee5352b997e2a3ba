"""Frozen features: every image of a set of shards through an encoder once.

- The view is deterministic: a centre crop, resized, not flipped, normalised as the encoder was pretrained.
- One pass computes every kind of feature that is asked for.
- Each sample appears exactly once, in the order of the shards' index, at any batch size and number of workers.

Kinds of feature:

| kind | of | what | width |
|---|---|---|---|
| `cls` | vision transformers | class token after the final norm (MAE) | D |
| `mean` | vision transformers | mean of the patch tokens after the final norm (I-JEPA) | D |
| `lastK` | vision transformers | the same mean of each of the last K blocks, side by side (I-JEPA: `last4`) | K x D |
| `lastKxG` | the same | the last K blocks averaged over G x G cells of the image each | K x D x G x G |
| `pool` | all others | what the encoder itself gives: its last map pooled, and the norm that some have after that | D |
| `stageK` | convnets and hierarchical transformers | mean over places of stage K's map, as in `out_indices` | D_K |
| `stages` | the same | the means of all stages, side by side | sum of D_K |
| `stageKxG` | the same | stage K averaged over G x G cells of its map | D_K x G x G |
| `stagesxG` | the same | all stages averaged over G x G cells of their maps | sum of D_K x G x G |
| `pixels` | no encoder | the view's normalised pixels, flattened | C x H x W |

Those of single places, see `dense`.
"""

import re
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from prelude.data.batch import Batch, View, ViewPlan
from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.evaluators.features.dense import (
    check_dense,
    dense,
    has_tokens,
    is_dense,
    norm_after_pooling,
    num_stages,
)
from prelude.evaluators.features.labels import not_class_numbers
from prelude.evaluators.features.pixels import Pixels
from prelude.pretrain.behind_stages import layers_behind_stages
from prelude.pretrain.encoders import pooled_width, stage_maps
from prelude.pretrain.images import images
from prelude.pretrain.own_encoder import gives

CROP_SCALE = (0.4, 1.0)  # of the image's area, where features of several crops are averaged
_BY_STAGES = ("spark", "fcmae")  # objectives that learn by the maps of stages alone
FULL_FRAME_BELOW = 128  # pixels; from here on the classical "resize 256, crop 224"


@dataclass(frozen=True)
class Features:
    """N samples of D features, on the CPU."""

    values: Tensor  # (N, D) float32
    labels: Tensor  # (N,) int64, or (N, L) float32 of 1, 0 and NaN for unknown
    sample_ids: Tensor  # (N,) int64
    data_fingerprint: str  # of the shards
    name: str  # the kind
    recipe: dict = field(default_factory=dict)  # how the images were seen and in which precision
    groups: Tensor | None = None  # (N,) int64: samples that belong together, such as those of a patient
    # (N,) int64: the sample of train that is the same image; -1: none
    same_as: Tensor | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.labels)


def evaluation_plan(encoder) -> ViewPlan:
    """The one deterministic view of an image that an encoder is judged on."""
    size = encoder.config.size
    share = 1.0 if min(size) < FULL_FRAME_BELOW else 0.875
    view = View(size, crop="center", crop_share=share, flip=0.0)
    return ViewPlan((view,), tuple(encoder.mean), tuple(encoder.std), tuple(encoder.shown))


def crops_plan(encoder, count: int) -> ViewPlan:
    """The evaluation's view and `count` - 1 unflipped crops of 40 to 100 % of the image, drawn by its place."""
    plan = evaluation_plan(encoder)
    crop = View(encoder.config.size, scale=CROP_SCALE, flip=0.0)
    return replace(plan, views=(*plan.views, *[crop] * (count - 1)))


def default_kinds(model: nn.Module) -> tuple[str, ...]:
    """The kinds of feature that an evaluation looks at unless told otherwise."""
    if isinstance(model, Pixels):
        return ("pixels",)
    if not has_tokens(model):
        return ("pool",)
    return ("cls", "mean") if _has_class_token(model) else ("mean",)


def suited_kinds(encoder) -> tuple[str, ...]:
    """`default_kinds` of an encoder that was opened; but `stages`, where its objective leaves layers in front of `pool`
    as they were. An untrained twin has those of its run."""
    model = encoder.model
    if encoder.objective in _BY_STAGES and not gives(model) and layers_behind_stages(model, encoder.config.size):
        return ("stages",)
    return default_kinds(model)


def fair_kinds(model: nn.Module) -> tuple[str, ...]:
    """Every kind that is worth a try where unlike models stand side by side and each is to have its best."""
    if has_tokens(model):
        return (*default_kinds(model), f"last{min(4, len(model.blocks))}")
    return (*default_kinds(model), *(("stages",) if num_stages(model) else ()))


def kinds_among(model: nn.Module, kinds: Sequence[str], name: str) -> tuple[str, ...]:
    """Those of `kinds` that this model has. Raises UserError where it has none."""
    has = []
    for kind in kinds:
        try:
            check_kinds(model, [kind], name)
        except UserError:
            continue
        has.append(kind)
    if not has:
        check_kinds(model, kinds, name)
    return tuple(has)


def check_kinds(model: nn.Module, kinds: Sequence[str], name: str) -> None:
    """Raises UserError for a kind of feature that this model does not have."""
    count = num_stages(model)
    have = default_kinds(model) + (("last4",) if has_tokens(model) else ())
    have += ("stages", "stage0", f"stage{count - 1}x4") if count else ()
    for kind in kinds:
        (blocks, _), stage = _last(kind), (0, 1) if _stages(kind) else _stage(kind)
        if is_dense(kind):
            check_dense(model, kind, name)
        elif blocks and has_tokens(model):
            if blocks > len(model.blocks):
                raise UserError(
                    f"{name} has {counted(len(model.blocks), 'block')}, so features={kind} cannot be had; write less."
                )
        elif stage and count:
            if stage[0] >= count:
                raise UserError(f"{name} has stage0 to stage{count - 1}, so features={kind} cannot be had.")
        elif kind not in have:
            raise UserError(f"{name} has no features={kind}; write one or more of {', '.join(have)}.")


def encode(
    encoder,
    batches: Iterable[Batch],
    num_samples: int,
    fingerprint: str,
    label: str,
    *,
    kinds: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    shards: str = "the shards",
) -> dict[str, Features]:
    """The frozen features of every sample of `batches`, `num_samples` of them at most, by kind.

    encoder, kinds: as for `Extractor`. label: extension of the member that held the class numbers; shards: in a
    sentence. Raises UserError as `Extractor` does, for labels that are no class numbers, and for no sample.
    """
    extractor = Extractor(encoder, kinds, device)
    values: dict[str, Tensor] = {}
    labels, sample_ids, seen = [], [], 0
    for batch in batches:
        for kind, rows in extractor(batch).items():
            # Written in place: a list joined at the end would hold everything twice.
            bank = values.setdefault(kind, torch.empty(num_samples, rows.shape[1]))
            bank[seen : seen + len(batch)] = rows
        labels.append(_class_numbers(batch, label))
        sample_ids.append(batch.sample_ids)
        seen += len(batch)
    if not seen:
        raise NothingReadable(shards)
    together = torch.cat(labels).cpu(), torch.cat(sample_ids).cpu(), fingerprint
    return {kind: Features(bank[:seen], *together, kind, extractor.recipe) for kind, bank in values.items()}


class Extractor:
    """An encoder on its device, ready to turn batches into features.

    encoder: has `model`, `config` (with the image size), `mean`, `std` and `name`, as an OpenedEncoder does.
    plan: of the view to look at, by default the evaluation's; features of several views are averaged.
    Raises UserError for a kind that the encoder does not have.
    """

    def __init__(
        self,
        encoder,
        kinds: Sequence[str] | None = None,
        device: torch.device | str = "cpu",
        plan: ViewPlan | None = None,
    ):
        self.device = torch.device(device)
        self.encoder, self.model = encoder, encoder.model.to(self.device).eval()
        self.kinds = tuple(kinds or suited_kinds(encoder))
        check_kinds(self.model, self.kinds, encoder.name)
        self.plan = plan or evaluation_plan(encoder)
        self.recipe = {
            "view": asdict(self.plan.views[0]),
            **({"crops": [asdict(view) for view in self.plan.views[1:]]} if len(self.plan.views) > 1 else {}),
            "mean": list(self.plan.mean),
            "std": list(self.plan.std),
            "precision": "bf16" if self.device.type == "cuda" else "fp32",
        }

    @torch.no_grad()
    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """(B, D) float32 on the device, by kind."""
        views = images(batch.to(self.device), self.plan)
        with autocast(self.device):
            found = [pool(self.model, pixels, self.kinds) for pixels in views]
        return {kind: sum(one[kind] for one in found) / len(found) for kind in found[0]}


class NothingReadable(UserError):
    def __init__(self, images: str):
        """images: which, in a sentence."""
        super().__init__(f"None of the images in {images} can be read; write other shards.")


def pool(model: nn.Module, pixels: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
    """Every kind of feature of one batch. pixels: (B, C, H, W) normalised. Returns (B, D) float32 tensors; of dense
    kinds D is that of all places, side by side."""
    of_places = [kind for kind in kinds if is_dense(kind)]
    if of_places:
        found = {kind: values.flatten(1) for kind, values in dense(model, pixels, of_places).items()}
        others = [kind for kind in kinds if kind not in found]
        return found | (pool(model, pixels, others) if others else {})
    if isinstance(model, Pixels):
        return {"pixels": model(pixels)}
    if not has_tokens(model):
        return _of_stages(model, pixels, kinds)
    deepest = max([1, *(blocks for blocks, _ in map(_last, kinds))])
    form = "NCHW" if any(cells > 1 for _, cells in map(_last, kinds)) else "NLC"
    tokens, blocks = model.forward_intermediates(pixels, indices=deepest, norm=True, output_fmt=form)
    norm = norm_after_pooling(model)
    pooled = {}
    for kind in kinds:
        if kind == "cls":
            pooled[kind] = norm(tokens[:, 0]).float()  # (B, D)
        elif kind == "mean":
            pooled[kind] = norm(tokens[:, model.num_prefix_tokens :].float().mean(1)).float()  # (B, D)
        else:
            count, cells = _last(kind)  # of blocks, which come without prefix tokens
            if cells > 1:
                _check_cells(kind, cells, blocks[-1])
            means = [norm(_means(block.float(), cells)).float() for block in blocks[-count:]]
            pooled[kind] = torch.cat([mean.flatten(1) for mean in means], 1)  # (B, K * G * G * D)
    return pooled


def _means(tokens: Tensor, cells: int) -> Tensor:
    """(B, N, D) or, for more than one cell, (B, D, H, W), to (B, cells * cells, D)."""
    if cells > 1:
        return rearrange(F.adaptive_avg_pool2d(tokens, cells), "b d h w -> b (h w) d")
    # Laid out as they would be had nobody asked for cells, so that they are summed in the same order.
    tokens = rearrange(tokens, "b d h w -> b (h w) d").contiguous() if tokens.ndim == 4 else tokens
    return tokens.mean(1, keepdim=True)


def _of_stages(model: nn.Module, pixels: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
    if set(kinds) == {"pool"}:
        return {"pool": _final(model, pixels)}
    if gives(model):
        final, stages = None, stage_maps(model, pixels)
    else:
        final, stages = model.forward_intermediates(pixels)  # stages: (B, D_K, H_K, W_K)
    pooled = {}
    for kind in kinds:
        if kind == "pool":
            pooled[kind] = _final(model, pixels) if final is None else _pooled(model, final)
        elif cells := _stages(kind):
            _check_cells(kind, cells, stages[0])
            pooled[kind] = torch.cat([F.adaptive_avg_pool2d(stage.float(), cells).flatten(1) for stage in stages], 1)
        else:
            number, cells = _stage(kind)
            _check_cells(kind, cells, stages[number])
            pooled[kind] = F.adaptive_avg_pool2d(stages[number].float(), cells).flatten(1)
    return pooled


def _check_cells(kind: str, cells: int, finest: Tensor) -> None:
    """More cells than the finest map (B, C, H, W) has places say nothing new, and may be more than memory holds."""
    height, width = finest.shape[2:]
    if cells > max(height, width):
        most = f"{kind.rpartition('x')[0]}x{max(height, width)}"
        raise UserError(f"features={kind} asks for more cells than {height} x {width} places; write {most} at most.")


def _final(model: nn.Module, pixels: Tensor) -> Tensor:
    """(B, D): a network of the user's pools in its own way."""
    if gives(model):
        return model(pixels).float()
    return _pooled(model, model.forward_features(pixels))


def _pooled(model: nn.Module, features: Tensor | list[Tensor]) -> Tensor:
    """(B, D), which is `model(images)`: what `forward_features` gives, pooled as the model does it, in float32."""
    several = isinstance(features, list)
    with torch.autocast((features[0] if several else features).device.type, enabled=False):
        features = [one.float() for one in features] if several else features.float()
        try:
            return _mean_over_places(model.forward_head(features, pre_logits=True), pooled_width(model))
        except NotImplementedError:  # encoders of language models pool nothing
            return _mean_over_places(features, model.num_features)


def _mean_over_places(features: Tensor, channels: int) -> Tensor:
    """(B, C, H, W), or channels last as hierarchical transformers have it, or already (B, C), to (B, C)."""
    if features.ndim == 2:
        return features
    if features.ndim == 4 and features.shape[1] == channels:
        return features.mean((2, 3))
    return features.flatten(1, -2).mean(1)


def _has_class_token(model: nn.Module) -> bool:
    return getattr(model, "cls_token", None) is not None


def _last(kind: str) -> tuple[int, int]:
    """(K, G) of `lastKxG`, G = 1 for `lastK`; K = 0 for every other kind."""
    match = re.fullmatch(r"last([1-9]\d*)(?:x([1-9]\d*))?", kind)
    return (int(match[1]), int(match[2] or 1)) if match else (0, 1)


def _stage(kind: str) -> tuple[int, int] | None:
    """(K, G) of `stageKxG`, G = 1 for `stageK`; None for every other kind."""
    match = re.fullmatch(r"stage(\d+)(?:x([1-9]\d*))?", kind)
    return (int(match[1]), int(match[2] or 1)) if match else None


def _stages(kind: str) -> int:
    """G of `stagesxG`, 1 for `stages`; 0 for every other kind."""
    match = re.fullmatch(r"stages(?:x([1-9]\d*))?", kind)
    return int(match[1] or 1) if match else 0


def is_kind(kind: str) -> bool:
    """Whether some encoder could have such features."""
    plain = kind in ("cls", "mean", "pool", "pixels")
    return plain or is_dense(kind) or bool(_last(kind)[0] or _stage(kind) or _stages(kind))


def autocast(device: torch.device):
    """The precision that a recipe of features tells."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def _class_numbers(batch: Batch, label: str) -> Tensor:
    labels = batch.labels
    if labels is None or labels.ndim != 1 or labels.is_floating_point():
        raise not_class_numbers(label, getattr(labels, "dtype", "none"), () if labels is None else labels.shape[1:])
    return labels.long()
