"""What keeps a GPU busy in a step, and for how much of it: by the kernels of a profile."""

import re
import time

import torch
from torch.profiler import ProfilerActivity, profile

from prelude.pretrain.monitors import Monitor, StepRecord

# The first that is found in a kernel's name says what it does.
_KINDS = (
    ("attention", "flash|fmha|attention"),
    ("convolutions", "conv|wgrad|dgrad|fprop|implicit"),
    ("products", "gemm|nvjet|cutlass|splitk"),
    ("norms", "norm|bn_"),
    ("optimizer", "adam|multi_tensor|foreach"),
    ("reductions", "reduce|softmax"),
    ("one by one", "elementwise|vectorized|triton|copy|cat|memcpy|memset|index|gather|scatter"),
)


class KernelTimes(Monitor):
    """Profiles the steps of a run from `after` to its end."""

    def __init__(self, after: int):
        self.after = after
        self.on_gpu = torch.cuda.is_available()
        self.profiler = profile(activities=[ProfilerActivity.CUDA if self.on_gpu else ProfilerActivity.CPU])

    def record(self, record: StepRecord) -> None:
        if record.step == self.after:
            self.profiler.start()
            self.started = time.perf_counter()
        elif record.step == record.num_steps:  # a logged step: the host has waited for the device
            self.seconds = time.perf_counter() - self.started
            self.profiler.stop()

    def shares(self) -> dict:
        """`busy`: the share of the time in which some kernel ran, 0..1; `kernels`: of that, what they did."""
        spans = [
            (event.time_range.start, event.time_range.end, event.name)
            for event in self.profiler.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        ]
        if not spans:
            return {}
        busy, until = 0.0, float("-inf")
        by_kind: dict[str, float] = {}
        for start, end, name in sorted(spans):
            busy += max(0.0, end - max(start, until))
            until = max(until, end)
            kind = next((kind for kind, words in _KINDS if re.search(words, name, re.IGNORECASE)), "others")
            by_kind[kind] = by_kind.get(kind, 0.0) + end - start
        total = sum(by_kind.values())
        shares = sorted(by_kind.items(), key=lambda item: -item[1])
        return {
            "busy": busy / 1e6 / self.seconds,
            "kernels": ", ".join(f"{kind} {spent / total:.0%}" for kind, spent in shares),
        }
