"""The number that stands for a result wherever encoders are compared, its uncertainty, and what things are called.

- Of few-shot it is that of `headline_amount`. Of any other evaluator it is the first.
- What a number is given with is its deviation over seeds or draws where there are several, else its 95 % interval
  where it has one, else the standard error of the test sample. The deviation over pretraining seeds stands behind that.
- `low` and `high` are of the mean over these, and know of all of them: seeds that agree say nothing of another test
  sample. Where nothing is known of that (`ranking.FEWEST_DRAWS`), they are infinite, so that nothing is told apart by
  such a number.
- A gain is over the same architecture untrained, by the same kind of feature: the one that the pretrained encoder's
  number is of, whatever kind the untrained encoder chose for its own.
"""

import math
from dataclasses import dataclass, replace

from prelude.evaluators.comparing.comparison import Comparison, Entry
from prelude.evaluators.frozen.fewshot import headline_amount
from prelude.evaluators.results import TITLES, Percent, by_frequency, with_doubt

NAMES = {
    "linear_probe": "linear probe",
    "knn": "k-NN",
    "ncm": "nearest class mean",
    "fewshot": "few labels",
    "multilabel": "several findings",
    "fine_tune": "fine-tuned",
}
Z95 = 1.96  # standard errors on each side of a number, for 95 %


@dataclass(frozen=True)
class Headline:
    """In percent."""

    number: str  # its key among the result's numbers
    value: float
    low: float  # ends of the 95 % interval; over several draws or seeds, of their mean; infinite if not known
    high: float
    text: str  # 63.1 ± 0.7, or 63.1 [61.7, 64.4]
    seeds: str = ""  # seeds ± 1.2: the deviation over pretrainings, where there are several
    kind: str = ""  # of feature; where draws or seeds differ, the one chosen most often. "": there is no choice of one

    @property
    def bar(self) -> tuple[float, float]:
        """The ends of an error bar in a chart: both are the number where the interval is not known."""
        return (self.low, self.high) if math.isfinite(self.high - self.low) else (self.value, self.value)


def headline(entry: Entry, evaluator: str) -> Headline | None:
    """None where the encoder has no such result."""
    numbers = (entry.results.get(evaluator) or {}).get("numbers")
    if not numbers:
        return None
    name = _headline_name(evaluator, list(numbers))
    return replace(number(name, entry.results[evaluator]), kind=_kind(entry.results[evaluator], name))


def number(name: str, result: dict, kind: str | None = None) -> Headline:
    """result: as its file holds it. kind: of feature, by default the one that was chosen. A number has value, and se,
    interval and spread where known; seeds and num_seeds where it is a mean over pretrainings."""
    found = (result["numbers"] if kind is None else result["by_kind"][kind])[name]
    value, se, spread, interval = (found.get(key) for key in ("value", "se", "spread", "interval"))
    half = math.inf if se is None else Z95 * se
    low, high = interval or (value - half, value + half)
    more, seeds = _half_of_mean(spread, _num_draws(result)) if spread else 0.0, ""
    if "seeds" in found:
        seeds = f"seeds ± {found['seeds']:.1f}"
        more = math.hypot(more, _half_of_mean(found["seeds"], found["num_seeds"]))
    low, high = value - math.hypot(value - low, more), value + math.hypot(high - value, more)
    return Headline(name, value, low, high, with_doubt(Percent(value, se, spread, interval)), seeds)


def _half_of_mean(deviation: float, count: int) -> float:
    """Half of the 95 % interval (Student's) of a mean over so many that differ by this deviation."""
    from scipy import stats  # here, as it takes a second that no other command needs

    return float(stats.t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)


def _num_draws(result: dict) -> int:
    """What a spread is over: seeds, whose numbers may themselves be means over draws, or the draws of few labels."""
    recipe = result["recipe"]
    return len(recipe["seeds"]) if "seeds" in recipe else recipe["draws"]


def gain(entry: Entry, evaluator: str, comparison: Comparison) -> float | None:
    """Points over the same architecture untrained, both by the kind of feature of the entry's headline."""
    both = alike(entry, entry_of(entry.untrained, comparison), evaluator)
    return both[0].value - both[1].value if both else None


def untrained_value(entry: Entry, evaluator: str, comparison: Comparison) -> float | None:
    """What the same architecture untrained reaches by the kind of feature of the entry's headline."""
    both = alike(entry, entry_of(entry.untrained, comparison), evaluator)
    return both[1].value if both else None


def alike(entry: Entry, other: Entry | None, evaluator: str) -> tuple[Headline, Headline] | None:
    """The entry's number and the other's, by the kind of feature of the entry's headline; None where there is none."""
    mine, theirs = headline(entry, evaluator), other and headline(other, evaluator)
    if not (mine and theirs):
        return None
    both = [each.results[evaluator].get("by_kind", {}).get(mine.kind, {}).get(mine.number) for each in (entry, other)]
    if None not in both:
        results = (each.results[evaluator] for each in (entry, other))
        first, second = (replace(number(mine.number, result, mine.kind), kind=mine.kind) for result in results)
        return first, second
    return (mine, theirs) if mine.kind == theirs.kind else None


def entry_of(name: str | None, comparison: Comparison) -> Entry | None:
    return next((entry for entry in comparison.entries if entry.name == name), None)


def pretrained(comparison: Comparison) -> list[Entry]:
    return [entry for entry in comparison.entries if entry.kind == "pretrained"]


def best(comparison: Comparison, evaluator: str) -> Entry | None:
    """The pretrained encoder with the highest headline; of equals the first."""
    found = [entry for entry in pretrained(comparison) if headline(entry, evaluator)]
    return max(found, key=lambda entry: headline(entry, evaluator).value, default=None)


def leads(entry: Entry, evaluator: str, comparison: Comparison) -> bool:
    """Whether no pretrained encoder has a higher headline than this one, which is pretrained; of equals all lead."""
    mine = headline(entry, evaluator)
    if entry.kind != "pretrained" or not mine:
        return False
    return mine.value == headline(best(comparison, evaluator), evaluator).value


def evaluator_name(evaluator: str) -> str:
    return NAMES.get(evaluator, evaluator.replace("_", " "))


def number_name(evaluator: str, key: str) -> str:
    """What a number is, with its unit: top-1 %, macro AUC %, 10 a class."""
    if evaluator == "fewshot":
        return f"{key} labelled, top-1 %" if key.endswith("%") else f"{key}, top-1 %"
    return TITLES.get(key, key)


def _kind(result: dict, number: str) -> str:
    draws = result.get("details", {}).get("by_amount", {}).get(number, {}).get("draws")  # of few labels
    if draws and "by_seed" not in result["details"]:
        return by_frequency(draw["features"] for draw in draws).split(", ")[0]
    return result.get("chosen", {}).get("features", "").split(", ")[0]


def _headline_name(evaluator: str, names: list[str]) -> str:
    return headline_amount(names) if evaluator == "fewshot" else names[0]
