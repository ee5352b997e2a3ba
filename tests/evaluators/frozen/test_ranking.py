import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from prelude.evaluators.frozen import ranking
from prelude.evaluators.frozen.ranking import (
    auc,
    auc_within,
    average_precision,
    bootstrap,
    bootstrapped,
    interval,
    standard_error,
)


@pytest.fixture
def ranked():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(12, (200,), generator=generator).float()  # many ties
    return scores, torch.rand(200, generator=generator) < 0.1 + 0.05 * scores


def test_equal_scikit_learn_with_ties_and_weights(ranked):
    scores, positive = ranked
    weights = torch.randint(4, (3, 200), generator=torch.Generator().manual_seed(1)).double()
    weights[0] = 1
    for ours, theirs in ((auc, roc_auc_score), (average_precision, average_precision_score)):
        expected = [theirs(positive.numpy(), scores.numpy(), sample_weight=w.numpy()) for w in weights]
        assert ours(scores, positive, weights).tolist() == pytest.approx(expected, abs=1e-12)
        assert ours(scores, positive).item() == pytest.approx(expected[0], abs=1e-12)


def test_known_values():
    scores = torch.tensor([0.9, 0.8, 0.7, 0.7])
    assert auc(scores, torch.tensor([True, False, True, False])).item() == pytest.approx((2 + 0.5) / 4)
    assert auc(scores, torch.tensor([True] * 4)).isnan().all()
    assert average_precision(scores, torch.tensor([False, True, False, False])).item() == pytest.approx(0.5)
    assert average_precision(scores, torch.tensor([False] * 4)).isnan().all()


def test_bootstrap_draws_as_a_loop_over_resampled_sets_does(ranked, monkeypatch):
    scores, positive = ranked
    monkeypatch.setattr(ranking, "ELEMENTS", 200 * 70)  # several pieces
    draws = bootstrap(lambda weights: auc(scores, positive, weights), 200, seed=3)
    assert draws.shape == (1000,)
    generator = torch.Generator().manual_seed(9)
    plain = []
    for _ in range(400):
        rows = torch.randint(200, (200,), generator=generator)
        plain.append(roc_auc_score(positive[rows].numpy(), scores[rows].numpy()))
    plain = torch.tensor(plain, dtype=torch.float64)
    assert draws.mean().item() == pytest.approx(plain.mean().item(), abs=0.005)
    assert draws.std().item() == pytest.approx(plain.std().item(), rel=0.2)
    assert interval(draws) == pytest.approx(interval(plain), abs=0.015)


def test_a_share_has_the_error_of_its_binomial_and_ends_where_they_are_asked_for():
    right = (torch.arange(400) < 100).double()
    found = bootstrapped(lambda weights: weights @ right / weights.sum(1), 400, seed=0, ends=True)
    error = 100 * (0.25 * 0.75 / 400) ** 0.5
    assert found.value == 25 and found.se == pytest.approx(error, rel=0.1)
    assert found.interval == pytest.approx((25 - 1.96 * error, 25 + 1.96 * error), abs=0.5)
    assert bootstrapped(lambda weights: weights @ right / weights.sum(1), 400, seed=0).interval is None


def test_groups_are_drawn_whole():
    groups = torch.tensor([5, 5, 5, 9, 9, 7])
    for weights in ranking._draws(6, 0, groups):
        assert (weights[:, 0] == weights[:, 2]).all() and (weights[:, 3] == weights[:, 4]).all()
        assert (weights[:, [0, 3, 5]].sum(1) == 3).all()


def test_what_cannot_be_drawn_otherwise_has_no_error():
    values = torch.rand(6, 2, dtype=torch.float64)
    for count, groups in ((6, torch.full((6,), 7)), (1, None)):
        draws = bootstrap(lambda weights, count=count: weights @ values[:count], count, seed=0, groups=groups)
        assert draws.shape == (1000, 2) and draws.isnan().all()
        assert standard_error(draws[:, 0]) is None and interval(draws[:, 0]) is None


def test_an_area_within_parts_does_not_rank_across_them(ranked):
    scores, positive = ranked
    parts = torch.arange(200) % 3
    expected = sum(roc_auc_score(positive[parts == p].numpy(), scores[parts == p].numpy()) for p in range(3)) / 3
    assert auc_within(scores, positive, parts) == pytest.approx(expected)
    assert auc_within(scores - 100 * parts, positive, parts) == pytest.approx(expected)
    lonely = torch.cat([parts, torch.tensor([3])])  # a part without a negative says nothing
    assert auc_within(torch.cat([scores, scores[:1]]), torch.cat([positive, torch.tensor([True])]), lonely) == (
        pytest.approx(expected)
    )


def test_too_few_draws_give_no_interval():
    draws = torch.full((1000,), torch.nan, dtype=torch.float64)
    draws[:99] = torch.arange(99.0)
    assert interval(draws) is None and standard_error(draws) is None
    draws[99] = 99.0
    assert interval(draws) == pytest.approx((2.475, 96.525)) and standard_error(draws) == pytest.approx(29.01, abs=0.01)
