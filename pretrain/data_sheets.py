"""What known devices can do, by their data sheets. Imports no torch: help and completion name them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    name: str  # as a person writes it
    known_as: str  # words of what torch calls it; an L40 is no L4
    bf16: float  # TFLOP/s; 0 where it has no such units
    fp16: float
    fp32: float
    gib: float


# The first whose name fits is meant, so that H100 PCIe comes before H100.
KNOWN = (
    Device("b200", "B200", 2250, 2250, 75, 180),
    Device("h200", "H200", 989, 989, 67, 141),
    Device("h100-pcie", "H100 PCIe", 756, 756, 51, 80),
    Device("h100", "H100", 989, 989, 67, 80),
    Device("a100-40", "A100-SXM4-40GB", 312, 312, 19.5, 40),
    Device("a100", "A100", 312, 312, 19.5, 80),
    Device("a40", "A40", 150, 150, 37.4, 48),
    Device("a10", "A10", 125, 125, 31.2, 24),
    Device("l40s", "L40S", 362, 362, 91.6, 48),
    Device("l4", "L4", 121, 121, 30.3, 24),
    Device("rtx4090", "RTX 4090", 165, 165, 82.6, 24),
    Device("rtx3090", "RTX 3090", 71, 71, 35.6, 24),
    Device("v100", "V100", 0, 125, 15.7, 32),
    Device("t4", "T4", 0, 65, 8.1, 16),
)
