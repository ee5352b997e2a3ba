"""Counts what would make a host wait for an accelerator, on a machine that has none.

Reading a tensor's value waits for whatever computes it: `item`, `float`, `bool`, `tolist`, `equal`, `nonzero`, a mask
as an index. So does a copy to the host, and one from ordinary host memory. Not counted: `Tensor.numpy`, which a tensor
on a device refuses, so that it reads what the host knows anyway; and timm's LAMB, whose step count is on the host.

While it counts, `is_counting` says so to code that may take a shorter way where the host computes (see
`pretrain.photometric`), and which then takes that of a device.
"""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "_unique2", "masked_select", "bincount"}


class _State:
    counting = False


def is_counting() -> bool:
    return _State.counting


class _Reads(TorchDispatchMode):
    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if (name in _READS or masks) and "lamb.py" not in (place := _where()):
            self.found.append(f"{name} at {place}")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def counting_waits() -> Iterator[list[str]]:
    """What made the host wait inside the block: one line each, with the place in the code."""
    found: list[str] = []
    replaced = [
        (torch, "tensor", lambda args, kwargs: "device" in kwargs),
        (torch, "as_tensor", lambda args, kwargs: "device" in kwargs),
        (torch.Tensor, "new_tensor", lambda args, kwargs: True),
        (torch.Tensor, "tolist", lambda args, kwargs: True),
        (torch.Tensor, "cpu", lambda args, kwargs: True),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, waits in replaced:
            stack.enter_context(_replaced(owner, name, waits, found))
        stack.enter_context(_Reads(found))
        stack.callback(setattr, _State, "counting", _State.counting)
        _State.counting = True
        yield found


@contextlib.contextmanager
def _replaced(owner, name: str, waits, found: list[str]):
    original = getattr(owner, name)

    def counting(*args, **kwargs):
        if waits(args, kwargs):
            found.append(f"{name} at {_where()}")
        return original(*args, **kwargs)

    setattr(owner, name, counting)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _where() -> str:
    """The innermost three places outside of torch."""
    frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename][:-1]
    outside = [frame for frame in frames if not frame.filename == __file__]
    return " < ".join(f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}" for frame in outside[:-4:-1])
