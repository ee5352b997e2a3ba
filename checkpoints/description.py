"""What a source says about its encoder before any weight is put anywhere."""

from collections.abc import Callable
from dataclasses import dataclass, field

from prelude.checkpoints.convert.weights import Weights
from prelude.pretrain.config import EncoderConfig

Pixels = tuple[float, ...]  # of each channel, in [0, 1]


@dataclass(frozen=True)
class Description:
    config: EncoderConfig
    mean: Pixels
    std: Pixels
    name: str  # for a table or a plot: the source, short
    read: Callable[[], Weights]
    origin: dict = field(default_factory=dict)  # what is known of how it was trained: objective, step, data
    shown: tuple[int, ...] = ()  # channels that pictures show, see `ViewPlan`
