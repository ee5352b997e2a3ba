"""Which of torch's attention kernels a run may take on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from prelude.pretrain.objective import Objective


@contextmanager
def kernels_for(objective: Objective) -> Iterator[None]:
    """Around the steps of a run: without cuDNN's kernel where sequences have other lengths in every step.

    cuDNN makes a plan for each new length, on the host, during which the GPU waits.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before and not objective.lengths_change)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
