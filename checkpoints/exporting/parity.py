"""The proof of an export: what was written is opened again by who will open it, and computes our features."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prelude.checkpoints.sources import OpenedEncoder
from prelude.data.errors import RunStopped

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Largest difference relative to the largest feature. Another library adds up in another order; in half
# precision every operation rounds to 11 and 8 bits.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}

Features = tuple[Tensor, ...]  # unpooled, and pooled ones (B, D)


@dataclass(frozen=True)
class Proof:
    """What opening an export has shown."""

    reader: str  # who opened it, with its version
    difference: float  # absolute, the largest between its features and ours
    note: str = ""  # what it takes and gives, where that is not plain


def with_features(model: nn.Module, images: Tensor) -> Features:
    unpooled = model.forward_features(images)
    return unpooled, model.forward_head(unpooled)


def rounded(encoder: OpenedEncoder, dtype: str) -> nn.Module:
    """A float32 copy of the encoder whose weights are those that `dtype` can hold."""
    model = copy.deepcopy(encoder.model)
    return model.to(DTYPES[dtype]).float() if dtype != "float32" else model


def images_for(encoder: OpenedEncoder, batch: int = 2, size: tuple[int, int] | None = None) -> Tensor:
    shape = (batch, encoder.config.in_chans, *(size or encoder.config.size))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def prove(
    encoder: OpenedEncoder, reader: str, theirs: Callable[[Tensor], Features], ours: nn.Module, *,
    images: Iterable[Tensor], tolerance: float, note: str = "",
) -> Proof:  # fmt: skip
    """Raises RunStopped where features of `theirs` differ from those of `ours` by more than `tolerance`."""
    largest = 0.0
    for batch in images:
        for expected, found in zip(with_features(ours, batch), theirs(batch), strict=True):
            found = found.float()
            difference = (expected - found).abs().max().item() if expected.shape == found.shape else math.inf
            largest = max(largest, difference)
            if not difference <= tolerance * expected.abs().max().item():
                raise RunStopped(
                    f"The features that {reader} computes of {encoder.name} differ from ours by {difference:.1e}, so "
                    f"nothing was exported; choose another --format, or --dtype float32."
                )
    return Proof(reader, largest, note)
