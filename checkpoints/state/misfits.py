"""What keeps a state from being saved, or from being taken up by an engine, in one sentence each."""

from pathlib import Path

import torch

from prelude.checkpoints.state.holders import Holder, holders_of, named_tensors, optimizer_of, shape_of
from prelude.checkpoints.state.inventory import Inventory
from prelude.data.counting import shortened
from prelude.data.errors import UserError, another_folder


def refuse_half_precision(engine) -> None:
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


def misfit(engine, path: str | Path, state: Inventory) -> str | None:
    """Why `state`, which lies at `path`, cannot be put into `engine`, in one sentence."""
    shapes = {name: tuple(shape_of(tensor)) for name, tensor in named_tensors(engine.module)}
    saved = {name: spec.shape for name, spec in state.tensors.items()}
    differing = [f"{n} {saved[n]} against {shapes[n]}" for n in shapes if n in saved and saved[n] != shapes[n]]
    parts = [
        ("it lacks", [name for name in shapes if name not in saved]),
        ("this model lacks", [name for name in saved if name not in shapes]),
        ("shapes differ (saved against this model)", differing),
    ]
    if any(names for _, names in parts):
        what = "; ".join(f"{label}: {shortened(names)}" for label, names in parts if names)
        return (
            f"{path} belongs to another model: {what}; build the model that it was saved from, by the settings and the "
            f"code of then, or write {another_folder()}."
        )
    name = type(optimizer_of(engine)).__name__
    if state.optimizer != name and state.moments:
        return (
            f"{path} holds the state of {state.optimizer}, this run uses {name}; keep optimizer.name, or write "
            f"{another_folder()}."
        )
    return _optimizer_misfit(holders_of(engine), path, state)


def _optimizer_misfit(holders: list[Holder], path: str | Path, state: Inventory) -> str | None:
    trained = {name for holder in holders for name in holder.members}
    if strangers := [name for name in state.moments if name not in trained]:
        return (
            f"{path} trained parameters that are frozen here: {shortened(strangers)}; train the same ones, or write "
            f"{another_folder()}."
        )
    for holder in (holder for holder in holders if holder.partitioned):
        # What all members of a holder share is kept once there, so they have to agree.
        described = {name: (_kinds(state, name), state.scalars.get(name)) for name in holder.members}
        first = next(iter(described.values()))
        uneven = [name for name, description in described.items() if description != first]
        uneven += [
            name
            for name, shape in holder.members.items()
            if any(moment.shape != tuple(shape) for moment in state.moments.get(name, {}).values())
        ]
        if uneven:
            return (
                f"The optimizer's state of {shortened(uneven)} differs in kind from that of its neighbours, which "
                f"ZeRO cannot hold; write train.zero_stage=0."
            )
    return None


def _kinds(state: Inventory, name: str) -> dict[str, torch.dtype]:
    return {key: moment.dtype for key, moment in state.moments.get(name, {}).items()}
