"""cuDNN's attention, which plans for every new length of a sequence, is kept from runs whose lengths change."""

import pytest
import torch
from engine_cases import NUM_SAMPLES, Regression, batch_at, config_of
from in_memory import MemoryLoader, NoStore

from prelude.pretrain import distributed
from prelude.pretrain.engine import Engine


@pytest.mark.parametrize("changing", [False, True])
def test_a_run_whose_lengths_change_goes_without_it_and_leaves_it_as_it_was(tmp_path, changing):
    class Asking(Regression):
        lengths_change = changing
        seen: list[bool] = []

        def forward(self, batch, progress):
            self.seen.append(torch.backends.cuda.cudnn_sdp_enabled())
            return super().forward(batch, progress)

    distributed.start()
    before = torch.backends.cuda.cudnn_sdp_enabled()
    Engine(config_of({"train": {}}, tmp_path), Asking(), MemoryLoader(8, NUM_SAMPLES, batch_at), NoStore(), []).run()
    distributed.stop()
    assert before and set(Asking.seen) == {not changing}
    assert torch.backends.cuda.cudnn_sdp_enabled() is before
