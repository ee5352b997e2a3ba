from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prelude.evaluators.protocols import sgd_heads
from prelude.evaluators.protocols.papers import PROTOCOLS
from prelude.evaluators.protocols.sgd_heads import SGDHeads

NUM_STEPS, WIDTH, CLASSES = 6, 5, 4
SETTINGS = [(1.0, 0.0), (20.0, 0.3)]
SMALL = {"global_batch": 32, "learning_rates": (1.0, 20.0), "weight_decays": (0.0, 0.3)}


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return 3 + torch.randn(32, WIDTH, generator=generator), torch.randint(CLASSES, (32,), generator=generator)


def trained(protocol, norm):
    heads = SGDHeads(protocol, norm, WIDTH, CLASSES, SETTINGS, 0, "cpu")
    start = heads.params["weight"][0].clone()
    for step in range(NUM_STEPS):
        heads.step(*batch(step), protocol.lr_factor(step, NUM_STEPS))
    return start, heads


class Head(nn.Module):
    """One head as the papers' code has it."""

    def __init__(self, start, norm, eps):
        super().__init__()
        affine = norm == "batch_affine"
        self.norm = nn.Identity() if norm == "none" else nn.BatchNorm1d(WIDTH, eps=eps, affine=affine)
        self.linear = nn.Linear(WIDTH, CLASSES)
        self.linear.weight.data.copy_(start)
        self.linear.bias.data.zero_()

    def forward(self, values):
        return self.linear(self.norm(values))

    def as_after_many_steps(self):
        """The start of the running averages taken out."""
        if not isinstance(self.norm, nn.Identity):
            left = 0.9**NUM_STEPS
            self.norm.running_mean /= 1 - left
            self.norm.running_var -= left
            self.norm.running_var /= 1 - left
        return self.eval()


def compare(heads, h, oracle):
    values, _ = batch(99)
    assert torch.allclose(heads.heads().logits(values)[h], oracle.as_after_many_steps()(values), atol=1e-4)


@pytest.mark.parametrize("norm", ["none", "batch_affine"])
@pytest.mark.parametrize("h", [0, 1])
def test_sgd_heads_are_those_of_torch_trained_alone(norm, h):
    protocol = replace(PROTOCOLS["vissl"], **SMALL)
    start, heads = trained(protocol, norm)
    oracle, (lr, decay) = Head(start, norm, 1e-5), SETTINGS[h]
    groups = [{"params": oracle.linear.parameters(), "weight_decay": decay}]
    groups += [{"params": list(oracle.norm.parameters()), "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = lr * 32 / 256 * protocol.lr_factor(step, NUM_STEPS)
        values, labels = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(oracle(values), labels).backward()
        optimizer.step()
    compare(heads, h, oracle)


@pytest.mark.parametrize("norm", ["none", "batch", "batch_affine"])
@pytest.mark.parametrize("h", [0, 1])
def test_lars_heads_follow_the_rule_of_the_mae_code(norm, h):
    protocol = replace(PROTOCOLS["mae"], **SMALL)
    start, heads = trained(protocol, norm)
    oracle, (lr, decay) = Head(start, norm, 1e-6), SETTINGS[h]
    momenta = {name: torch.zeros_like(p) for name, p in oracle.named_parameters()}
    for step in range(NUM_STEPS):
        values, labels = batch(step)
        oracle.zero_grad()
        F.cross_entropy(oracle(values), labels).backward()
        for name, p in oracle.named_parameters():
            d = p.grad
            if p.ndim > 1:
                d = d + decay * p.data
                d = d * 0.001 * p.data.norm() / d.norm()
            momenta[name] = 0.9 * momenta[name] + d
            p.data -= lr * 32 / 256 * protocol.lr_factor(step, NUM_STEPS) * momenta[name]
    compare(heads, h, oracle)


def test_pieces_of_a_batch_change_nothing(monkeypatch):
    protocol = replace(PROTOCOLS["vissl"], **SMALL)
    _, whole = trained(protocol, "batch_affine")
    monkeypatch.setattr(sgd_heads, "LOGITS", 2 * CLASSES * 5)
    _, pieces = trained(protocol, "batch_affine")
    for name, param in whole.params.items():
        assert torch.allclose(param, pieces.params[name], atol=1e-5)


def test_a_head_that_diverges_does_not_touch_the_others():
    protocol = replace(PROTOCOLS["vissl"], **SMALL)
    heads = SGDHeads(protocol, "none", WIDTH, CLASSES, [(1.0, 0.0), (1e38, 1.0)], 0, "cpu")
    alone = SGDHeads(protocol, "none", WIDTH, CLASSES, [(1.0, 0.0)], 0, "cpu")
    for step in range(NUM_STEPS):
        heads.step(*batch(step), 1.0)
        alone.step(*batch(step), 1.0)
    assert not heads.params["weight"][1].isfinite().all()
    assert torch.allclose(heads.params["weight"][0], alone.params["weight"][0], atol=1e-5)
