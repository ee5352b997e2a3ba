"""What every self-supervised objective is, to the engine, the store and the evaluators.

Adding one needs no change to the engine: subclass `Objective`, and name it in the config, as one of ours
(`objective.name: mae`), as `module:Class`, or through the entry-point group `prelude.objectives`.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from PIL import Image
from torch import Tensor, nn

from prelude.data.batch import Batch, ViewPlan
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import check_encoder
from prelude.pretrain.options import Options
from prelude.pretrain.schedules import Progress


class Loss(NamedTuple):
    """A tuple and not a dataclass: ZeRO stage 3 has to find the tensors in it, to gather an objective's own
    parameters (a mask token) before the backward pass."""

    total: Tensor  # scalar, with gradient
    parts: dict[str, Tensor] = {}  # detached scalars, for the log


class Objective(nn.Module, ABC):
    """One self-supervised method around one encoder.

    `forward` is the whole of the method's computation, loss included, so that a distributed engine sees one
    call a micro-batch. Randomness comes from `batch.seeds` through `pretrain.draws`.
    """

    Options: ClassVar[type[Options]] = Options
    # The batch is averaged sample by sample, so that accumulating micro-batches changes nothing. An objective
    # whose loss is a statistic of the whole batch says False, and the engine then refuses accumulation.
    accumulates: ClassVar[bool] = True
    # Above stage 2 each rank holds a part of every weight. An objective that reads weights outside `forward`, such
    # as a momentum teacher that follows them, says 2.
    max_zero_stage: ClassVar[int] = 3

    # Of a sample's label, where an objective reads any: () for a class number.
    label_shape: tuple[int, ...] = ()

    # How often a step makes the host wait for the device, where the method cannot do without; each time costs speed.
    host_waits: ClassVar[int] = 0

    # Whether it learns from volumes too, in batches of their own; its plan then says what it wants of them.
    takes_volumes: ClassVar[bool] = False

    # Whether sequences have other lengths in each step: what is compiled has to take any, and steps differ in cost.
    lengths_change: ClassVar[bool] = False

    # What to change when the features collapse, by cause, where `pretrain.collapse` does not know better. What it
    # watches are parts of the loss: those of `feature_health`, and `trivial_loss`.
    remedies: ClassVar[dict[str, str]] = {}

    encoder: nn.Module  # a timm model under its own parameter names
    views: ViewPlan  # what it wants from the data path

    def __init__(self, encoder: nn.Module, options: Options, *, image_size: tuple[int, int], mean, std):
        super().__init__()
        self.encoder = encoder
        self.options = options

    @classmethod
    def check(cls, options: Options, encoder: EncoderConfig) -> None:
        """Refuses options and an encoder that cannot work together, before anything is built.

        Raises UserError. An objective with demands of its own adds them to this one.
        """
        check_encoder(encoder, tokens=False)

    @classmethod
    def compares_samples(cls, options: Options) -> bool:
        """Whether the loss is a statistic of the batch with these options, for which one sample is none."""
        return not cls.accumulates

    @classmethod
    def fewest_samples(cls, options: Options, encoder: EncoderConfig) -> int:
        """That all ranks together have to see at once: 2 where one leaves a batch norm a single value a channel."""
        return 1

    @abstractmethod
    def forward(self, batch: Batch, progress: Progress) -> Loss:
        """The method's computation for one micro-batch of this rank, whose views are uint8 until `images` makes them
        images. The loss is a mean over samples, of float32."""

    def after_step(self, progress: Progress, applied: Tensor) -> None:
        """Called once after every optimizer step: momentum teachers and the like.

        applied: a scalar on the device, 1.0 where the weights moved and 0.0 where the step was refused, which must then
        change nothing here either. Reading it would make the host wait; multiply by it.
        """

    def has_ended(self, progress: Progress) -> bool:
        """Whether the run is over before its last step, as where held-out images say so; on all ranks alike.

        Asked before the first step of a start and after each one; what it is decided by must be in the module's
        tensors, so that a run that goes on ends where it would have. May raise Stopped on all ranks, and is then
        asked again at the same step by the next start.
        """
        return False

    def telling_steps(self) -> tuple[int, int]:
        """(a usual step, the heaviest one), counted from 0, where lengths change: a plan tells the FLOPs of the one and
        the memory of the other."""
        return 0, 0

    def lr_scales(self) -> dict[str, float]:
        """Multipliers of the learning rate by parameter name, such as a decay by layers; 1 where a name is absent."""
        return {}

    def compiled_parts(self) -> list[nn.Module]:
        """What `train.compile` compiles, each by itself; none: the whole forward pass, as one graph."""
        return []

    def notes(self) -> list[str]:
        """Lines that the start of a run tells: what nobody would expect of this method with this encoder."""
        return []

    def exported_encoder(self) -> nn.Module:
        """The submodule that the paper evaluates; its weights are what is probed and exported."""
        return self.encoder

    def pictures(self, batch: Batch) -> dict[str, Image.Image]:
        """What a person looks at to see what is being learned; none unless a method has something to show."""
        return {}
