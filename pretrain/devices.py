"""How fast a device multiplies and how much it holds: of known ones by their data sheets, of others by measuring.

Peaks are those of dense products in matrix units, accumulated in float32; fp32 is without
TensorFloat-32, as a run in fp32 is computed. No run reaches its device's peak; MFU, model FLOPs utilisation, says how
near it is.
"""

import os
import re
import time
from dataclasses import dataclass

import torch

from prelude.data.errors import UserError
from prelude.data.host import memory_limit
from prelude.pretrain import launchers
from prelude.pretrain.data_sheets import KNOWN, Device

# Shares of the peak that good code reaches with vision transformers in bf16: an estimate, not a measurement of ours.
USUAL_MFU = (0.22, 0.35)
_USABLE = 0.9  # of a device's memory: the rest is the driver's, and lost between blocks
_LIBRARIES = 0.75 * 2**30  # bytes of Python, torch and DeepSpeed in a rank's memory on a CPU


@dataclass(frozen=True)
class Figures:
    """What a device can do for one rank."""

    peak: float | None  # FLOP/s in the precision of the run; None: nobody has looked
    memory: float  # bytes that a rank can use
    source: str  # where these numbers come from, for a person


def named(name: str, precision: str) -> Figures:
    """By its data sheet. Raises UserError for a device, or a precision, that is not in the table."""
    device = _known(name)
    if device is None:
        raise UserError(f"--device {name} is not known; write one of {', '.join(known.name for known in KNOWN)}.")
    if not getattr(device, precision):
        raise UserError(f"--device {name} has no {precision}; write train.precision=fp16, or fp32.")
    peak = getattr(device, precision)
    return Figures(
        peak * 1e12, device.gib * 2**30 * _USABLE, f"{device.name}'s data sheet ({peak:g} TFLOP/s in {precision})"
    )


def precision_of(name: str) -> str:
    """What `train.precision=auto` takes on a named device."""
    device = _known(name)
    return "bf16" if device is None or device.bf16 else "fp32"


def _known(name: str) -> Device | None:
    return next((device for device in KNOWN if device.name == name.lower()), None)


def here(device: torch.device, precision: str) -> Figures:
    """Of this machine, whose ranks share its memory where it has no accelerator."""
    if device.type != "cuda":
        memory = host_memory() / launchers.local_world_size() - _LIBRARIES
        return Figures(None, memory * _USABLE, "this machine")
    properties = torch.cuda.get_device_properties(device)
    known = next((one for one in KNOWN if _is(one, properties.name)), None)
    peak = getattr(known, precision) * 1e12 if known else 0.0
    source = f"{known.name}'s data sheet" if peak else "this machine"
    return Figures(peak or None, properties.total_memory * _USABLE, source)


def _is(known: Device, name: str) -> bool:
    """name: as torch has it. A variant with words of its own, and a part of a card, are other devices."""
    return bool(re.search(rf"\b{known.known_as}\b(?! (Ti|D|SUPER|NVL|Laptop)\b)", name)) and " MIG " not in name


def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of this device: by its data sheet, or where that is not known of a large product, measured in a tenth of a
    second."""
    return here(device, precision).peak or _measured_peak(device, precision)


def _measured_peak(device: torch.device, precision: str) -> float:
    side = 8192 if device.type == "cuda" else 768
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    generator = torch.Generator(device).manual_seed(0)  # its own: a run's random numbers stay as they are
    factor = torch.rand(side, side, generator=generator, device=device).to(dtype)
    best = float("inf")
    for _ in range(3):
        _wait(device)
        started = time.perf_counter()
        factor @ factor
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_memory() -> float:
    """Bytes of this machine, or of the container that this process is in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = memory_limit()
    return total if limit is None else min(total, limit)
