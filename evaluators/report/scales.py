"""From numbers to places in a chart, with round numbers along the axes."""

import math
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


def linear(values: Sequence[float], start: float, end: float, *, zero: bool = False, count: int = 5) -> Scale:
    """From a round number to a round number around all values; from or to 0 if `zero`."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:  # a constant, or nothing but zeros
        margin = abs(low) / 2 or 0.5
        low, high = (low, high + 2 * margin) if zero else (low - margin, high + margin)
    step = round_step((high - low) / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(i * step, 12) for i in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], start, end, ticks)


def logarithmic(values: Sequence[float], start: float, end: float) -> Scale:
    """All values are above 0. Ticks at powers of ten, and at 2 and 5 times one where these are few."""
    low, high = min(values), max(values)
    if high / low < 1.1:
        low, high = low / 1.1, high * 1.1
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = [float(f"1e{e}") for e in range(first, last + 1)]
    ticks = [d for d in decades if low <= d <= high]
    if len(ticks) < 3:
        ticks = [round(d * m, 12) for d in decades for m in (1, 2, 5) if low <= d * m * (1 + 1e-9) and d * m <= high]
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


def short(value: float) -> str:
    """A tick's text: 0.05, 20, 12k, 3M."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= factor:
            return f"{value / (1e3 if unit == 'k' else factor):g}{unit}"
    return f"{value:g}"
