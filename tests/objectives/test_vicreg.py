"""VICReg against its published formula and reference values. Uneven ranks: tests/pretrain/test_ranks.py."""

import pytest
import torch
from rank_cases import Flat
from torch import nn

from prelude.objectives import covariance, cross_correlation
from prelude.objectives.covariance import spread
from prelude.objectives.options import VICRegOptions
from prelude.objectives.vicreg import VICReg


def vicreg(**options) -> VICReg:
    return VICReg(Flat(), VICRegOptions(**options), image_size=(5, 5), mean=(0.5,) * 3, std=(0.5,) * 3)


def views(num: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    n, d = torch.arange(num, dtype=torch.float64)[:, None], torch.arange(dim, dtype=torch.float64)
    first = torch.sin(0.3 * n + 0.7 * d + 0.11 * n * d)
    return first, first + 0.25 * torch.cos(0.9 * n - 0.4 * d)


@pytest.fixture(scope="module")
def objective():
    return vicreg(projector=[8, 8])


@pytest.fixture(params=["columns", "columns in blocks", "samples"])
def way(request, monkeypatch):
    monkeypatch.setattr(cross_correlation, "SAMPLES_BELOW", 1e9 if request.param == "samples" else 0.0)
    if request.param == "columns in blocks":
        monkeypatch.setattr(cross_correlation, "BLOCK_ELEMENTS", 24)


def terms(objective, first, second):
    loss = objective.loss(first, second, [len(first)])
    parts = {name: value.item() for name, value in loss.parts.items()}
    return loss.total, [parts["invariance"], parts["variance"], parts["covariance"]]


REFERENCE = [  # N, D; invariance, variance, covariance, total, norms of the gradients by the two views
    (8, 4, 0.0322099760, 0.3859693315, 0.4536520692, 10.9081347590, 2.7757852652, 2.0884748961),
    (16, 8, 0.0312631416, 0.2656468732, 0.3477065291, 7.7704568998, 1.3542755590, 1.1554208687),
    (6, 12, 0.0323398362, 0.3180088321, 1.9419565554, 10.7006732638, 1.4959422723, 1.3319412605),
]


@pytest.mark.parametrize("row", REFERENCE, ids=lambda row: f"{row[0]}x{row[1]}")
def test_the_reference_values(objective, row, way):
    num, dim, *expected = row
    first, second = (z.requires_grad_() for z in views(num, dim))
    total, found = terms(objective, first, second)
    total.backward()
    found += [total.item(), first.grad.norm().item(), second.grad.norm().item()]
    assert found == pytest.approx(expected, abs=6e-11)
    if num == 8:
        entries = [first.grad[0, 0].item(), second.grad[1, 1].item()]
        assert entries == pytest.approx([0.3713819897, -0.0948914697], abs=6e-11)


def test_wide_embeddings_have_no_hinge_and_its_gradient_is_zero(objective, way):
    first, second = (3 * z for z in views(16, 8))
    total, (_, variance, _) = terms(objective, first, second)
    assert variance == 0 and total.item() == pytest.approx(35.1984357241, abs=6e-11)
    first.requires_grad_()
    spread(first, [16]).variance.backward()
    assert not first.grad.any()


def test_both_ways_have_the_gradient_of_the_whole_matrix(way):
    first, _ = views(9, 7)
    ours, theirs = first.clone().requires_grad_(), first.clone().requires_grad_()
    spread(ours, [9]).covariance.backward(torch.tensor(0.7, dtype=torch.float64))
    matrix = torch.cov(theirs.T)
    (0.7 * (matrix - torch.diag(matrix.diagonal())).square().sum() / 7).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-15)
    assert torch.autograd.gradcheck(lambda z: spread(z, [9]).covariance, (ours,))


def test_a_shift_of_both_views_changes_nothing_and_of_one_only_the_invariance(objective):
    first, second = views(16, 8)
    shift = torch.linspace(-3, 4, 8, dtype=torch.float64)
    before, together, apart = (
        terms(objective, *z)[1] for z in [(first, second), (first + shift, second + shift), (first + shift, second)]
    )
    assert together == pytest.approx(before, rel=1e-9)
    assert apart[1:] == pytest.approx(before[1:], rel=1e-9) and apart[0] != pytest.approx(before[0], rel=0.1)


def test_the_gradient_of_each_view_s_terms_sums_to_zero_over_rows_and_invariance_pulls_alike():
    objective = vicreg(projector=[8, 8], invariance_weight=0)
    first, second = (z.requires_grad_() for z in views(16, 8))
    terms(objective, first, second)[0].backward()
    assert (first.grad.sum(0).abs() < 1e-12).all() and (second.grad.sum(0).abs() < 1e-12).all()
    objective = vicreg(projector=[8, 8], variance_weight=0, covariance_weight=0)
    first, second = (z.requires_grad_() for z in views(16, 8))
    terms(objective, first, second)[0].backward()
    torch.testing.assert_close(first.grad, -second.grad)


def test_what_leaves_the_loss_unchanged(objective, way):
    first, second = views(16, 8)
    value = terms(objective, first, second)[0].item()
    rows, columns = (torch.randperm(n, generator=torch.Generator().manual_seed(0)) for n in (16, 8))
    for pair in [(second, first), (first[rows], second[rows]), (first[:, columns], second[:, columns])]:
        assert terms(objective, *pair)[0].item() == pytest.approx(value, rel=1e-12)


def test_constant_embeddings_cost_the_whole_hinge_and_one_dimension_has_no_covariance(objective):
    constant = torch.ones(12, 6, dtype=torch.float64)
    total, (invariance, variance, covariance_) = terms(objective, constant, constant)
    assert [total.item(), invariance, variance, covariance_] == pytest.approx([24.75, 0, 0.99, 0], abs=1e-12)
    assert spread(views(16, 1)[0], [16]).covariance.abs() < 1e-15


def test_scaling_both_views_scales_the_terms(objective):
    first, second = views(16, 8)
    one, three = terms(objective, first, second)[1], terms(objective, 3 * first, 3 * second)[1]
    assert [three[0], three[2]] == pytest.approx([9 * one[0], 81 * one[2]], rel=1e-10)


def test_float32_is_close_to_float64_and_bf16_is_taken_as_float32(objective, way):
    first, second = views(64, 48)
    exact = terms(objective, first, second)[0].item()
    assert terms(objective, first.float(), second.float())[0].item() == pytest.approx(exact, rel=1e-5)
    lower = [z.bfloat16() for z in (first, second)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = terms(objective, *lower)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(terms(objective, *(z.double() for z in lower))[0].item(), rel=1e-5)


def test_the_trivial_loss_is_that_of_views_with_nothing_in_common(objective):
    """The cheapest spread, tried out on normal numbers."""
    num, dim = 400, 8
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(num, dim, generator=generator, dtype=torch.float64) for _ in range(2)]
    losses = [terms(objective, *(std * z for z in noise))[0].item() for std in torch.linspace(0, 0.6, 25)]
    trivial = objective.loss(*noise, [num]).parts["trivial_loss"].item()
    assert trivial == pytest.approx(min(losses), rel=0.01)


def test_total_redundancy_shows_in_the_numbers(objective):
    one = torch.randn(32, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).expand(-1, 12)
    parts = objective.loss(one, one, [32]).parts
    assert parts["effective_dimensions"].item() == pytest.approx(1, rel=1e-9)
    assert parts["embedding_rank_share"].item() == pytest.approx(0, abs=1e-9)


def test_the_expander_has_biases_but_for_its_last_layer():
    layers = [layer for layer in vicreg(projector=[24, 20, 16]).projector if isinstance(layer, nn.Linear)]
    assert [layer.bias is not None for layer in layers] == [True, True, False]


def test_the_cheaper_way_is_taken(monkeypatch):
    taken = []
    for name in ("_over_samples", "_over_columns"):
        way = getattr(covariance, name)
        monkeypatch.setattr(covariance, name, lambda *args, name=name, way=way: (taken.append(name), way(*args))[1])
    for num in (23, 24, 25):
        spread(views(num, 32)[0], [num])
    assert taken == ["_over_samples", "_over_samples", "_over_columns"]
