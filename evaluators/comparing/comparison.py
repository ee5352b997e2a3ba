"""What several encoders are worth side by side: the parts of a comparison, before anybody draws them.

`launch/compare.py` fills one, `evaluators/comparing/report/` makes a page of it.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Curve:
    """Something that was logged while pretraining; a lost or repeated step is not in it."""

    name: str  # loss, or a part of one (feature_std, ...), or an online evaluation (online/knn)
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Cost:
    """What pretraining took; None where the run did not record it."""

    num_images: int  # seen, repeats counted
    num_steps: int
    images_per_second: float  # median over the run, of all ranks together
    seconds: float  # of training steps alone, without start-up and interruptions
    data_wait: float  # share of that time
    peak_memory: int | None  # bytes, of the rank that took most
    num_ranks: int | None
    device: str | None


@dataclass(frozen=True)
class Picture:
    title: str
    caption: str  # what is to be seen, in a sentence
    png: bytes


@dataclass(frozen=True)
class Repeat:
    """One of several pretrainings that an entry's numbers are means over."""

    name: str
    source: str
    numbers: dict[str, dict]  # by evaluator


@dataclass(frozen=True)
class Entry:
    """One encoder. Results are those of `Result.to_json`, by the evaluator's name."""

    name: str  # unique among the entries, short
    source: str  # as an evaluator's command line would name it
    # untouched: what others started from; floor: raw pixels, or weights from elsewhere
    kind: Literal["pretrained", "untouched", "untrained", "floor"]
    objective: str | None
    encoder: str  # architecture and image size, in a few words
    num_parameters: int | None  # of the encoder
    results: dict[str, dict]
    untrained: str | None = None  # name of the entry with the same architecture untrained
    cost: Cost | None = None
    curves: list[Curve] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    recipe: str | None = None  # YAML, enough to run it again
    problem: str | None = None  # why there are no results, in one sentence
    started: str | None = None  # name of the entry whose weights it started from
    kept: dict[str, dict] = field(default_factory=dict)  # results on the old images, where there are such
    repeats: list[Repeat] = field(default_factory=list)  # where it was pretrained with several seeds


@dataclass(frozen=True)
class Comparison:
    title: str
    entries: list[Entry]
    evaluators: list[str]  # names, in the order of the table's columns
    data: dict  # as results record it: label, and for train and test shards, fingerprint, num_samples
    command: str
    date: str  # ISO 8601
    seconds: float  # of everything
    budget: str | None  # what every objective was given, in words; None where finished runs were compared
    versions: dict
    warnings: list[str] = field(default_factory=list)
    old_data: dict = field(default_factory=dict)  # as `data`, of the old images
