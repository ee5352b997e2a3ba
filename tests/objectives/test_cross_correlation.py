"""The Barlow Twins loss on one process, against formulas written out and published values."""

import math

import pytest
import torch

from prelude.objectives import cross_correlation
from prelude.objectives.cross_correlation import barlow_loss
from prelude.pretrain.batch_norm import normalise_columns

WEIGHT = 0.0051


def inputs(num: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    r, d = torch.arange(num, dtype=torch.float64)[:, None], torch.arange(dim, dtype=torch.float64)
    first = torch.sin(0.7 * (r + 1) + 0.3 * r * d) + 0.05 * d
    return first, first + 0.5 * torch.cos(1.3 * r * (d + 1) + 0.2 * d)


def loss_of(first, second, weight=WEIGHT):
    return barlow_loss(normalise_columns(first), normalise_columns(second), weight, [len(first)])


def naive(first, second, weight=WEIGHT, epsilon=1e-5) -> float:
    """Three loops over plain numbers."""
    num, dim = first.shape
    views = []
    for z in (first.tolist(), second.tolist()):
        columns = list(zip(*z, strict=True))
        means = [sum(column) / num for column in columns]
        spreads = [
            math.sqrt(sum((v - m) ** 2 for v in column) / num + epsilon)
            for column, m in zip(columns, means, strict=True)
        ]
        views.append([[(row[d] - means[d]) / spreads[d] for d in range(dim)] for row in z])
    loss = 0.0
    for i in range(dim):
        for j in range(dim):
            c = sum(a[i] * b[j] for a, b in zip(*views, strict=True)) / num
            loss += (c - 1) ** 2 if i == j else weight * c**2
    return loss


def dense(first, second, weight=WEIGHT):
    """The whole matrix, differentiated by autograd."""
    c = normalise_columns(first).T @ normalise_columns(second) / len(first)
    off = c - torch.diag(c.diagonal())
    return (c.diagonal() - 1).square().sum() + weight * off.square().sum()


@pytest.fixture(params=["columns", "columns in blocks", "samples"])
def way(request, monkeypatch):
    monkeypatch.setattr(cross_correlation, "SAMPLES_BELOW", 1e9 if request.param == "samples" else 0.0)
    if request.param == "columns in blocks":
        monkeypatch.setattr(cross_correlation, "BLOCK_ELEMENTS", 100)  # 3 columns of 32, 12 of 8
    return request.param


PUBLISHED = [  # N, D, on-diagonal, off-diagonal, loss, norms of the gradients by the two views
    (16, 8, 0.0877725199, 1.6477756116, 0.0961761755, 0.0965209431, 0.0904022146),
    (64, 32, 0.3906095480, 19.6659035723, 0.4909056562, 0.1219547115, 0.1043456435),
    (32, 64, 0.8267648475, 182.8129985186, 1.7591111399, 0.3206716788, 0.2512758483),
]


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row[0]}x{row[1]}")
def test_the_reference_values(row, way):
    num, dim, *expected = row
    first, second = (z.requires_grad_() for z in inputs(num, dim))
    terms = loss_of(first, second)
    terms.total.backward()
    ours = [terms.on_diagonal, terms.off_diagonal, terms.total, first.grad.norm(), second.grad.norm()]
    assert [x.item() for x in ours] == pytest.approx(expected, rel=2e-9)


@pytest.mark.parametrize(("num", "dim"), [(7, 5), (6, 6), (4, 9)])
def test_the_loss_is_the_formula_written_out(num, dim, way):
    first, second = inputs(num, dim)
    assert loss_of(first, second).total.item() == pytest.approx(naive(first, second), rel=1e-12)


@pytest.mark.parametrize(("num", "dim"), [(12, 32), (32, 32), (50, 32)])
def test_every_way_has_the_gradient_of_the_dense_matrix(num, dim, way):
    ours, theirs = ([z.clone().requires_grad_() for z in inputs(num, dim)] for _ in range(2))
    loss_of(*ours).total.backward(torch.tensor(0.7, dtype=torch.float64))
    (0.7 * dense(*theirs)).backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-15)


def test_gradcheck_through_standardisation_and_loss(way):
    first, second = (z.requires_grad_() for z in inputs(6, 4))
    assert torch.autograd.gradcheck(lambda a, b: loss_of(a, b, 0.3).total, (first, second))


def test_float32_is_close_to_float64(way):
    exact = loss_of(*inputs(64, 48)).total.item()
    assert loss_of(*(z.float() for z in inputs(64, 48))).total.item() == pytest.approx(exact, rel=2e-6)


def test_identical_views_agree_and_orthogonal_columns_are_not_redundant(way):
    first, _ = inputs(16, 8)
    assert loss_of(first, first).on_diagonal < 1e-8
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    orthogonal = hadamard[:, 1:]  # (16, 15), every column of mean 0
    terms = loss_of(orthogonal, orthogonal)
    assert terms.total < 1e-8
    assert terms.effective_dimensions.item() == pytest.approx(15, rel=1e-6)
    assert terms.off_diagonal_rms < 1e-8


def test_what_leaves_the_loss_unchanged(way):
    first, second = (10 * z for z in inputs(24, 10))  # large against epsilon
    value = loss_of(first, second).total.item()
    scale, shift = torch.linspace(0.5, 3, 10), torch.linspace(-4, 9, 10)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    sign = torch.ones(10, dtype=torch.float64)
    sign[3] = -1
    for a, b in [
        (first * scale + shift, second * scale.flip(0) - shift),
        (first[order], second[order]),
        (second, first),
        (first * sign, second * sign),
    ]:
        assert loss_of(a, b).total.item() == pytest.approx(value, rel=1e-5)
    c = normalise_columns(first).T @ normalise_columns(second) / 24
    flipped = loss_of(first * sign, second).on_diagonal.item()
    expected = loss_of(first, second).on_diagonal - (c[3, 3] - 1) ** 2 + (-c[3, 3] - 1) ** 2
    assert flipped == pytest.approx(expected.item(), rel=1e-5)


def test_the_gradient_leaves_each_column_s_mean_and_scale_alone(way):
    first, second = (100 * z for z in inputs(24, 10))
    first.requires_grad_()
    loss_of(first, second).total.backward()
    size = first.grad.abs().sum(0)
    assert (first.grad.sum(0).abs() < 1e-10 * size).all()
    assert ((first.grad * normalise_columns(first.detach())).sum(0).abs() < 1e-6 * size).all()


def test_a_constant_dimension_costs_exactly_one_on_the_diagonal(way):
    first, second = inputs(64, 8)
    before = loss_of(first[:, 1:], second[:, 1:]).on_diagonal.item()
    for z in (first, second):
        z[:, 0] = 3.0
    assert loss_of(first, second).on_diagonal.item() == pytest.approx(before + 1.0, rel=1e-9)


def test_total_redundancy_shows_in_the_numbers(way):
    one = torch.randn(32, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).expand(-1, 12)
    terms = loss_of(one, one)
    assert terms.off_diagonal_rms.item() == pytest.approx(1, rel=1e-4)
    assert terms.effective_dimensions.item() == pytest.approx(1, rel=1e-4)
    assert terms.diagonal.item() == pytest.approx(1, rel=1e-4)


def test_the_cheaper_way_is_taken(monkeypatch):
    taken = []
    for name in ("_over_samples", "_over_columns"):
        way = getattr(cross_correlation, name)
        monkeypatch.setattr(
            cross_correlation, name, lambda *args, name=name, way=way: (taken.append(name), way(*args))[1]
        )
    for num in (23, 24, 25):
        loss_of(*inputs(num, 32))
    assert taken == ["_over_samples", "_over_samples", "_over_columns"]
