"""What the arms of both peers share: what they are told, the encoder that they train, and the clock.

A peer's arm is a script of its own, started as `python league_NAME.py SPEC`. It trains what the file SPEC says, with
the peer's own losses, heads, transforms, optimizers and schedules, and leaves beside it `encoder.pt`, a state dict
under timm's names, and `result.json`. The clock runs from before the first batch is fetched to the end of the last
step.
"""

import json
import random
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import timm
import torch
from torch import nn

POSITIONS = "positions.pt"  # beside SPEC, where our recipe has a fixed table
LOGGED = 40  # points of the loss curve that a record keeps


def told() -> SimpleNamespace:
    """method, setting, seed, steps, pictures, workers, precision, image_size, encoder, batch and ours: what our recipe
    says. Seeds everything."""
    path = Path(sys.argv[1])
    spec = SimpleNamespace(**json.loads(path.read_text()), folder=path.parent)
    spec.ours = SimpleNamespace(**spec.ours)
    random.seed(spec.seed)
    torch.manual_seed(spec.seed)
    return spec


def encoder_of(spec: SimpleNamespace) -> nn.Module:
    """The encoder of our recipe, built by timm alone; at the setting `ours` with the recipe's fixed table of positions,
    where timm's learned one is as small as its weights."""
    encoder = timm.create_model(spec.encoder["name"], num_classes=0, **spec.encoder["arguments"])
    positions = spec.folder / POSITIONS
    if spec.setting == "ours" and positions.is_file():
        encoder.pos_embed = nn.Parameter(torch.load(positions, weights_only=True), requires_grad=False)
    return encoder


def batch_of(spec: SimpleNamespace, their: int) -> int:
    """their: the peer's own, at the setting `their`; never more than the pictures of a toy run."""
    return min(their if spec.setting == "their" else spec.ours.batch, spec.batch_limit)


class Clock:
    """Wall seconds of training, and the loss by step."""

    def __init__(self, steps: int):
        self.steps, self.ends, self.losses = steps, [], []

    def start(self) -> None:
        self.started = time.perf_counter()

    def step(self, loss: torch.Tensor) -> bool:
        """Whether the run is over."""
        self.ends.append(time.perf_counter() - self.started)
        if len(self.ends) % max(self.steps // LOGGED, 1) == 0 or len(self.ends) == self.steps:
            self.losses.append([len(self.ends), round(self.ends[-1], 2), float(loss.detach())])
        return len(self.ends) >= self.steps


def finish(spec, clock: Clock, encoder: nn.Module, *, batch: int, statistics: dict, package: str) -> None:
    torch.save(encoder.state_dict(), spec.folder / "encoder.pt")
    result = {
        "steps": len(clock.ends),
        "seconds": clock.ends[-1],
        "ends": [round(end, 4) for end in clock.ends] if spec.trial else [],
        "batch": batch,
        "mean": list(statistics["mean"]),
        "std": list(statistics["std"]),
        "log": clock.losses,
        "version": version(package),
    }
    (spec.folder / "result.json").write_text(json.dumps(result))
