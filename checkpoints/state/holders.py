"""Where an engine keeps what its optimizer steps, and what else a model's state has: all that checkpoints know of
DeepSpeed's insides.

Works on an engine of `deepspeed.initialize(model=..., optimizer=a torch optimizer)` with float32 parameters,
bf16 and fp16 being autocast formats.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prelude.pretrain import distributed


@dataclass
class Holder:
    """One tensor that the optimizer steps, and the parameters whose values lie in it.

    `members[name]` is the parameter's shape; `span(name, rank)` is (a, b, c): the flattened parameter's elements
    a to b lie at c and after in the holder of that rank.
    """

    tensor: Tensor
    group: dict
    members: dict[str, torch.Size]
    span: Callable[[str, int], tuple[int, int, int]]
    partitioned: bool
    equal: dict[str, int] = field(default_factory=dict)  # of members cut equally: the elements of each rank's part

    def put(self, target: Tensor, name: str, value: Tensor) -> None:
        """Copies this rank's part of a full `value` into `target`, which has the holder's layout."""
        if not self.partitioned:
            target.copy_(value)
            return
        a, b, _ = self.span(name, distributed.rank())
        self.put_part(target, name, value.reshape(-1)[a:b])

    def put_part(self, target: Tensor, name: str, part: Tensor) -> None:
        """The same, of this rank's part alone."""
        a, b, c = self.span(name, distributed.rank())
        target[c : c + b - a].copy_(part)


def holders_of(engine) -> list[Holder]:
    """In an order that is the same on all ranks."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return list(_whole_holders(engine.optimizer, names))
    return list(_flat_holders(engine.optimizer, names) if stage < 3 else _sharded_holders(engine.optimizer, names))


def _whole_holders(optimizer, names: dict[Tensor, str]) -> Iterator[Holder]:
    """Stage 0: the optimizer steps the parameters themselves, on every rank alike."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            size = parameter.numel()
            members = {names[parameter]: parameter.shape}
            yield Holder(parameter, group, members, lambda name, rank, size=size: (0, size, 0), partitioned=False)


def _flat_holders(zero, names: dict[Tensor, str]) -> Iterator[Holder]:
    """Stages 1 and 2: a group's parameters are views of one flat buffer, cut into one equal part a rank.

    The buffer is what the model computes with; each rank's optimizer steps a float32 copy of its part.
    """
    groups = zip(zero.bit16_groups, zero.bit16_groups_flat, zero.single_partition_of_fp32_groups, strict=True)
    for index, (parameters, flat, partition) in enumerate(groups):
        starts = {names[p]: p.storage_offset() - flat.storage_offset() for p in parameters}
        members = {names[p]: p.shape for p in parameters}

        def span(name, rank, starts=starts, members=members, partition=partition):
            length = partition.numel()
            size, start, left = members[name].numel(), starts[name], rank * length
            a = min(max(left - start, 0), size)
            b = max(min(left + length - start, size), a)
            return a, b, max(start - left, 0)

        yield Holder(partition, zero.optimizer.param_groups[index], members, span, partitioned=True)


def _sharded_holders(zero, names: dict[Tensor, str]) -> Iterator[Holder]:
    """Stage 3: each parameter is cut into one equal part a rank, and a rank's parts are laid one after another."""
    for index, (parameters, flat) in enumerate(zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)):
        members = {names[p]: p.ds_shape for p in parameters}
        parts, places, place = {}, {}, 0
        for parameter in parameters:
            name = names[parameter]
            parts[name], places[name] = parameter.partition_numel(), place
            place += parameter.partition_numel()

        def span(name, rank, parts=parts, places=places, members=members):
            size, part = members[name].numel(), parts[name]
            return min(rank * part, size), min((rank + 1) * part, size), places[name]

        group = zero.optimizer.param_groups[zero.sub_group_to_group_id[index]]
        yield Holder(flat, group, members, span, partitioned=True, equal=parts)


def optimizer_of(engine) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then the buffers that a state_dict holds: the others are recomputed by their modules."""
    yield from module.named_parameters()
    persistent = module.state_dict(keep_vars=True).keys()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in persistent)


def shape_of(tensor: Tensor) -> torch.Size:
    return tensor.ds_shape if hasattr(tensor, "ds_id") else tensor.shape


def whole(tensor: Tensor, modified: bool = False):
    """Stage 3 keeps parameters in parts; inside this context `tensor` is whole, and rank 0's changes are kept."""
    if not hasattr(tensor, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor], modifier_rank=0 if modified else None)


def sharded_span(tensor: Tensor) -> Callable[[int], tuple[int, int, int]]:
    """Of a parameter that stage 3 keeps in parts and nobody steps, as `Holder.span` of a rank."""
    size, part = tensor.ds_shape.numel(), tensor.partition_numel()
    return lambda rank: (min(rank * part, size), min((rank + 1) * part, size), 0)


def sharded_part(tensor: Tensor) -> Tensor:
    """What this rank has of such a parameter, as `whole` would have it: one that is whole now is not read in parts."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if tensor.ds_status != ZeroParamStatus.AVAILABLE:
        return tensor.ds_tensor
    a, b, _ = sharded_span(tensor)(distributed.rank())
    return tensor.data.reshape(-1)[a:b]
