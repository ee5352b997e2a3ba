"""Networks of a user's whose tensors are odd, and sound: several names, shared memory, numbers that are not finite."""

import torch
from torch import nn

INFINITE = float("-inf")


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, 8)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, images):
        return self.b(self.a(self.conv(images).flatten(2).mean(2)).relu()) * self.scale()

    def scale(self):
        return sum(buffer.isfinite().sum() + buffer.nan_to_num(0, 0, 0).mean() for buffer in self.buffers())


def tied(image_size):
    model = Odd()
    model.register_buffer("one", torch.ones(1))
    model.b.weight = model.a.weight
    return model


def shared_buffer(image_size):
    model, table = Odd(), torch.randn(8)
    model.a.register_buffer("rope", table)
    model.b.register_buffer("rope", table)
    return model


def masked(image_size):
    model = Odd()
    model.register_buffer("mask", torch.full((4, 4), INFINITE).triu(1))
    return model


def expanded(image_size):
    model = Odd()
    model.register_buffer("gain", torch.randn(1).expand(8))
    return model


def views(image_size):
    model = Odd()
    model.register_buffer("whole", torch.randn(10))
    model.register_buffer("part", model.whole[:3])
    return model


class WithMore(Odd):
    def get_extra_state(self):
        return {"seen": 3}

    def set_extra_state(self, state):
        pass


def with_more(image_size):
    return WithMore()
