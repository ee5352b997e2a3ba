"""What a comparison says, in words and written-out numbers."""

from datetime import datetime

from prelude.data.counting import listed
from prelude.evaluators.comparing.comparison import Comparison, Entry
from prelude.evaluators.comparing.headline import best, evaluator_name, gain, headline, pretrained
from prelude.evaluators.comparing.paired import pair
from prelude.evaluators.comparing.retention import SIDES, changes, evaluators_of, gone_on

ABOUT = {
    "linear_probe": "A linear head on frozen features, trained to its optimum; weight decay and kind of feature chosen "
    "on a held-out tenth of the train images.",
    "knn": "Weighted vote of the nearest train images by cosine of centred frozen features; nothing is trained.",
    "ncm": "The class whose mean frozen feature is nearest; nothing is trained.",
    "fewshot": "A linear head on the frozen features of a few labelled images, mean over several draws, the same for "
    "every encoder.",
    "multilabel": "A sigmoid head on frozen features for each finding; unknown labels left out.",
    "anomaly": "Mahalanobis distance to a Gaussian of one class' frozen features; each class is normal in turn.",
    "fine_tune": "All weights trained on the labels, from the pretrained ones.",
}


def summary(comparison: Comparison) -> str:
    """A paragraph: which pretrained encoder is best by which evaluator, by how much, and whether that is settled."""
    leads: dict[str, list[str]] = {}  # what each leader is best by
    rivals: dict[str, list[str]] = {}  # by what another is not told apart from the leader
    beaten: list[str] = []  # by what a floor is no worse
    for evaluator in comparison.evaluators:
        first, name = best(comparison, evaluator), evaluator_name(evaluator)
        if first is None:
            continue
        mine, over = headline(first, evaluator), gain(first, evaluator, comparison)
        gained = "" if over is None else f", {over:+.1f}{'' if leads else ' over its untrained self'}".replace("-", "−")
        leads.setdefault(first.name, []).append(f"{name} ({mine.value:.1f} %{gained})")
        for other in comparison.entries:
            theirs = headline(other, evaluator)
            if theirs and other.kind == "floor" and theirs.value >= mine.value:
                beaten.append(f"{other.name} is no worse by {name} ({theirs.value:.1f} %)")
            elif theirs and other.kind == "pretrained" and other is not first and _close(first, other, evaluator):
                rivals.setdefault(other.name, []).append(f"{name}, {theirs.value:.1f} %")
    if not leads:
        return "No pretrained encoder has a result."
    compared = [entry for entry in pretrained(comparison) if entry.results]
    verb = "is best by" if len(compared) > 1 else "was judged by"
    of = f"Of {len(compared)} pretrained encoders, " if len(compared) > 1 else ""
    text = of + "; ".join(f"{name} {verb} {listed(by)}" for name, by in leads.items()) + "."
    if rivals:
        close = [f"{name} ({'; '.join(by)})" for name, by in rivals.items()]
        text += f" The leader is not told apart from {listed(close)}, so their order is not settled."
    elif len(compared) > 1:
        text += " Every leader is told apart from all others on these test images."
    return text + "".join(f" The floor {each}." for each in beaten) + _gone_on(comparison)


def _close(first: Entry, other: Entry, evaluator: str) -> bool:
    """Whether the two are not told apart: by a paired test where there is one, else as their intervals overlap."""
    found = pair(first, other, evaluator)
    return not found.told_apart if found else headline(other, evaluator).high >= headline(first, evaluator).low


def _gone_on(comparison: Comparison) -> str:
    """A sentence for each that has gone on from weights: what was won on the new images, what was lost on the old."""
    sentences = []
    for entry in gone_on(comparison):
        told = {
            side: [
                f"{change.points:+.1f}".replace("-", "−") + f" by {evaluator_name(evaluator)} ({change.verdict})"
                for evaluator in evaluators_of(comparison, side)
                if (change := changes(comparison, [entry.name], side, evaluator)[0])
            ]
            for side in SIDES
        }
        parts = [f"{listed(found)} on the {side} images" for side, found in told.items() if found]
        if parts:
            sentences.append(f" From {entry.started} to {entry.name}: {', and '.join(parts)}.")
    return "".join(sentences)


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def moment(date: str) -> str:
    """ISO 8601 to 2026-11-21 19:40 UTC; what is no such date stays as it is."""
    try:
        parsed = datetime.fromisoformat(date)
    except ValueError:
        return date
    zone = parsed.tzname() or ""
    return f"{parsed:%Y-%m-%d %H:%M} {zone}".strip()


def count(value: float) -> str:
    """1234567 as 1.23 M."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:g}"
