"""Features in pieces: read from wherever they are, as many rows at a time as a device works on well."""

from collections.abc import Iterator

import torch
from torch import Tensor

from prelude.evaluators.features.snapshot import fits

# Logits or features held at once: 4 MiB of float32, or 128 MiB beside a GPU, which wants large matrices.
PIECE_ELEMENTS = 2**25 if torch.cuda.is_available() else 2**20


def resident(values: Tensor, device: torch.device) -> Tensor:
    """On the device where they take at most half of a GPU's free memory; else where they are."""
    return values.to(device) if device.type == "cuda" and has_room(values.nbytes, device) else values


def has_room(num_bytes: int, device: torch.device) -> bool:
    """Whether a copy of this size may be made: in half of what is free there, and as `fits` has it on the host."""
    return num_bytes <= torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else fits(num_bytes)


def pieces(values: Tensor, rows: Tensor | None, width: int) -> Iterator[tuple[slice, Tensor]]:
    """(places among the rows, (n, D) values), `PIECE_ELEMENTS // width` rows at a time."""
    total, step = len(values) if rows is None else len(rows), max(PIECE_ELEMENTS // width, 1)
    for start in range(0, total, step):
        places = slice(start, min(start + step, total))
        yield places, values[places] if rows is None else values[rows[places]]
