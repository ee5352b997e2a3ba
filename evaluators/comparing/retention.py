"""What going on from weights has won on the new images and lost on the old, beside the encoder that it started from.

- Old and new images are two labelled sets; the evaluators and kinds of feature are the same before and after.
- A change is as sure as both numbers are: the ends of the two 95 % intervals are combined as if the numbers were
  independent. They are of the same test images, so the truth is narrower, and a verdict errs on the side of none.
  Where one of the two intervals is not known, neither is the change's, and there is no verdict.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import hypot, isfinite
from typing import Literal

from prelude.evaluators.comparing.comparison import Comparison, Entry
from prelude.evaluators.comparing.headline import Headline, alike, entry_of

Side = Literal["new", "old"]
SIDES: tuple[Side, ...] = ("new", "old")


@dataclass(frozen=True)
class Change:
    """By one evaluator, in points."""

    before: Headline  # of the untouched encoder, by the kind of feature of `after`
    after: Headline
    low: float  # ends of the change's 95 % interval, infinite if not known
    high: float
    verdict: str  # new: won, lost or level; old: kept, lost or won; either: no verdict

    @property
    def points(self) -> float:
        return self.after.value - self.before.value

    @property
    def text(self) -> str:
        """+3.1 ± 1.2, or +3.1 [2.0, 5.1] where its two sides differ. ± is half of the 95 % interval."""
        down, up = self.points - self.low, self.high - self.points
        if not isfinite(up):
            return f"{self.points:+.1f} ± unknown"
        if round(down, 1) == round(up, 1):
            return f"{self.points:+.1f} ± {up:.1f}"
        return f"{self.points:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def gone_on(comparison: Comparison) -> list[Entry]:
    """Those that started from weights, where that was asked for."""
    return [entry for entry in comparison.entries if entry.started]


def seen(comparison: Comparison, side: Side) -> Comparison:
    """The comparison by the results on one side's images alone."""
    if side == "new":
        return comparison
    entries = [replace(entry, results=entry.kept) for entry in comparison.entries]
    return replace(comparison, entries=entries, evaluators=evaluators_of(comparison, side), data=comparison.old_data)


def evaluators_of(comparison: Comparison, side: Side) -> list[str]:
    if side == "new":
        return comparison.evaluators
    return list(dict.fromkeys(name for entry in comparison.entries for name in entry.kept))


def changes(comparison: Comparison, names: Sequence[str], side: Side, evaluator: str) -> list[Change | None]:
    """For each of the entries named, which have gone on from weights; None where there is nothing to compare."""
    there = seen(comparison, side)
    found = []
    for entry in (entry_of(name, there) for name in names):
        both = alike(entry, entry_of(entry.started, there), evaluator)
        found.append(_change(both[1], both[0], side) if both else None)
    return found


def _change(before: Headline, after: Headline, side: Side) -> Change:
    points = after.value - before.value
    low = points - hypot(after.value - after.low, before.high - before.value)
    high = points + hypot(after.high - after.value, before.value - before.low)
    same = "no verdict" if not isfinite(high) else "level" if side == "new" else "kept"
    return Change(before, after, low, high, "won" if low > 0 else "lost" if high < 0 else same)
