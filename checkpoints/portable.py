"""Training state that knows parameters by name: full tensors, whatever ZeRO stage and number of ranks hold them.

- Gathering and scattering change no bit of a weight, a frozen teacher, a buffer or an optimizer moment.
- A state gathered at one stage and world size is taken up at any other.
- Weights are the values that the optimizer steps (ZeRO's master copies), not their images in the model.
- Only rank 0 ever holds the whole state, in host memory; the others see one tensor at a time.
- Buffers are rank 0's, and equal on all ranks after a scatter.

Works on an engine of `deepspeed.initialize(model=..., optimizer=a torch optimizer)` with float32 parameters,
bf16 and fp16 being autocast formats. What it reads of DeepSpeed's insides is confined to `_holders`.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prelude.data.errors import UserError
from prelude.pretrain import distributed

Number = bool | int | float | None
# timm's LAMB counts its steps in the parameter group instead of in each parameter's state.
_GROUP_COUNTERS = ("step",)
_IN_GROUP = "group."
# Elements on rank 0's device while a partition is gathered: saving must not need memory that training did not.
_GATHERED_AT_ONCE = 2**24


@dataclass
class PortableState:
    """All that a run needs to go on, on the CPU; tensors have the shapes that the model gives them.

    A scalar of the optimizer is a Python number, or `{"value": number, "dtype": name}` where it is kept in a
    tensor without dimensions; a count that belongs to the parameter group has `group.` before its name.
    """

    tensors: dict[str, Tensor]  # parameters, trained and frozen, and persistent buffers
    optimizer: str  # class name of the optimizer that the moments belong to
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # parameter name -> state name -> tensor
    scalars: dict[str, dict[str, Number | dict]] = field(default_factory=dict)
    loss_scaler: dict[str, Number] | None = None  # of fp16


def gather_state(engine) -> PortableState | None:
    """The whole state of `engine` on rank 0, None elsewhere. Collective; call it between optimizer steps.

    Raises UserError on every rank for an engine that keeps its weights in half precision.
    """
    _refuse_half_precision(engine)
    main = distributed.is_main()
    holders = _holders(engine)
    tensors, moments, scalars = {}, {}, {}
    for holder in holders:
        for name, weight in _gather(holder, holder.tensor):
            tensors[name] = weight
        held = _optimizer(engine).state.get(holder.tensor, {})
        for key in (key for key, value in held.items() if _is_moment(value)):
            for name, moment in _gather(holder, held[key]):
                moments.setdefault(name, {})[key] = moment
        scalars |= dict.fromkeys(holder.members, _scalars_of(held, holder.group))
    for name, tensor in _named_tensors(engine.module):
        if name not in tensors:
            with _whole(tensor):
                tensors[name] = _on_host(tensor) if main else None
    if not main:
        return None
    scaler = engine.torch_autocast_z0_gradscaler
    return PortableState(
        tensors={name: tensors[name] for name, _ in _named_tensors(engine.module)},
        optimizer=type(_optimizer(engine)).__name__,
        moments=moments,
        scalars={name: values for name, values in scalars.items() if values},
        loss_scaler=scaler.state_dict() if scaler else None,
    )


@torch.no_grad()
def scatter_state(engine, state: PortableState | None) -> None:
    """Puts rank 0's `state` into `engine` on every rank. Collective; ranks other than 0 pass None.

    Raises UserError on every rank, before anything is changed, when the state does not fit the engine.
    """
    _refuse_half_precision(engine)
    main = distributed.is_main()
    refusal = distributed.from_main(_misfit(engine, state) if main else None)
    if refusal:
        raise UserError(refusal)
    holders = _holders(engine)
    plan = distributed.from_main(_plan(state) if main else None)
    holder_of = {name: holder for holder in holders for name in holder.members}
    for name, tensor in _named_tensors(engine.module):
        value = _broadcast(state.tensors[name] if main else None, _shape(tensor), tensor.dtype, engine.device)
        _write(tensor, value)
        if name in holder_of:
            holder_of[name].put(holder_of[name].tensor, name, value)
    optimizer = _optimizer(engine)
    for holder in holders:
        optimizer.state.pop(holder.tensor, None)
        held = _restored_scalars(plan["scalars"].get(next(iter(holder.members)), {}), holder)
        for name in holder.members:
            for key, (shape, dtype) in plan["moments"].get(name, {}).items():
                value = _broadcast(state.moments[name][key] if main else None, shape, dtype, engine.device)
                if key not in held:
                    held[key] = _empty_moment(holder, value)
                holder.put(held[key], name, value)
        if held:
            optimizer.state[holder.tensor] = held
    if engine.zero_optimization_stage() in (1, 2):
        # DeepSpeed keeps views of the moments that were just replaced; it takes new ones after the next step.
        engine.optimizer._hp_optimizer_states_linked = False
    if plan["loss_scaler"] and engine.torch_autocast_z0_gradscaler:
        engine.torch_autocast_z0_gradscaler.load_state_dict(plan["loss_scaler"])


# ---- where an engine keeps what its optimizer steps


@dataclass
class _Holder:
    """One tensor that the optimizer steps, and the parameters whose values lie in it.

    `members[name]` is the parameter's shape; `span(name, rank)` is (a, b, c): the flattened parameter's elements
    a to b lie at c and after in the holder of that rank.
    """

    tensor: Tensor
    group: dict
    members: dict[str, torch.Size]
    span: Callable[[str, int], tuple[int, int, int]]
    partitioned: bool

    def put(self, target: Tensor, name: str, value: Tensor) -> None:
        """Copies this rank's part of a full `value` into `target`, which has the holder's layout."""
        if not self.partitioned:
            target.copy_(value)
            return
        a, b, c = self.span(name, distributed.rank())
        target[c : c + b - a].copy_(value.reshape(-1)[a:b])


def _holders(engine) -> list[_Holder]:
    """In an order that is the same on all ranks."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return list(_whole_holders(engine.optimizer, names))
    return list(_flat_holders(engine.optimizer, names) if stage < 3 else _sharded_holders(engine.optimizer, names))


def _whole_holders(optimizer, names: dict[Tensor, str]) -> Iterator[_Holder]:
    """Stage 0: the optimizer steps the parameters themselves, on every rank alike."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            size = parameter.numel()
            members = {names[parameter]: parameter.shape}
            yield _Holder(parameter, group, members, lambda name, rank, size=size: (0, size, 0), partitioned=False)


def _flat_holders(zero, names: dict[Tensor, str]) -> Iterator[_Holder]:
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

        yield _Holder(partition, zero.optimizer.param_groups[index], members, span, partitioned=True)


def _sharded_holders(zero, names: dict[Tensor, str]) -> Iterator[_Holder]:
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
        yield _Holder(flat, group, members, span, partitioned=True)


def _optimizer(engine) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer


# ---- moving tensors


def _gather(holder: _Holder, values: Tensor) -> Iterator[tuple[str, Tensor | None]]:
    """(name, full tensor on rank 0 or None) of every member, out of `values` in the holder's layout."""
    if not holder.partitioned:
        for name in holder.members:
            yield name, _on_host(values) if distributed.is_main() else None
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
        return _on_host(values)[None]
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


def _broadcast(value: Tensor | None, shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rank 0's `value` on every rank's device."""
    if distributed.is_main():
        received = value.to(device, dtype, copy=True).contiguous()
    else:
        received = torch.empty(shape, dtype=dtype, device=device)
    if distributed.world_size() > 1:
        dist.broadcast(received, src=0)
    return received


def _write(target: Tensor, value: Tensor) -> None:
    with _whole(target, modified=True):
        if not hasattr(target, "ds_id") or distributed.is_main():
            target.data.copy_(value)


def _whole(tensor: Tensor, modified: bool = False):
    """Stage 3 keeps parameters in parts; inside this context `tensor` is whole, and rank 0's changes are kept."""
    if not hasattr(tensor, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor], modifier_rank=0 if modified else None)


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then the buffers that a state_dict holds: the others are recomputed by their modules."""
    yield from module.named_parameters()
    persistent = module.state_dict(keep_vars=True).keys()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in persistent)


def _shape(tensor: Tensor) -> torch.Size:
    return tensor.ds_shape if hasattr(tensor, "ds_id") else tensor.shape


# ---- an optimizer's own state


def _is_moment(value) -> bool:
    return torch.is_tensor(value) and value.ndim > 0


def _scalars_of(held: dict, group: dict) -> dict[str, Number | dict]:
    found = {key: value for key, value in held.items() if not _is_moment(value)}
    found |= {_IN_GROUP + key: group[key] for key in _GROUP_COUNTERS if key in group}
    return {key: _as_number(value) for key, value in found.items()}


def _as_number(value) -> Number | dict:
    if torch.is_tensor(value):
        return {"value": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Number):
        return value
    raise UserError(
        f"The optimizer keeps a {type(value).__name__} that a checkpoint cannot hold; write optimizer.name=adamw."
    )


def _restored_scalars(saved: dict, holder: _Holder) -> dict:
    """The optimizer's scalars as it kept them; counts of the group are put into the group."""
    held = {}
    for key, number in saved.items():
        in_group = key.startswith(_IN_GROUP)
        # As torch's own optimizers do: a step count lives on the host unless a kernel reads it.
        on_device = not in_group and (holder.group.get("fused") or holder.group.get("capturable"))
        value = number
        if isinstance(number, dict):
            dtype = getattr(torch, number["dtype"])
            value = torch.tensor(number["value"], dtype=dtype, device=holder.tensor.device if on_device else "cpu")
        if in_group:
            holder.group[key.removeprefix(_IN_GROUP)] = value
        else:
            held[key] = value
    return held


def _empty_moment(holder: _Holder, value: Tensor) -> Tensor:
    if holder.partitioned or value.shape == holder.tensor.shape:
        return torch.zeros_like(holder.tensor, dtype=value.dtype, requires_grad=False)
    return torch.zeros_like(value)


def _plan(state: PortableState) -> dict:
    """What ranks other than 0 must know to take part in the scatter."""
    moments = {name: {k: (m.shape, m.dtype) for k, m in held.items()} for name, held in state.moments.items()}
    return {"moments": moments, "scalars": state.scalars, "loss_scaler": state.loss_scaler}


# ---- refusals


def _refuse_half_precision(engine) -> None:
    if engine.bfloat16_enabled() or engine.fp16_enabled():
        raise UserError(
            "Checkpoints need float32 weights, which deepspeed.bf16 and deepspeed.fp16 cast away; remove them and "
            "write train.precision=bf16, which computes in bf16 and keeps float32 weights."
        )
    if getattr(engine.optimizer, "torch_autocast_gradscaler", None):
        raise UserError(
            "Under ZeRO each rank has its own fp16 loss scale, which no checkpoint can restore; "
            "write train.precision=bf16, or train.zero_stage=0."
        )


def _misfit(engine, state: PortableState) -> str | None:
    """Why `state` cannot be put into `engine`, in one sentence."""
    shapes = {name: tuple(_shape(tensor)) for name, tensor in _named_tensors(engine.module)}
    saved = {name: tuple(tensor.shape) for name, tensor in state.tensors.items()}
    differing = [f"{n} {saved[n]} against {shapes[n]}" for n in shapes if n in saved and saved[n] != shapes[n]]
    parts = [
        ("it lacks", [name for name in shapes if name not in saved]),
        ("this model lacks", [name for name in saved if name not in shapes]),
        ("shapes differ (saved against this model)", differing),
    ]
    if any(names for _, names in parts):
        what = "; ".join(f"{label}: {_listed(names)}" for label, names in parts if names)
        return f"The checkpoint belongs to another model: {what}; build the model that it was saved from."
    name = type(_optimizer(engine)).__name__
    if state.optimizer != name and state.moments:
        return f"The checkpoint holds the state of {state.optimizer}, this run uses {name}; keep optimizer.name."
    return _optimizer_misfit(_holders(engine), state)


def _optimizer_misfit(holders: list[_Holder], state: PortableState) -> str | None:
    trained = {name for holder in holders for name in holder.members}
    if strangers := [name for name in state.moments if name not in trained]:
        return f"The checkpoint trained parameters that are frozen here: {_listed(strangers)}; train the same ones."
    for holder in (holder for holder in holders if holder.partitioned):
        # What all members of a holder share is kept once there, so they have to agree.
        described = {name: (_kinds(state, name), state.scalars.get(name)) for name in holder.members}
        first = next(iter(described.values()))
        uneven = [name for name, description in described.items() if description != first]
        uneven += [
            name
            for name, shape in holder.members.items()
            if any(moment.shape != shape for moment in state.moments.get(name, {}).values())
        ]
        if uneven:
            return (
                f"The optimizer's state of {_listed(uneven)} differs in kind from that of its neighbours, which "
                f"ZeRO cannot hold; write train.zero_stage=0."
            )
    return None


def _kinds(state: PortableState, name: str) -> dict[str, torch.dtype]:
    return {key: moment.dtype for key, moment in state.moments.get(name, {}).items()}


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
