"""What is computed across ranks, against one process with the joined batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import rank_cases
import torch
from runs import LAUNCHED
from torch import nn

from prelude.data.errors import UserError
from prelude.pretrain.batch_norm import normalise_columns, synchronise


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, rank_cases.__file__, str(out)]
    env = os.environ | LAUNCHED
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def of_rank(worlds: Path, world: int, case: str, rank: int) -> dict:
    return torch.load(worlds / f"{world}-{case}-{rank}.pt", weights_only=True)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("case", rank_cases.CASES)
def test_uneven_ranks_compute_what_one_process_computes_with_the_joined_batch(worlds, case, world):
    alone = of_rank(worlds, 1, case, 0)
    ranks = [of_rank(worlds, world, case, rank) for rank in range(world)]
    for name, expected in alone.items():
        if name in ("out", "input_grad"):  # rows
            together = torch.cat([rank[name] for rank in ranks])
        elif name.startswith("grad ") and case == "norms":  # every rank has a loss of its own, summed here
            together = torch.stack([rank[name] for rank in ranks]).sum(0)
        elif name.startswith("grad "):  # every rank has the loss of all, and the engine takes the mean
            together = torch.stack([rank[name] for rank in ranks]).mean(0)
        else:
            together = ranks[0][name]
        torch.testing.assert_close(together, expected, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("case", rank_cases.CASES)
def test_running_statistics_and_losses_are_the_same_on_all_ranks_to_the_last_bit(worlds, case, world):
    first, *others = (of_rank(worlds, world, case, rank) for rank in range(world))
    shared = [name for name in first if not name.startswith("grad ") and name not in ("out", "input_grad")]
    assert shared
    assert all(torch.equal(other[name], first[name]) for other in others for name in shared)


def test_one_process_with_synchronised_norms_is_plain_torch(worlds):
    ours = of_rank(worlds, 1, "norms", 0)
    torch.set_num_threads(1)  # as many as the ranks have: bits depend on it
    torch.manual_seed(0)
    plain = rank_cases.Norms().double()
    for scale in (1.0, 2.0):
        (plain(rank_cases.images() * scale) * torch.linspace(0, 1, 8, dtype=torch.float64)[:, None]).sum().backward()
    assert all(torch.equal(ours[name], value) for name, value in plain.state_dict().items())
    assert all(torch.equal(ours[f"grad {name}"], p.grad) for name, p in plain.named_parameters())


def test_synchronising_changes_no_name_and_twice_is_once():
    model = rank_cases.Norms()
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict(keep_vars=True).items()}
    synchronise(model)
    classes = [type(module) for module in model.modules()]
    synchronise(model)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict(keep_vars=True).items()} == before
    assert [type(module) for module in model.modules()] == classes
    assert isinstance(model.norm_2d, nn.BatchNorm2d)


def test_a_batch_norm_of_another_kind_is_refused():
    with pytest.raises(UserError, match="1 is a SyncBatchNorm, whose statistics cannot be shared"):
        synchronise(nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2)))


def test_columns_are_standardised_with_the_biased_variance():
    values = torch.randn(6, 4, dtype=torch.float64)
    expected = (values - values.mean(0)) / (values.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(normalise_columns(values), expected, rtol=1e-12, atol=1e-12)
