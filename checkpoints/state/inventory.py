"""What a saved state has, without the values of its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from prelude.checkpoints.state.scalars import Number

# (rank, start, stop) of each piece of a flattened tensor, in order; or how many elements each rank's has, where they
# are equal: under ZeRO 3 there would be as many entries as tensors times ranks.
Pieces = list[tuple[int, int, int]] | int


class Spec(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Inventory:
    tensors: Mapping[str, Spec]
    moments: Mapping[str, Mapping[str, Spec]]  # parameter name -> state name
    optimizer: str
    scalars: Mapping[str, Mapping[str, Number | dict]]
    loss_scaler: Mapping[str, Number] | None
