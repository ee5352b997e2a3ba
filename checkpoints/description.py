"""What a source says about its encoder before any weight is put anywhere."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from prelude.checkpoints.convert.weights import Weights
from prelude.pretrain.config import EncoderConfig

Pixels = tuple[float, ...]  # of each channel, in [0, 1]
RANDOM = "random:"  # before a source: the same architecture, with weights drawn from a seed
START = "start:"  # before a run, or what was kept of it: its encoder before the first step, from `encoder.weights`


@dataclass(frozen=True)
class Description:
    config: EncoderConfig
    mean: Pixels
    std: Pixels
    name: str  # for a table or a plot: the source, short
    read: Callable[[], Weights]
    origin: dict = field(default_factory=dict)  # what is known of how it was trained: objective, step, data


def has_folder(source: str) -> bool:
    """Whether a source is a path on this machine, rather than a name of timm's or of the Hugging Face hub's."""
    return not bare(source).startswith(("timm:", "hf-hub:"))


def bare(source: str) -> str:
    """Without the words before it."""
    return source.removeprefix(RANDOM).removeprefix(START)


def path_of(source: str) -> Path:
    """The folder or file that a source lies in; see `has_folder`."""
    path = bare(source).removeprefix("local-dir:")
    return Path(path if Path(path).exists() else path.partition("#")[0])
