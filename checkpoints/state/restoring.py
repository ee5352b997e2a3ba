"""Puts a saved state into an engine, whatever its stage and number of ranks.

- Weights are read by rank 0 and sent tensor by tensor: all ranks compute with them. So is an optimizer's state that
  all ranks keep.
- A partition of the optimizer's state is read by the rank that keeps it, where all ranks see the files.
- No rank has more of the state in host memory than it reads at once.
- Whatever cannot be read ends the restoring on all ranks, so that none waits for ever.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from prelude.checkpoints.state.holders import Holder, holders_of, named_tensors, optimizer_of, whole
from prelude.checkpoints.state.inventory import Inventory, Spec
from prelude.checkpoints.state.misfits import misfit, refuse_half_precision
from prelude.checkpoints.state.scalars import restored_scalars
from prelude.data.errors import UserError
from prelude.pretrain import distributed

_READ_AT_ONCE = 2**28  # bytes, before ranks agree that they could be read


@torch.no_grad()
def restore_state(engine, path: str | Path, inventory: Inventory | None, tensors, moments, shared: bool) -> None:
    """Puts a state into `engine` on every rank. Collective.

    path: of the checkpoint. inventory: what there is, on rank 0. tensors, moments: `TensorFiles`, by name and by
    PARAMETER/NAME; on rank 0, and on all ranks where `shared`. Raises UserError on every rank, before anything is
    changed, where the state does not fit the engine; and where it cannot be read.
    """
    refuse_half_precision(engine)
    refusal = distributed.from_main(misfit(engine, path, inventory) if distributed.is_main() else None)
    if refusal:
        raise UserError(refusal)
    inventory = distributed.from_main(inventory)
    holders = holders_of(engine)
    holder_of = {name: holder for holder in holders for name in holder.members}
    targets = dict(named_tensors(engine.module))
    specs = {name: Spec(inventory.tensors[name].shape, target.dtype) for name, target in targets.items()}
    for name, value in _sent(tensors, specs, engine.device):
        _write(targets[name], value)
        if name in holder_of:
            holder_of[name].put(holder_of[name].tensor, name, value)
    optimizer = optimizer_of(engine)
    for holder in holders:
        optimizer.state.pop(holder.tensor, None)
        held = restored_scalars(inventory.scalars.get(next(iter(holder.members)), {}), holder)
        for name in holder.members:
            for key, spec in inventory.moments.get(name, {}).items():
                if key not in held:
                    held[key] = _empty_moment(holder, spec)
        if held:
            optimizer.state[holder.tensor] = held
    _restore_moments(engine, holders, inventory, moments, shared)
    if engine.zero_optimization_stage() in (1, 2):
        # DeepSpeed keeps views of the moments that were just replaced; it takes new ones after the next step.
        engine.optimizer._hp_optimizer_states_linked = False
    if inventory.loss_scaler and engine.torch_autocast_z0_gradscaler:
        engine.torch_autocast_z0_gradscaler.load_state_dict(inventory.loss_scaler)


def _restore_moments(engine, holders: list[Holder], inventory: Inventory, moments, shared: bool) -> None:
    state = optimizer_of(engine).state
    places = {
        f"{name}/{key}": (holder, name, state[holder.tensor][key], spec)
        for holder in holders
        for name in holder.members
        for key, spec in inventory.moments.get(name, {}).items()
    }

    def read_own() -> None:
        for place, (holder, name, target, _) in own.items():
            a, b, _ = holder.span(name, distributed.rank())
            if a < b:
                holder.put_part(target, name, moments.stretch(place, a, b))

    own = {place: entry for place, entry in places.items() if shared and entry[0].partitioned}
    _read_on_all(read_own)
    specs = {place: spec for place, (*_, spec) in places.items() if place not in own}
    for place, value in _sent(moments, specs, engine.device):
        holder, name, target, _ = places[place]
        holder.put(target, name, value)


def _sent(source: Mapping[str, Tensor] | None, specs: dict[str, Spec], device: torch.device) -> Iterator:
    """(name, tensor on every rank's device) of each, read by rank 0."""
    for names in _batches(specs):
        read = _read_on_all(lambda names=names: [source[name] for name in names] if distributed.is_main() else None)
        for nth, name in enumerate(names):
            yield name, _broadcast(read and read[nth], specs[name], device)


def _batches(specs: dict[str, Spec]) -> list[list[str]]:
    """Names whose tensors are read at once, in order."""
    at, numbered = 0, []
    for name, spec in specs.items():
        numbered.append((at // _READ_AT_ONCE, name))
        at += math.prod(spec.shape) * spec.dtype.itemsize
    return [[name for _, name in batch] for _, batch in groupby(numbered, lambda entry: entry[0])]


def _read_on_all(read: Callable):
    """What `read` returns on this rank. Collective. Raises UserError on all ranks where it failed on any."""
    found, failure = None, ""
    try:
        found = read()
    except (OSError, SafetensorError) as error:
        failure = str(error)
    if any(distributed.total(bool(failure))):
        why = next(filter(None, distributed.of_all(failure)))
        raise UserError(f"The checkpoint cannot be read any more ({why}); see to the disk, and start again.")
    return found


def _broadcast(value: Tensor | None, spec: Spec, device: torch.device) -> Tensor:
    """Rank 0's `value` on every rank's device."""
    if distributed.is_main():
        received = value.to(device, spec.dtype, copy=True).contiguous()
    else:
        received = torch.empty(spec.shape, dtype=spec.dtype, device=device)
    if distributed.world_size() > 1:
        dist.broadcast(received, src=0)
    return received


def _write(target: Tensor, value: Tensor) -> None:
    with whole(target, modified=True):
        if not hasattr(target, "ds_id") or distributed.is_main():
            target.data.copy_(value)


def _empty_moment(holder: Holder, spec: Spec) -> Tensor:
    if holder.partitioned or spec.shape == tuple(holder.tensor.shape):
        return torch.zeros_like(holder.tensor, dtype=spec.dtype, requires_grad=False)
    return torch.zeros(spec.shape, dtype=spec.dtype, device=holder.tensor.device)
