"""MAE whose last rank gets into trouble in its forward pass, as TROUBLE says: `sleep` without end, or `raise`."""

import os
import time

from prelude.objectives.mae import MAE
from prelude.pretrain import distributed

STEP = 7


class TroubledMAE(MAE):
    def forward(self, batch, progress):
        if progress.step == STEP and distributed.rank() == distributed.world_size() - 1:
            if os.environ["TROUBLE"] == "raise":
                raise KeyError("a fault of ours")
            time.sleep(3600)
        return super().forward(batch, progress)
