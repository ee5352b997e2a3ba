"""Training state that knows parameters by name: full tensors, whatever ZeRO stage and number of ranks hold them.

- Gathering and restoring change no bit of a weight, a frozen teacher, a buffer or an optimizer moment.
- A state that was saved at one stage and world size is taken up at any other.
- Weights are the values that the optimizer steps (ZeRO's master copies), not their images in the model.
- Buffers are rank 0's.

Here the whole state is gathered in the host memory of rank 0; `parts` leaves each rank what it holds.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from prelude.checkpoints.state.holders import Holder, holders_of, named_tensors, optimizer_of, whole
from prelude.checkpoints.state.misfits import refuse_half_precision
from prelude.checkpoints.state.scalars import Number, is_moment, scalars_by_name
from prelude.pretrain import distributed

# Elements on rank 0's device while a partition is gathered: saving must not need memory that training did not.
_GATHERED_AT_ONCE = 2**24


@dataclass
class PortableState:
    """All that a run needs to go on, on the CPU; tensors have the shapes that the model gives them."""

    tensors: dict[str, Tensor]  # parameters, trained and frozen, and persistent buffers
    optimizer: str  # class name of the optimizer that the moments belong to
    moments: dict[str, Tensor] = field(default_factory=dict)  # by PARAMETER/NAME
    scalars: dict[str, dict[str, Number | dict]] = field(default_factory=dict)  # parameter name -> see `scalars`
    loss_scaler: dict[str, Number] | None = None  # of fp16


def gather_state(engine) -> PortableState | None:
    """The whole state of `engine` on rank 0, None elsewhere. Collective; call it between optimizer steps.

    Raises UserError on every rank for an engine that keeps its weights in half precision.
    """
    refuse_half_precision(engine)
    main, optimizer, holders = distributed.is_main(), optimizer_of(engine), holders_of(engine)
    tensors, moments = {}, {}
    for holder in holders:
        tensors |= _gather(holder, holder.tensor)
        for key, values in optimizer.state.get(holder.tensor, {}).items():
            if is_moment(values):
                moments |= {f"{name}/{key}": moment for name, moment in _gather(holder, values)}
    scalars = scalars_by_name(holders, optimizer)
    for name, tensor in named_tensors(engine.module):
        if name not in tensors:
            with whole(tensor):
                tensors[name] = on_host(tensor) if main else None
    if not main:
        return None
    tensors = {name: tensors[name] for name, _ in named_tensors(engine.module)}
    return PortableState(tensors, type(optimizer).__name__, moments, scalars, loss_scale_of(engine))


def loss_scale_of(engine) -> dict[str, Number] | None:
    scaler = engine.torch_autocast_z0_gradscaler
    return scaler.state_dict() if scaler else None


def on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _gather(holder: Holder, values: Tensor) -> Iterator[tuple[str, Tensor | None]]:
    """(name, full tensor on rank 0 or None) of every member, out of `values` in the holder's layout."""
    if not holder.partitioned:
        for name in holder.members:
            yield name, on_host(values) if distributed.is_main() else None
        return
    rows = _gather_rows(values.detach())
    for name, shape in holder.members.items():
        if rows is None:
            yield name, None
            continue
        whole = torch.empty(shape.numel(), dtype=values.dtype)
        for rank, row in enumerate(rows):
            a, b, c = holder.span(name, rank)
            whole[a:b] = row[c : c + b - a]
        yield name, whole.view(shape)


def _gather_rows(values: Tensor) -> Tensor | None:
    """Each rank's flat `values` (n,) as the rows of (ranks, n) in rank 0's host memory."""
    ranks, main = distributed.world_size(), distributed.is_main()
    if ranks == 1:
        return on_host(values)[None]
    rows = torch.empty(ranks, len(values), dtype=values.dtype) if main else None
    start = 0
    for piece in values.split(max(_GATHERED_AT_ONCE // ranks, 1)):
        pieces = [torch.empty_like(piece) for _ in range(ranks)] if main else None
        dist.gather(piece.contiguous(), pieces, dst=0)
        if main:
            for row, received in zip(rows, pieces, strict=True):
                row[start : start + len(piece)] = received
        start += len(piece)
    return rows
