"""What an optimizer keeps beside its moments: step counts and the like, as plain numbers in a checkpoint.

A scalar is a Python number, or `{"value": number, "dtype": name}` where it is kept in a tensor without dimensions; a
count that belongs to the parameter group has `group.` before its name.
"""

import torch
from timm.optim import lamb

from prelude.checkpoints.state.holders import Holder
from prelude.data.errors import UserError

Number = bool | int | float | None
# timm's LAMB counts its steps in the parameter group instead of in each parameter's state.
_GROUP_COUNTERS = ("step",)
_IN_GROUP = "group."
_COUNTS_IN_TENSOR = hasattr(lamb, "_init_scalar")  # newer releases of timm; others in a number


def is_moment(value) -> bool:
    return torch.is_tensor(value) and value.ndim > 0


def scalars_by_name(holders: list[Holder], optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Number | dict]]:
    """Of each parameter that has any."""
    found = {}
    for holder in holders:
        if scalars := _scalars_of(optimizer.state.get(holder.tensor, {}), holder.group):
            found |= dict.fromkeys(holder.members, scalars)
    return found


def _scalars_of(held: dict, group: dict) -> dict[str, Number | dict]:
    found = {key: value for key, value in held.items() if not is_moment(value)}
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


def restored_scalars(saved: dict, holder: Holder) -> dict:
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
            holder.group[key.removeprefix(_IN_GROUP)] = torch.tensor(float(value)) if _COUNTS_IN_TENSOR else int(value)
        else:
            held[key] = value
    return held
