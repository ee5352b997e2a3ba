"""The papers' linear probes, by name: what is trained on augmented images, and how.

| name | from |
|---|---|
| `mae` | He et al., arXiv 2111.06377, and the released code: class token, batch norm without affine, LARS |
| `ijepa` | Assran et al., arXiv 2301.08243: mean of the patches of the last and of the last 4 blocks, LARS |
| `barlow_twins` | Zbontar et al., arXiv 2103.03230, and the released code: pooled features, SGD, cosine by epoch |
| `vissl` | Goyal et al., VISSL's default linear probe: SGD with Nesterov momentum in three steps |

- Schedules are shares of the run, so that a shorter one is the same curve, squeezed.
- Learning rates are for each 256 samples of the global batch, or absolute, as their source says.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from prelude.data.batch import View, ViewPlan
from prelude.data.errors import UserError
from prelude.evaluators.features.extraction import suited_kinds
from prelude.pretrain.schedules import whole_intervals


@dataclass(frozen=True)
class Protocol:
    """A grid of heads (kind of feature x norm x learning rate x weight decay) and how they are trained."""

    name: str
    kinds: tuple[str, ...]  # of feature, as far as an encoder has them
    norms: tuple[Literal["none", "batch", "batch_affine"], ...]
    optimizer: Literal["sgd", "lars"]
    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]
    global_batch: int
    epochs: float
    per_256: bool = True  # whether learning rates are for each 256 samples of the global batch
    nesterov: bool = False
    momentum: float = 0.9
    warmup: float = 0.0  # share of the run, from 0
    milestones: tuple[float, ...] = ()  # shares of the run at which the rate falls to a tenth; else a cosine to 0
    by_epoch: bool = False  # whether the rate only changes between epochs
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    scale: tuple[float, float] = (0.08, 1.0)  # area of the random crop, as a share of the image
    flip: float = 0.5
    norm_eps: float = 1e-5

    def plan(self, encoder) -> ViewPlan:
        """The augmented view that heads are trained on."""
        view = View(encoder.config.size, scale=self.scale, interpolation=self.interpolation, flip=self.flip)
        return ViewPlan((view,), tuple(encoder.mean), tuple(encoder.std))

    def kinds_of(self, encoder) -> tuple[str, ...]:
        """The protocol's kinds where the encoder is of the sort it was written for; else its first default one."""
        have = suited_kinds(encoder)
        blocks = getattr(encoder.model, "blocks", ())
        known = {*have, "last4"} if "mean" in have and len(blocks) >= 4 else set(have)
        return tuple(kind for kind in self.kinds if kind in known) or have[:1]

    def peak_lr(self, learning_rate: float) -> float:
        return learning_rate * self.global_batch / 256 if self.per_256 else learning_rate

    def lr_factor(self, step: int, num_steps: int) -> float:
        """Of the peak, at `step` of 0 .. num_steps - 1."""
        done = step / num_steps
        if done < self.warmup:
            return done / self.warmup
        if self.milestones:
            return 0.1 ** sum(done >= milestone for milestone in self.milestones)
        if self.by_epoch:
            done = whole_intervals(done * self.epochs, 1) / self.epochs
        return 0.5 * (1 + math.cos(math.pi * (done - self.warmup) / (1 - self.warmup)))


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "mae",
            kinds=("cls",),
            norms=("batch",),
            optimizer="lars",
            learning_rates=(0.1,),
            weight_decays=(0.0,),
            global_batch=16384,
            epochs=90,
            warmup=10 / 90,
            norm_eps=1e-6,
        ),
        Protocol(
            "ijepa",
            kinds=("mean", "last4"),
            norms=("none", "batch_affine"),
            optimizer="lars",
            learning_rates=(0.001, 0.01, 0.05),
            weight_decays=(0.0, 5e-4),
            global_batch=16384,
            epochs=50,
            milestones=(15 / 50, 30 / 50, 45 / 50),
        ),
        Protocol(
            "barlow_twins",
            kinds=("pool",),
            norms=("none",),
            optimizer="sgd",
            learning_rates=(0.3,),
            per_256=False,
            weight_decays=(1e-6,),
            global_batch=256,
            epochs=100,
            by_epoch=True,
            interpolation="bilinear",
        ),
        Protocol(
            "vissl",
            kinds=("pool", "mean"),
            norms=("none", "batch_affine"),
            optimizer="sgd",
            nesterov=True,
            learning_rates=(0.01,),
            weight_decays=(5e-4,),
            global_batch=256,
            epochs=28,
            milestones=(8 / 28, 16 / 28, 24 / 28),
        ),
    )
}


def protocol_of(name: str, **changes) -> Protocol:
    """A protocol with what is not None in `changes` replaced. Raises UserError for values that cannot work."""
    if name not in PROTOCOLS:
        raise UserError(f"There is no protocol {name}; write one of {', '.join(PROTOCOLS)}.")
    given = {key: value for key, value in changes.items() if value is not None}
    for key, value in given.items():
        values = value if isinstance(value, tuple) else (value,)
        if not values or any(number < 0 or (number == 0 and key != "weight_decays") for number in values):
            raise UserError(f"--{key.replace('_', '-')} {' '.join(map(str, values))} cannot be; write more than 0.")
    return replace(PROTOCOLS[name], **given)
