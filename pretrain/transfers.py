"""What crosses between host and device within a step, so that neither waits for the other.

- `to_device`: numbers that the host knows are copied while the device works on what it has.
- `Later`: numbers that only the device knows are read one step later, when they have long been there.

Reading a tensor (`item`, `tolist`, `float`, `if`) makes the host wait until the device has computed it; meanwhile
nothing new is queued, and the device then waits in its turn. Logged steps may do so, others may not; a test counts.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Whole numbers, (n,) int64 on the device."""
    on_host = torch.tensor(values, dtype=torch.int64)
    return on_host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else on_host.to(device)


def on_host(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """In one copy, which waits for the device."""
    values = torch.stack([scalar.double() for scalar in scalars.values()]).tolist() if scalars else []
    return dict(zip(scalars, values, strict=True))


class Later:
    """A scalar of every step, on the host one step later."""

    def __init__(self):
        self._copy: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def push(self, value: Tensor) -> float | None:
        """Takes this step's scalar and returns that of the step before; None where there is none to return."""
        before = self.read()
        if value.is_cuda:
            self._copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._copy.copy_(value.detach(), non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._copy = value.detach().clone()
        return before

    def read(self) -> float | None:
        """The last scalar that was pushed and not read yet, waiting for it where it has not arrived."""
        if self._copy is None:
            return None
        if self._arrived is not None:
            self._arrived.synchronize()
        value, self._copy = float(self._copy.numpy()), None
        return value
