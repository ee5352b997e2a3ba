"""Randomness as a pure function of seeds, the same on every device.

- A draw depends on (seed, stream, index) alone: not on a rank, a worker, a batch's size or the time.
- Integer arithmetic only (the finaliser of SplitMix64), so CPU and GPU agree bit for bit.
- `stream` separates uses (a mask, a colour, a rotation) that read the same seeds.
"""

import hashlib
import math

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MULTIPLY_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MULTIPLY_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """A logical shift: torch shifts int64 arithmetically, so the copied sign bits are cleared."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MULTIPLY_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLY_2
    return x ^ _shift_right(x, 31)


# One operation to torch.compile, which would else fold products of indices and constants without wrapping them.
@torch.library.custom_op("prelude::random_bits", mutates_args=())
def random_bits(seeds: Tensor, count: int, stream: int) -> Tensor:
    """`count` independent 63-bit integers for each seed.

    seeds: (B,) int64. Returns (B, count) int64, each in [0, 2**63).
    """
    index = torch.arange(1, count + 1, dtype=torch.int64, device=seeds.device)
    offset = (_GOLDEN * (2 * stream + 1) + 2**63) % 2**64 - 2**63  # wrapped: Python's integers do not overflow
    start = _mix(seeds + offset)  # (B,)
    return _shift_right(_mix(start[:, None] + index * _GOLDEN), 1)


@random_bits.register_fake
def _shape_of_random_bits(seeds: Tensor, count: int, stream: int) -> Tensor:
    return seeds.new_empty(seeds.shape[0], count)


def uniform(seeds: Tensor, count: int, stream: int) -> Tensor:
    """`count` uniform numbers for each seed. Returns (B, count) float32 in [0, 1), multiples of 2**-24."""
    return (random_bits(seeds, count, stream) >> 39).to(torch.float32) * 2.0**-24


def normal(seeds: Tensor, count: int, stream: int) -> Tensor:
    """`count` numbers from a standard normal distribution for each seed, by Box and Muller's formula. (B, count)
    float32; a CPU and a GPU agree to within rounding."""
    length, angle = uniform(seeds, 2 * -(-count // 2), stream).chunk(2, dim=1)
    radius, angle = (-2 * (1 - length).log()).sqrt(), 2 * math.pi * angle
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]


def reseed(device: torch.device, *numbers: int) -> None:
    """Torch's own generators by all of these numbers, for what draws from them (drop path), so that no generator's
    state is saved."""
    # Hashed: the CPU's generator takes the lower 32 bits of a seed, and leaves the others without a word.
    hashed = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    seed = int.from_bytes(hashed, "little") >> 1
    # torch.manual_seed would look for every other kind of device too, which takes longer than a small layer.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
