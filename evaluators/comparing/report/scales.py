"""From numbers to places in a chart, with round numbers along the axes."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

LOG_FROM = 20.0  # ratio of largest to smallest, from which on only a logarithmic axis shows both


@dataclass(frozen=True)
class Scale:
    """Maps low..high to start..end; `ticks` lie within low..high."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        place = math.log10(value) if self.log else value
        return round(self.start + (place - low) / (high - low) * (self.end - self.start), 2)


def linear(
    values: Sequence[float], start: float, end: float, *, zero: bool = False, tight: bool = False, count: int = 5
) -> Scale:
    """Around all values, and 0 if `zero`: from one round number to another, or, if `tight`, no further than needed."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # a constant, up to the rounding of means, or nothing but zeros
        low, high = (low - abs(low) / 2, high + abs(low) / 2) if low else (0.0, 1.0)
    step = round_step((high - low) / count)
    inner, outer = (math.ceil, math.floor) if tight else (math.floor, math.ceil)
    slack = -1e-9 if tight else 1e-9
    first, last = inner(low / step + slack), outer(high / step - slack)
    ticks = tuple(_rounded(i * step) for i in range(first, last + 1))
    return Scale(low, high, start, end, ticks) if tight else Scale(ticks[0], ticks[-1], start, end, ticks)


def logarithmic(values: Sequence[float], start: float, end: float) -> Scale:
    """All values are above 0. Ticks at powers of ten, and at 2 and 5 times one where these are few."""
    low, high = min(values), max(values)
    if high / low < 1.1:
        low, high = low / 1.1, high * 1.1
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = [float(f"1e{e}") for e in range(first, last + 1)]
    ticks = [d for d in decades if low <= d <= high]
    if len(ticks) < 3:
        ticks = [_rounded(d * m) for d in decades for m in (1, 2, 5) if low <= d * m * (1 + 1e-9) and d * m <= high]
    return Scale(low, high, start, end, tuple(ticks), log=True)


def fitting(values: Sequence[float], start: float, end: float) -> Scale:
    """Logarithmic where the values span a large ratio, else linear."""
    if values and min(values) > 0 and max(values) / min(values) >= LOG_FROM:
        return logarithmic(values, start, end)
    return linear(values, start, end)


def round_step(step: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is no smaller."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def _rounded(tick: float) -> float:
    return float(f"{tick:.12g}")


def texts(ticks: Sequence[float]) -> list[str]:
    """What stands at the ticks of an axis, with the same decimals where they are evenly spaced: 0.05, 20, 12k."""
    found = [_short(tick) for tick in ticks]
    steps = {round(b - a, 9) for a, b in zip(ticks, ticks[1:], strict=False)}
    decimals = max((len(text.partition(".")[2]) for text in found), default=0)
    plain = all(re.fullmatch(r"-?[\d.]+", text) for text in found)
    return [f"{tick:.{decimals}f}" for tick in ticks] if len(steps) == 1 and plain else found


def _short(value: float) -> str:
    for least, factor, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / factor:g}{unit}"
    return f"{value:g}"
