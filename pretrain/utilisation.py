"""MFU, model FLOPs utilisation: the share of its devices' peak that a run needs for the method itself."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from prelude.data.batch import Batch
from prelude.pretrain import distributed
from prelude.pretrain.config import Config
from prelude.pretrain.objective import Objective
from prelude.pretrain.step_cost import Flops, flops_an_image

# Of micro-batches that differ in cost: those that are averaged, and how often one is counted once there are as many.
_AVERAGED, _COUNTED_EVERY = 16, 64


class Utilisation:
    """FLOPs are counted in the first micro-batch of a process, which needs no step of its own, and in later ones where
    lengths change. Where steps would show what is computed twice, or nothing because it is compiled, a copy of the
    objective is looked at before."""

    def __init__(self, peak_flops: float | None):
        """peak_flops: that a rank's device can do in a second; None: nobody wants to know."""
        self.peak_flops, self.flops_an_image = peak_flops, 0.0
        self._counted: deque[float] = deque(maxlen=1)
        self._seen = 0

    def look_at(self, objective: Objective, config: Config, precision: str) -> None:
        """Before it is compiled or checkpointed, on its device. Collective, where its forward is."""
        if objective.takes_volumes:  # a step costs what its kind costs, and no one figure says that
            self.peak_flops = None
        self._counted = deque(maxlen=_AVERAGED if objective.lengths_change else 1)
        if self.peak_flops and (config.train.gradient_checkpointing or config.train.compile):
            self.flops_an_image = flops_an_image(objective, precision)

    @contextmanager
    def counting(self, batch: Batch) -> Iterator[None]:
        """Around forward and backward of a micro-batch."""
        if not (self.peak_flops and self._is_counted()):
            yield
            return
        with Flops() as counted:
            yield
        self._counted.append(counted.flops / len(batch))
        self.flops_an_image = sum(self._counted) / len(self._counted)

    def _is_counted(self) -> bool:
        if self.flops_an_image and not self._counted:  # of a copy
            return False
        self._seen += 1
        most = self._counted.maxlen
        return len(self._counted) < most or (most > 1 and self._seen % _COUNTED_EVERY == 0)

    def at(self, images_per_second: float) -> float | None:
        """images_per_second: over all ranks."""
        if not (self.peak_flops and self.flops_an_image):
            return None
        return images_per_second * self.flops_an_image / (self.peak_flops * distributed.world_size())
