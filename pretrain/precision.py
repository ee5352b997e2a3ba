"""Which number format a run computes in, and how DeepSpeed is told.

Weights and optimizer state stay float32; bf16 and fp16 are autocast formats. Gradients are reduced in
float32 too: left alone, DeepSpeed would reduce those of linear layers in the lower precision.
"""

from pathlib import Path

import torch

from prelude.data.errors import UserError
from prelude.pretrain.config import Config


def resolve(config: Config, device: torch.device) -> str:
    """`bf16`, `fp16` or `fp32`; `auto` takes bf16 where the hardware multiplies it natively."""
    wanted = config.train.precision
    if wanted == "auto":
        return "bf16" if fast_bf16(device) else "fp32"
    if wanted == "fp16" and config.train.zero_stage > 0:
        raise UserError(
            f"train.precision=fp16 needs one loss scale for all gradients, which DeepSpeed does not keep at ZeRO "
            f"stage {config.train.zero_stage}; write train.precision=bf16, or train.zero_stage=0."
        )
    return wanted


def fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Without AMX a CPU emulates bf16 products, many times slower than float32.
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "amx_bf16" in cpuinfo.read_text()


def autocast_section(precision: str) -> dict:
    if precision == "fp32":
        return {"enabled": False}
    dtype = {"bf16": "bfloat16", "fp16": "float16"}[precision]
    return {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
