"""What each rank writes of a state, so that none holds the whole: pieces of flattened tensors.

- A rank writes what it holds: its partition of weights and moments under ZeRO 1 to 3.
- What all ranks hold alike (everything at stage 0, a frozen teacher) is cut between them evenly by bytes.
- Buffers are rank 0's, as in `portable`: those of batch norm may differ between ranks.
- Every element of every tensor is in exactly one piece. No rank sends a tensor to another.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prelude.checkpoints.state.holders import (
    holders_of,
    named_tensors,
    optimizer_of,
    shape_of,
    sharded_part,
    sharded_span,
)
from prelude.checkpoints.state.inventory import Pieces, Spec
from prelude.checkpoints.state.misfits import refuse_half_precision
from prelude.checkpoints.state.portable import loss_scale_of, on_host
from prelude.checkpoints.state.scalars import Number, is_moment, scalars_by_name
from prelude.pretrain import distributed

Span = Callable[[int], tuple[int, int, int]]  # of a rank, as `Holder.span`


@dataclass
class Source:
    """A tensor of the state, what this rank has of it, and which rank writes what."""

    content: str  # "model" or "optimizer"
    name: str
    spec: Spec
    values: Tensor
    span: Span | None = None  # None: all ranks have it alike
    equal: int = 0  # elements of each rank's piece, where all but the last are equal

    @property
    def size(self) -> int:
        return self.spec.shape.numel()


@dataclass
class Part:
    """One rank's part of a state, on the CPU. What all ranks know of the whole is rank 0's to write."""

    tensors: dict[str, dict[str, Tensor]]  # content -> name -> flattened piece
    sources: list[Source]  # without their values
    optimizer: str
    scalars: dict[str, dict[str, Number | dict]] = field(default_factory=dict)
    loss_scaler: dict[str, Number] | None = None

    def laid(self, ranks: int) -> dict[str, dict[str, tuple[Spec, Pieces]]]:
        """content -> name -> the tensor, and its pieces."""
        found = {"model": {}, "optimizer": {}}
        for source in self.sources:
            spans = () if source.equal else ((rank, *source.span(rank)[:2]) for rank in range(ranks))
            pieces = source.equal or [piece for piece in spans if piece[1] < piece[2]]
            found[source.content][source.name] = (source.spec, pieces)
        return found


def part_of(engine) -> Part:
    """This rank's part, copied. To be called on all ranks, between optimizer steps; nothing is sent.

    Raises UserError on every rank for an engine that keeps its weights in half precision.
    """
    refuse_half_precision(engine)
    rank, optimizer, holders = distributed.rank(), optimizer_of(engine), holders_of(engine)
    sources = list(_sources(engine, holders, optimizer))
    _cut_evenly([source for source in sources if source.span is None], distributed.world_size())
    tensors: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for source in sources:
        a, b, c = source.span(rank)
        if a < b:
            tensors[source.content][source.name] = on_host(source.values.detach().reshape(-1)[c : c + b - a])
        source.values = None
    scalars = scalars_by_name(holders, optimizer)
    return Part(tensors, sources, type(optimizer).__name__, scalars, loss_scale_of(engine))


def _sources(engine, holders, optimizer: torch.optim.Optimizer) -> Iterator[Source]:
    """In an order that is the same on all ranks."""
    held = set()
    for holder in holders:
        moments = {key: v for key, v in optimizer.state.get(holder.tensor, {}).items() if is_moment(v)}
        for name, shape in holder.members.items():
            held.add(name)
            span = (lambda rank, h=holder, n=name: h.span(n, rank)) if holder.partitioned else None
            equal = holder.equal.get(name, 0)
            yield Source("model", name, Spec(shape, holder.tensor.dtype), holder.tensor, span, equal)
            for key, values in moments.items():
                spec = Spec(shape if holder.partitioned else values.shape, values.dtype)
                yield Source("optimizer", f"{name}/{key}", spec, values, span, equal)
    parameters = dict(engine.module.named_parameters())
    for name, tensor in named_tensors(engine.module):
        if name in held:
            continue
        spec = Spec(shape_of(tensor), tensor.dtype)
        if hasattr(tensor, "ds_id"):
            yield Source("model", name, spec, sharded_part(tensor), sharded_span(tensor), tensor.partition_numel())
        elif name in parameters:
            yield Source("model", name, spec, tensor)
        else:
            yield Source("model", name, spec, tensor, _first_rank(spec.shape.numel()))


def _first_rank(size: int) -> Span:
    return lambda rank: (0, size if rank == 0 else 0, 0)


def _cut_evenly(sources: list[Source], ranks: int) -> None:
    """Laid one after another, each rank's share of their bytes is one stretch."""
    whole, at = sum(source.size * source.spec.dtype.itemsize for source in sources), 0
    for source in sources:
        source.span = _share(at, source.size, source.spec.dtype.itemsize, whole, ranks)
        at += source.size * source.spec.dtype.itemsize


def _share(at: int, size: int, itemsize: int, whole: int, ranks: int) -> Span:
    def first(rank: int) -> int:
        """The first element that lies at or after the bytes of this rank begin."""
        return min(max(-(-(rank * whole // ranks - at) // itemsize), 0), size)

    def span(rank: int) -> tuple[int, int, int]:
        a, b = first(rank), size if rank == ranks - 1 else first(rank + 1)
        return a, b, a

    return span
