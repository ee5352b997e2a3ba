import pytest
import torch
from torch import nn

from prelude.data.batch import View, ViewPlan
from prelude.pretrain.config import Config
from prelude.pretrain.images import images
from prelude.pretrain.objective import Loss, Objective, Options
from prelude.pretrain.preview import describe, step_cost


class Linear(Objective):
    def __init__(self):
        super().__init__(nn.Linear(192, 64), Options(), image_size=(8, 8), mean=None, std=None)
        self.views = ViewPlan((View((8, 8)),))

    def forward(self, batch, progress):
        return Loss(self.encoder(images(batch, self.views)[0].flatten(1)).square().mean())


def test_the_cost_of_an_image_is_counted():
    flops, activations = step_cost(Linear())
    assert flops == 2 * 192 * 64 * 2  # forward, and the weights' gradient: the input needs none
    assert activations == pytest.approx(192 * 4 + 64 * 4, rel=0.1)


def test_the_rows_agree_with_the_config():
    config = Config.model_validate(
        {
            "run_dir": "x",
            "data": {"shards": "x"},
            "encoder": {"name": "x", "image_size": 8},
            "objective": {"name": "x"},
            "train": {"epochs": 3, "global_batch": 16, "micro_batch": 4, "zero_stage": 1},
            "optimizer": {"lr": 0.016},
        }
    )
    objective = Linear()
    rows = dict(describe(config, objective, num_samples=100, world_size=2))
    assert rows["batch"] == "16 = 2 ranks x 4 images x 2"
    assert rows["length"] == "6.2 steps an epoch, 19 in all"
    assert rows["peak learning rate"] == "0.001"
    assert all(parameter.grad is None for parameter in objective.parameters())
    assert torch.get_default_dtype() == torch.float32
