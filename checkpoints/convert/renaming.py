"""What a layout is, and how names are changed to timm's: whole names, by the first rule that matches."""

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prelude.data.errors import UserError

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """A network under timm's names."""

    name: str  # for a person
    tensors: Tensors
    resampling: str = ""  # see resample.RULES; "": files of several methods look like this one
    table_has_prefix: bool | None = True  # whether prefix tokens have rows in `pos_embed`; None: its length tells
    norm_eps: float | None = None
    may_lack: tuple[str, ...] = ()  # see Weights
    left_out: Tensors = field(default_factory=dict)  # under the file's names
    own: Tensors = field(default_factory=dict)  # of a masked autoencoder's decoder, under our names
    num_heads: int | None = None  # where the tensors tell it
    pixels: tuple | None = None  # see Weights; None: as `from_files` knows of this format
    notes: tuple[str, ...] = ()  # see Weights
    untold: str = ""  # see Weights


def any_name(tensors: Tensors, pattern: str) -> bool:
    """Whether a name begins with what the pattern matches."""
    return any(re.match(pattern, name) for name in tensors)


def without(tensors: Tensors, *prefixes: str) -> tuple[Tensors, Tensors]:
    """(the others, those that begin with one of `prefixes`)"""
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}
    return kept, {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}


def rename(tensors: Tensors, rules: list[tuple[str, str]]) -> Tensors:
    """By the first rule that matches; a name that none matches stays, and will be found to have no place."""
    found = {}
    for name, tensor in tensors.items():
        new = next((re.sub(rule, to, name) for rule, to in rules if re.match(rule, name)), name)
        found[name if new in found else new] = tensor
    return found


def joined_qkv(tensors: Tensors, where: str, kinds: tuple[str, ...] = ("weight", "bias")) -> Tensors:
    """query, key and value of a block as the rows of one matrix, in this order."""
    joined = {}
    for name, tensor in tensors.items():
        part = re.fullmatch(rf"(.*\.attn)\.(query|key|value)\.({'|'.join(kinds)})", name)
        if not part:
            joined[name] = tensor
            continue
        names = [f"{part[1]}.{which}.{part[3]}" for which in ("query", "key", "value")]
        if any(each not in tensors for each in names):
            missing = ", ".join(each for each in names if each not in tensors)
            raise UserError(f"{where} lacks {missing}, beside {name}; fetch it again.")
        joined[f"{part[1]}.qkv.{part[3]}"] = torch.cat([tensors[each] for each in names])
    return joined
