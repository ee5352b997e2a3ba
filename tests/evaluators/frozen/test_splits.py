import pytest
import torch

from prelude.data.errors import UserError
from prelude.evaluators.frozen.splits import edge_warnings, hold_out, hold_out_groups, share_warnings


def test_the_split_is_a_tenth_of_each_class_and_a_partition():
    labels = torch.tensor([0] * 200 + [1] * 50 + [2] * 10).roll(31)
    fit, held = hold_out(labels, seed=0)
    assert torch.bincount(labels[held]).tolist() == [20, 5, 1]
    assert sorted(fit.tolist() + held.tolist()) == list(range(260))


def test_rare_classes_keep_a_sample_to_learn_from():
    labels = torch.tensor([0, 0, 1, 2, 2, 2])
    fit, held = hold_out(labels, seed=0)
    assert torch.bincount(labels[fit], minlength=3).tolist() == [1, 1, 2]
    assert torch.bincount(labels[held], minlength=3).tolist() == [1, 0, 1]


def test_the_split_depends_on_the_seed_alone():
    labels = torch.arange(1000) % 7
    assert hold_out(labels, 5)[1].tolist() == hold_out(labels, 5)[1].tolist()
    assert hold_out(labels, 5)[1].tolist() != hold_out(labels, 6)[1].tolist()


def test_one_sample_a_class_is_refused():
    with pytest.raises(UserError, match="nothing can be held out"):
        hold_out(torch.arange(5), 0)


def test_a_choice_at_the_edge_is_told_unless_nothing_lies_below():
    grid = (1e-3, 1e-2, 1e-1)
    told = lambda value, scores=(): bool(edge_warnings("weight decay", value, grid, scores=scores))  # noqa: E731
    assert told(1e-3) and told(1e-1) and not told(1e-2)
    assert told(1e-3, (50.0, 49.0, 20.0)) and not told(1e-3, (50.0, 49.95, 20.0))
    assert told(1e-1, (50.0, 50.0, 50.0))  # what a decay does grows without end
    scores = (50.0, 49.0, 20.0)
    for losses, is_told in (((1.2, 1.3, 2.0), True), ((1.3, 1.2, 2.0), False)):
        assert bool(edge_warnings("weight decay", 1e-3, grid, "", scores, losses)) == is_told
    assert edge_warnings("weight decay", 1e-1, grid, "", scores, (1.0, 2.0, 3.0))
    assert not edge_warnings("weight decay", 1.0, (1.0,))


@pytest.mark.parametrize("seed", range(8))
def test_a_large_group_is_passed_over_while_others_remain(seed):
    def held(*sizes):
        groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        fit, held = hold_out_groups(groups, seed, 0.1)
        assert len(fit) + len(held) == sum(sizes) and not torch.isin(groups[fit], groups[held]).any()
        return len(held)

    assert held(900, 100) == 100
    assert held(600, 250, 100, 50) in (100, 150)
    assert held(520, 480) == 480 and "480 of 1000 train images are held out, 48 %" in share_warnings(480, 1000, 0.1)[0]
    assert held(500, 499, 1) == 1 and share_warnings(1, 1000, 0.1)
    assert not share_warnings(200, 1000, 0.1) and not share_warnings(50, 1000, 0.1)
