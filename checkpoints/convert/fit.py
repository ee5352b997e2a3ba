"""Weights put into a model: every tensor, each in its place, or a refusal that lists what does not fit.

Nothing stays at random in silence. What may differ in shape is brought over by a rule that the report names: the table
of positions for another grid, the patch projection for another patch or number of channels.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from prelude.checkpoints.convert.layers import first_difference, layers_of
from prelude.checkpoints.convert.mistakes import mistakes_in_words
from prelude.checkpoints.convert.resample import RULES, adapt_channels, resample_patches, resample_table
from prelude.checkpoints.convert.weights import Weights
from prelude.data.counting import counted, shortened
from prelude.data.errors import UserError
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.own_encoder import gives

_COUNTER = ".num_batches_tracked"
_POOLING = "attn_pool."


@dataclass(frozen=True)
class Fitted:
    loaded: int  # tensors of the model that are the source's
    total: int  # tensors of the model
    changes: tuple[str, ...]  # what was brought over by a rule, or done to the values
    unused: tuple[str, ...] = ()  # the source's, with no place in this model, by leave
    new: tuple[str, ...] = ()  # the model's, that the source does not have, by leave

    def sentence(self, weights: Weights) -> str:
        parts = [f"{weights.where}: {weights.format}, {self.loaded} of {self.total} tensors loaded", *self.changes]
        if self.new:
            parts.append(f"new are {shortened(self.new)}")
        if self.unused:
            parts.append(f"not used are {shortened(self.unused)}")
        if weights.left_out:
            parts.append("left out " + ", ".join(f"{name} ({n})" for name, n in sorted(weights.left_out.items())))
        return ", ".join(parts)


@torch.no_grad()
def fit(model: nn.Module, weights: Weights, name: str, *, may_differ: Sequence[str] = ()) -> Fitted:
    """Puts `weights` into `model`, an encoder without a classifier.

    name: the model's, for messages. may_differ: beginnings of names that the source or the model may have alone.
    Raises UserError, before anything is changed, unless every other tensor has its place.
    """
    _refuse_other_function(model, weights, name)
    wanted, changes = model.state_dict(), list(weights.notes)
    found = dict(weights.tensors)
    _refuse_other_kinds(wanted, found, weights, name)
    found |= _under_other_names(wanted, found)
    filled = _filled(wanted, found, weights)
    found |= filled
    for adapt in (_channels, _patches, _table, _last_norm):
        change = adapt(model, wanted, found, weights)
        changes += [change] if change else []
    changes += _named(filled)
    # An attention that pools (SigLIP) is a head, which goes where the model pools without any.
    alone = (*may_differ, *(() if any(n.startswith(_POOLING) for n in wanted) else (_POOLING,)))
    new = tuple(n for n in wanted if n not in found and n.startswith(alone))
    unused = tuple(n for n in found if n not in wanted and n.startswith(alone))
    shapes = {n: (tuple(found[n].shape), tuple(wanted[n].shape)) for n in wanted if n in found}
    mistakes = mistakes_in_words(
        missing=[n for n in wanted if n not in found and n not in new],
        unplaced=[n for n in found if n not in wanted and n not in unused],
        misshapen={n: (has, wants) for n, (has, wants) in shapes.items() if has != wants},
    )
    if mistakes:
        raise UserError(
            f"{weights.where} ({weights.format}) does not hold the weights of {name}: {shortened(mistakes)}; write the "
            "encoder that they were trained with."
        )
    _refuse_other_layers(model, weights, name)
    damaged = [n for n in found if _is_damaged(found[n], wanted.get(n))]
    if damaged:
        raise UserError(f"{weights.where} has numbers that are not finite in {shortened(damaged)}; fetch it again.")
    if not any(found[n].any() for n in wanted if n in found and found[n].ndim > 1):
        raise UserError(f"{weights.where} holds zeros where weights should be; fetch or save it again.")
    for tensor_name, target in wanted.items():
        if tensor_name in found:
            target.copy_(found[tensor_name])
    loaded = [n for n in wanted if n in found and n not in filled and torch.equal(wanted[n].cpu(), found[n])]
    return Fitted(len(loaded), len(wanted), tuple(changes), unused, new)


def _refuse_other_kinds(wanted: dict, found: dict, weights: Weights, name: str) -> None:
    """Whole numbers in the place of others are not the weights, but a code for them."""
    wrong = [
        f"{n} is {str(found[n].dtype).removeprefix('torch.')}"
        for n in wanted
        if n in found and found[n].is_floating_point() != wanted[n].is_floating_point()
    ]
    if wrong:
        raise UserError(
            f"{weights.where} ({weights.format}) has numbers of another kind than {name}: {shortened(wrong)}; write "
            "weights in floating point."
        )


def _under_other_names(wanted: dict, found: dict) -> dict[str, Tensor]:
    """What lacks a name that is another's in the model too, as of tied weights: a checkpoint has such a tensor once."""
    places = {n: (t.data_ptr(), t.dtype, t.shape, t.stride()) for n, t in wanted.items() if t.numel()}
    known = {places[n]: found[n] for n in places if n in found}
    return {n: known[place] for n, place in places.items() if n not in found and place in known}


def _is_damaged(tensor: Tensor, fresh: Tensor | None) -> bool:
    """Whether it has numbers that are not finite, and the model's own has none of that kind, as a mask of -inf has."""
    if not tensor.is_floating_point() or tensor.isfinite().all():
        return False
    return any(odd(tensor).any() and (fresh is None or not odd(fresh).any()) for odd in (torch.isnan, torch.isinf))


def facts(model: nn.Module) -> dict:
    """What decides an encoder's function and is in no tensor: its layers, and of a vision transformer what has a key of
    its own."""
    block = None if gives(model) else next(iter(getattr(model, "blocks", [])), None)
    known = {"layers": layers_of(model)}
    if not hasattr(getattr(block, "attn", None), "num_heads"):
        return known
    return known | {"num_heads": block.attn.num_heads, "norm_eps": getattr(block.norm1, "eps", None)}


def grid_of(model: nn.Module) -> tuple[int, int] | None:
    """None where there is no table of positions that could be brought to another grid."""
    known = _has_table(model) and not gives(model)
    return getattr(getattr(model, "patch_embed", None), "grid_size", None) if known else None


def prefix_rows_of(model: nn.Module) -> int:
    """Rows of the table of positions before those of patches. CaiT has a class token, and no row for it."""
    grid = grid_of(model)
    if grid is not None and model.pos_embed.ndim == 3:
        return max(0, model.pos_embed.shape[1] - grid[0] * grid[1])
    return 0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 0)


# ---- what may differ


def _channels(model: nn.Module, wanted: dict, found: dict, weights: Weights) -> str | None:
    """The convolutions that read the image, for another number of channels."""
    change = None
    for first in _first_layers(model):
        if first not in found or found[first].ndim != 4 or found[first].shape[1] == wanted[first].shape[1]:
            continue
        change = found[first].shape[1], wanted[first].shape[1]
        found[first] = adapt_channels(found[first], change[1])
    if change is None:
        return None
    old, new = change
    how = "summed" if new == 1 else f"repeated in turn or cut off, times {old} / {new}"
    return f"first layer brought from {old} to {counted(new, 'channel')} ({how})"


def _first_layers(model: nn.Module) -> list[str]:
    """Names of their weights: as timm says, or the first there is, where its table is for another stem."""
    known = getattr(model, "pretrained_cfg", None) or {}
    named = known.get("first_conv") or ()
    convolutions = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    told = [name for name in ((named,) if isinstance(named, str) else named) if name in convolutions]
    whole = (name for name, layer in convolutions.items() if layer.groups == 1)
    return [f"{name}.weight" for name in told or [*whole][:1]]


def _patches(model: nn.Module, wanted: dict, found: dict, weights: Weights) -> str | None:
    name = "patch_embed.proj.weight"
    if name not in found or name not in wanted or found[name].ndim != 4:
        return None
    old, new = tuple(found[name].shape[2:]), tuple(wanted[name].shape[2:])
    if old == new or found[name].shape[0] != wanted[name].shape[0]:
        return None
    found[name] = resample_patches(found[name], new)
    return f"patch projection resampled from {_by(old)} to {_by(new)} pixels (pseudo-inverse of the resizing)"


def _table(model: nn.Module, wanted: dict, found: dict, weights: Weights) -> str | None:
    """The table of positions: for another grid, and into a fixed table only if it is that one."""
    if "pos_embed" not in found or "pos_embed" not in wanted or found["pos_embed"].ndim != 3:
        return None
    table, target, prefix = found["pos_embed"], grid_of(model), prefix_rows_of(model)
    if target is None or table.shape[2] != wanted["pos_embed"].shape[2]:
        return None
    if prefix != weights.prefix_rows:
        raise UserError(
            f"{weights.where} ({weights.format}) has {counted(weights.prefix_rows, 'row')} of prefix tokens in its "
            f"table of "
            f"positions, and this encoder has {prefix}; write encoder.kwargs={{no_embed_class: "
            f"{'true' if weights.prefix_rows == 0 else 'false'}}}."
        )
    grid = weights.grid or (target if table.shape[1] == wanted["pos_embed"].shape[1] else None)
    if grid is None or table.shape[1] != prefix + grid[0] * grid[1]:
        raise UserError(
            f"{weights.where} has a table of {table.shape[1] - prefix} positions, whose grid it does not tell; write "
            f"{weights.before_word}grid=ROWSxCOLUMNS."
        )
    fixed = not isinstance(model.pos_embed, nn.Parameter)
    is_formula = replace(weights, grid=grid).has_sincos_table
    if fixed and not is_formula:
        raise UserError(
            f"{weights.where} ({weights.format}) has a learned table of positions, which encoder.pos_embed=sincos "
            "would hold fixed; write encoder.pos_embed=learned."
        )
    if grid == target:
        return None
    rule = "sincos" if fixed or (weights.resampling == "sincos" and is_formula) else weights.resampling
    rule = "timm" if rule == "sincos" and not (fixed or is_formula) else rule
    if not rule:
        raise UserError(
            f"{weights.where} ({weights.format}) does not tell by which method its table of positions is resampled "
            f"from {_by(grid)} to {_by(target)}; write {weights.before_word}resampling=offset for DINO's, "
            "=plain for MAE's, =timm for timm's."
        )
    found["pos_embed"] = resample_table(table, grid, target, rule, prefix)
    return f"position table resampled from {_by(grid)} to {_by(target)} ({RULES[rule]})"


def _last_norm(model: nn.Module, wanted: dict, found: dict, weights: Weights) -> str | None:
    if not weights.moved_norm or "norm.weight" not in wanted or "fc_norm.weight" in wanted:
        return None
    for kind in ("weight", "bias"):
        found[f"norm.{kind}"] = found.pop(f"fc_norm.{kind}")
    return "fc_norm taken as the norm of every token, as it was pretrained"


def _filled(wanted: dict, found: dict, weights: Weights) -> dict[str, Tensor]:
    """The two things that published files lack as a whole, and that are no trained weights.

    Counts of batches, which old files do not have and no encoder here reads; and the norm before a ConvNeXt's
    classifier, which SparK does not train and no stage depends on.
    """
    filled = {}
    counters = [name for name in wanted if name.endswith(_COUNTER)]
    if not any(name.endswith(_COUNTER) for name in found):
        filled |= {name: torch.zeros_like(wanted[name]) for name in counters}
    lacks = [name for name in weights.may_lack if name in wanted]
    if not any(name in found for name in lacks):
        filled |= {name: torch.full_like(wanted[name], float(name.endswith("weight"))) for name in lacks}
    return filled


def _named(filled: dict[str, Tensor]) -> list[str]:
    counters = sum(name.endswith(_COUNTER) for name in filled)
    notes = [f"{counters} counts of batches set to 0"] if counters else []
    norms = [name for name in filled if not name.endswith(_COUNTER)]
    return notes + ([f"{', '.join(norms)} set to 1 and 0, since the method has no such norm"] if norms else [])


def _refuse_other_function(model: nn.Module, weights: Weights, name: str) -> None:
    """Keys and shapes fit with these wrong, and the features are others."""
    has = facts(model)
    if None not in (weights.num_heads, has.get("num_heads")) and weights.num_heads != has["num_heads"]:
        raise UserError(
            f"{weights.where} ({weights.format}) was trained with {weights.num_heads} attention heads, and {name} has "
            f"{has['num_heads']}; write encoder.kwargs.num_heads={weights.num_heads}."
        )
    if None not in (weights.norm_eps, has.get("norm_eps")) and weights.norm_eps != has["norm_eps"]:
        raise UserError(
            f"{weights.where} ({weights.format}) was trained with LayerNorms of eps {weights.norm_eps:g}, and {name} "
            f"has {has['norm_eps']:g}; write encoder.norm_eps={weights.norm_eps:g}."
        )


def _refuse_other_layers(model: nn.Module, weights: Weights, name: str) -> None:
    """As `_refuse_other_function`, where the encoder is known that the weights were in."""
    differ = first_difference(weights.layers, layers_of(model)) if weights.layers else None
    if differ:
        theirs, ours = differ
        raise UserError(
            f"{weights.where} ({weights.format}) was trained with {theirs}, and {name} has {ours}; write "
            f"{_in_keys(weights.config)}."
        )


def _in_keys(config: EncoderConfig | None) -> str:
    if config is None:
        return "the encoder that they were trained with"
    kwargs = ", ".join(f"{key}: {json.dumps(value)}" for key, value in config.kwargs.items())
    eps = [] if config.norm_eps is None else [f"encoder.norm_eps={config.norm_eps:g}"]
    return " ".join([f"encoder.name={config.name}", *([f"'encoder.kwargs={{{kwargs}}}'"] if kwargs else []), *eps])


def _has_table(model: nn.Module) -> bool:
    return isinstance(getattr(model, "pos_embed", None), Tensor) and getattr(model, "patch_embed", None) is not None


def _by(sides: tuple[int, int]) -> str:
    return f"{sides[0]} x {sides[1]}"
