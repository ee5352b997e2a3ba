"""What a comparison says, in words and written-out numbers."""

import re
from dataclasses import dataclass

from evaluators.comparison import Comparison, Entry
from evaluators.results import TITLES

NAMES = {"knn": "k-NN", "ncm": "nearest class mean", "fewshot": "few-shot", "multilabel": "multi-label"}
ABOUT = {
    "linear_probe": "A linear head on frozen features, trained to its optimum; weight decay and kind of feature chosen "
    "on a held-out tenth of the train images.",
    "knn": "Weighted vote of the nearest train images by cosine of centred frozen features; nothing is trained.",
    "ncm": "The class whose mean frozen feature is nearest; nothing is trained.",
    "fewshot": "A linear head on the frozen features of a few labelled images, mean over several draws, the same for "
    "every encoder.",
    "multilabel": "A sigmoid head on frozen features for each finding; unknown labels left out.",
    "anomaly": "Mahalanobis distance to a Gaussian of one class' frozen features; each class is normal in turn.",
    "finetune": "All weights trained on the labels, from the pretrained ones.",
}
Z95 = 1.96  # standard errors on each side of a number, for 95 %


@dataclass(frozen=True)
class Headline:
    """An evaluator's first number of one encoder, in percent."""

    number: str  # its key among the result's numbers
    value: float
    se: float | None
    low: float  # ends of the 95 % interval
    high: float
    text: str  # 63.1 ± 0.7, or 63.1 [61.7, 64.4]
    spread: float | None = None  # standard deviation over seeds or draws


def headline(entry: Entry, evaluator: str) -> Headline | None:
    """None where the encoder has no such result."""
    numbers = (entry.results.get(evaluator) or {}).get("numbers")
    if not numbers:
        return None
    name = _headline_name(evaluator, list(numbers))
    return number(name, numbers[name])


def number(name: str, found: dict) -> Headline:
    """found: a number as results hold it: value, and se, interval and spread where known."""
    value, se, interval = found["value"], found.get("se"), found.get("interval")
    low, high = interval or (value - Z95 * (se or 0), value + Z95 * (se or 0))
    text = f"{value:.1f}"
    if interval:
        text += f" [{low:.1f}, {high:.1f}]"
    elif se is not None:
        text += f" ± {se:.1f}"
    return Headline(name, value, se, low, high, text, found.get("spread"))


def gain(entry: Entry, evaluator: str, comparison: Comparison) -> float | None:
    """Points over the same architecture untrained."""
    before = next((other for other in comparison.entries if other.name == entry.untrained), None)
    mine, theirs = headline(entry, evaluator), before and headline(before, evaluator)
    return mine.value - theirs.value if mine and theirs else None


def pretrained(comparison: Comparison) -> list[Entry]:
    return [entry for entry in comparison.entries if entry.kind == "pretrained"]


def best(comparison: Comparison, evaluator: str) -> Entry | None:
    """The pretrained encoder with the highest headline."""
    found = [entry for entry in pretrained(comparison) if headline(entry, evaluator)]
    return max(found, key=lambda entry: headline(entry, evaluator).value, default=None)


def evaluator_name(evaluator: str) -> str:
    return NAMES.get(evaluator, evaluator.replace("_", " "))


def number_name(evaluator: str, key: str) -> str:
    """What a number is, with its unit: top-1 %, macro AUC %, 10 a class."""
    if evaluator == "fewshot":
        return f"{key} labelled, top-1 %" if key.endswith("%") else f"{key}, top-1 %"
    return TITLES.get(key, key)


def summary(comparison: Comparison) -> str:
    """A paragraph: for each evaluator which pretrained encoder is best, by how much, and whether that is settled."""
    count = len([entry for entry in pretrained(comparison) if entry.results])
    sentences = [f"{count} pretrained encoder{'' if count == 1 else 's'} on the same images."]
    return " ".join(sentences + [_verdict(comparison, evaluator) for evaluator in comparison.evaluators])


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def size(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:.1f} GiB"


def count(value: float) -> str:
    """1234567 as 1.23 M."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:g}"


def _verdict(comparison: Comparison, evaluator: str) -> str:
    name, first = evaluator_name(evaluator), best(comparison, evaluator)
    if first is None:
        return f"By {name} there is no result."
    mine, over = headline(first, evaluator), gain(first, evaluator, comparison)
    beyond = "" if over is None else f", {abs(over):.1f} points {'over' if over >= 0 else 'under'} its untrained self"
    others = [(entry, headline(entry, evaluator)) for entry in pretrained(comparison) if entry is not first]
    others = sorted(((e, h) for e, h in others if h), key=lambda pair: -pair[1].value)
    text = f"By {name}, {first.name} {'is best' if others else 'reaches'}{' with' if others else ''} "
    text += f"{mine.value:.1f} %{beyond}"
    overlapping = [entry.name for entry, theirs in others if theirs.high >= mine.low]
    if overlapping:
        text += f"; its 95 % interval overlaps with that of {_listed(overlapping)}, so their order is not settled"
    elif others:
        text += f", and {mine.value - others[0][1].value:.1f} ahead of {others[0][0].name}, the next"
    ahead = [e for e in comparison.entries if e.kind == "floor" and (h := headline(e, evaluator)) and h.value >= mine.value]
    if ahead:
        text += f"; not better than {_listed([entry.name for entry in ahead])}"
    return text + "."


def _headline_name(evaluator: str, names: list[str]) -> str:
    """The first; of few-shot the largest number of images a class, since single images are mostly luck."""
    if evaluator != "fewshot":
        return names[0]
    amounts = {int(match[1]): name for name in names if (match := re.fullmatch(r"(\d+) a class", name))}
    return amounts[max(amounts)] if amounts else names[-1]


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
