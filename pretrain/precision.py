"""Which number format a run computes in, and how DeepSpeed is told.

Weights and optimizer state stay float32; bf16 and fp16 are autocast formats. Gradients are reduced in
float32 too: left alone, DeepSpeed would reduce those of linear layers in the lower precision.

`auto` takes bf16 where it is faster. A GPU says so by its compute capability. Of a CPU it is measured: whether bf16 is
computed (AVX512-BF16, AMX) or emulated, many times slower, depends on the CPU, on torch's build and on what a virtual
machine lets through. A run that goes on keeps what it began with.
"""

import time
from dataclasses import dataclass

import torch

from prelude.data.errors import UserError
from prelude.pretrain import distributed
from prelude.pretrain.config import Config

# Samples, inputs and outputs of a linear layer: a small one, which shows an emulation at once, and one like a ViT-S's.
_SMALL, _LIKE_VIT_S = (128, 256, 256), (512, 384, 1536)
_ROUNDS = 3
_WORTH_IT = 0.75  # of the time in float32; beside its products a step casts, and is slower by that


@dataclass(frozen=True)
class Precision:
    name: str  # bf16, fp16 or fp32
    why: str = ""  # where it was not asked for

    def __str__(self) -> str:
        return f"{self.name} ({self.why})" if self.why else self.name


def agreed(config: Config, device: torch.device, meta: dict) -> tuple[Precision, str]:
    """What `resolve` says on rank 0, on every rank. Collective. meta: needed on rank 0 alone."""
    _refuse_fp16_above_stage_0(config)
    found, notice = distributed.from_main(resolve(config, device, meta) if distributed.is_main() else None)
    if found.name == "fp32":
        torch.backends.cudnn.allow_tf32 = False  # by default torch's convolutions round what they take to 10 bits
    return found, notice


def resolve(config: Config, device: torch.device, meta: dict) -> tuple[Precision, str]:
    """The precision of a run, and what a person should know of a change; an empty sentence where there is none.

    meta: of the checkpoint that the run goes on from, empty at its beginning. Raises UserError.
    """
    _refuse_fp16_above_stage_0(config)
    wanted, before = config.train.precision, meta.get("precision")
    here = _fastest(device) if wanted == "auto" else Precision(wanted)
    if before in (None, here.name):
        return here, ""
    if wanted == "auto" and before != "fp16" and meta["config"]["train"]["precision"] == "auto":
        return Precision(before, "as the run began"), (
            f"train.precision=auto goes on in {before}, as the run began; here it would choose {here}; write "
            f"train.precision={here.name} to go on in that"
        )
    return here, f"train.precision {before} -> {here.name}: from here on the run is computed in {here}"


def _refuse_fp16_above_stage_0(config: Config) -> None:
    if config.train.precision == "fp16" and config.train.zero_stage > 0:
        raise UserError(
            f"train.precision=fp16 needs one loss scale for all gradients, which DeepSpeed does not keep at ZeRO "
            f"stage {config.train.zero_stage}; write train.precision=bf16, or train.zero_stage=0."
        )


def _fastest(device: torch.device) -> Precision:
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        name = "bf16" if capability >= (8, 0) else "fp32"
        return Precision(name, f"compute capability {capability[0]}.{capability[1]}")
    ratio = product_ratio()
    name = "bf16" if ratio <= _WORTH_IT else "fp32"
    return Precision(name, f"a product in bf16 takes {ratio:.2g} times as long as in fp32")


def product_ratio() -> float:
    """The time of a linear layer under bf16 autocast, forward and backward, in times of float32, on this CPU.

    The time of this thread, so that a busy machine changes little, and the fastest of a few rounds. An emulation is
    told by the small layer alone, for its larger products would take seconds.
    """
    ratio = _ratio(*_SMALL)
    return ratio if ratio > 2 else _ratio(*_LIKE_VIT_S)


def _ratio(samples: int, inputs: int, outputs: int) -> float:
    x = torch.ones(samples, inputs, requires_grad=True)
    weight = torch.ones(outputs, inputs, requires_grad=True)
    seconds = {False: [], True: []}
    for _ in range(1 + _ROUNDS):  # the first round warms up
        for lower, taken in seconds.items():
            start = time.thread_time()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lower):
                out = torch.nn.functional.linear(x, weight)
            torch.autograd.grad(out, (x, weight), torch.ones_like(out))
            taken.append(time.thread_time() - start)
    return min(seconds[True][1:]) / min(seconds[False][1:])


def autocast_section(precision: str) -> dict:
    if precision == "fp32":
        return {"enabled": False}
    dtype = {"bf16": "bfloat16", "fp16": "float16"}[precision]
    return {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
