"""MSBReg against its formulas and reference values. Uneven ranks: tests/pretrain/test_ranks.py."""

import math

import pytest
import torch
from rank_cases import Flat
from torch import nn

from prelude.data.batch import Batch
from prelude.launch.made_up_data import made_up_batch
from prelude.objectives import cross_correlation, embedding_dynamics
from prelude.objectives.barlow_twins import BarlowTwins
from prelude.objectives.embedding_dynamics import brownian, kicks, singular_values, unit
from prelude.objectives.lejepa import LeJEPA
from prelude.objectives.msbreg import MSBReg
from prelude.objectives.options import BarlowTwinsOptions, LeJEPAOptions, MSBRegOptions, VICRegOptions
from prelude.objectives.vicreg import VICReg
from prelude.pretrain.schedules import Progress

SIZE = {"image_size": (5, 5), "mean": (0.5,) * 3, "std": (0.5,) * 3}
NUM_STEPS = 8


def msbreg(encoder=None, **options) -> MSBReg:
    torch.manual_seed(0)
    return MSBReg(encoder or Flat(), MSBRegOptions(**{"projector": [8, 6], "predictor": [8]} | options), **SIZE)


def rows(num: int, views: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    b, v = (torch.arange(n, dtype=torch.float64) for n in (num, views))
    b, v, d = b[None, :, None], v[:, None, None], torch.arange(dim, dtype=torch.float64)
    q = torch.sin(0.3 * b + 0.5 * v + 0.7 * d + 0.11 * b * d) + 0.2 * torch.cos(1.1 * v * d)
    t = torch.sin(0.3 * b + 0.45 * v + 0.7 * d + 0.11 * b * d + 0.2)
    return q, t, unit(torch.cos(0.9 * b[0] + 1.7 * d))


@pytest.fixture(params=["columns", "columns in blocks", "samples"])
def way(request, monkeypatch):
    monkeypatch.setattr(cross_correlation, "SAMPLES_BELOW", 1e9 if request.param == "samples" else 0.0)
    if request.param == "columns in blocks":
        monkeypatch.setattr(cross_correlation, "BLOCK_ELEMENTS", 24)


REFERENCE = [  # B, V, D; centroid by views and of means, singular values, brownian, loss; norms of their gradients
    (6, 3, 5, 0.2178153079, 0.0166335764, 1.1844353667, -0.1735415083, 0.2478385717),
    (4, 2, 16, 0.1455476531, 0.0234003651, 3.8715913026, -0.0331006598, 0.2971012393),
]
NORMS = [
    (0.1200572359, 0.0255460982, 0.3609718020, 0.1270221832, 0.1213337123),
    (0.0878447700, 0.0262975350, 0.6528453470, 0.1184104721, 0.0823458089),
]


@pytest.mark.parametrize(("row", "norms"), zip(REFERENCE, NORMS, strict=True), ids=["6x3x5", "4x2x16"])
def test_the_reference_values(row, norms, way):
    num, views, dim, *expected = row
    q, t, directions = rows(num, views, dim)

    def of_means(q):
        return msbreg(num_views=views, centroid="mean")._centroid_term(unit(q), unit(t), [num])

    def whole(q):
        return msbreg(num_views=views).loss(q, t, directions, [num]).total

    terms = [
        lambda q: msbreg(num_views=views)._centroid_term(unit(q), unit(t), [num]),
        of_means,
        lambda q: singular_values(unit(q), [num]),
        lambda q: brownian(unit(q), directions, [num]),
        whole,
    ]
    for term, value, norm in zip(terms, expected, norms, strict=True):
        leaf = q.clone().requires_grad_()
        found = term(leaf)
        found.backward()
        assert [found.item(), leaf.grad.norm().item()] == pytest.approx([value, norm], abs=6e-11)
        assert ((leaf.grad * q).sum(-1).abs() < 1e-12).all()  # a length says nothing


def test_singular_values_are_those_of_an_svd_and_of_the_covariance(way):
    q = unit(rows(6, 3, 5)[0])
    stacked = q.flatten(0, 1)
    of_svd = 5 * (torch.linalg.svdvals(stacked).square() / 18).square().sum() - 1
    of_matrix = 5 * (stacked.T @ stacked / 18 - torch.eye(5, dtype=q.dtype) / 5).square().sum()
    found = singular_values(q, [6]).item()
    assert found == pytest.approx(of_svd.item(), abs=1e-12) and found == pytest.approx(of_matrix.item(), abs=1e-12)
    assert torch.autograd.gradcheck(lambda rows: singular_values(rows, [6]), (q.requires_grad_(),))
    line = torch.ones(2, 4, 5, dtype=torch.float64) / 5**0.5
    assert singular_values(line, [4]).item() == pytest.approx(4)  # D - 1
    equal = torch.eye(5, dtype=torch.float64).repeat(2, 1)[None]
    assert singular_values(equal, [10]).item() == pytest.approx(0, abs=1e-12)


def test_lengths_change_nothing_nor_does_a_common_rotation():
    q, t, directions = rows(6, 3, 5)
    objective = msbreg(num_views=3)
    value = objective.loss(q, t, directions, [6]).total.item()
    lengths = torch.linspace(0.3, 4, 18, dtype=torch.float64).view(3, 6, 1)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    for pair in [(lengths * q, t), (q, lengths * t)]:
        assert objective.loss(*pair, directions, [6]).total.item() == pytest.approx(value, rel=1e-12)
    assert objective.loss(q @ turn, t @ turn, directions @ turn, [6]).total.item() == pytest.approx(value, rel=1e-12)


def test_views_at_the_centroid_cost_nothing_and_of_one_view_it_is_byol():
    q, t, directions = rows(6, 3, 5)
    centre = unit(unit(t).mean(0)).expand(3, -1, -1)
    assert msbreg(num_views=3)._centroid_term(centre, unit(t), [6]).item() == pytest.approx(0, abs=1e-12)
    byol = (2 - 2 * nn.functional.cosine_similarity(q[0], t[0], dim=-1)).mean().item()
    assert msbreg()._centroid_term(unit(q[:1]), unit(t[:1]), [6]).item() == pytest.approx(byol, rel=1e-12)


# ---- Brownian motion


def test_kicks_are_functions_of_a_samples_seed_and_uniform_on_the_sphere():
    seeds = torch.arange(6000) * 7919
    drawn = kicks(seeds, 5)
    assert torch.equal(kicks(seeds[1000:1010], 5), drawn[1000:1010]) and drawn.dtype == torch.float32
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(6000))
    assert drawn.mean(0).abs().max() < 0.02
    torch.testing.assert_close(drawn.T @ drawn / 6000, torch.eye(5) / 5, atol=0.01, rtol=0)
    share = (drawn[:, 0].abs() < 0.1).float().mean().item()
    assert share == pytest.approx(0.1495, abs=0.02)  # 3 / 2 * (x - x^3 / 3) at 0.1


def test_views_of_an_image_are_kicked_alike_and_images_apart():
    batch = made_up_batch(torch.arange(6), msbreg().views, 16)
    objective, seen = msbreg(), []
    objective.loss = lambda q, t, directions, counts: (
        seen.append(directions) or MSBReg.loss(objective, q, t, directions, counts)
    )
    objective(batch, Progress(0, NUM_STEPS, 4.0))
    objective(made_up_batch(torch.arange(6, 12), objective.views, 16), Progress(1, NUM_STEPS, 4.0))
    assert seen[0].shape == (6, 6) and torch.equal(seen[0], kicks(batch.seeds, 6))
    assert (seen[0] @ seen[1].T).abs().max() < 0.999  # another sample, another step


# ---- the teacher


class Normed(nn.Sequential):
    num_features = head_hidden_size = 8

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(75, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))


def step_of(objective, step: int, applied: float = 1.0) -> Batch:
    batch = made_up_batch(8 * step + torch.arange(8), objective.views, 16)
    objective(batch, Progress(step, NUM_STEPS, 4.0)).total.backward()
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    objective.after_step(Progress(step + 1, NUM_STEPS, 4.0), torch.tensor(applied))
    return batch


def test_the_teacher_follows_with_the_momentum_of_half_a_cosine():
    objective = msbreg(Normed(), momentum=0.6)
    wanted = {name: p.clone() for name, p in objective.teacher.named_parameters()}
    for step in range(NUM_STEPS):
        step_of(objective, step)
        momentum = 1 - (1 - 0.6) * (1 + math.cos(math.pi * step / NUM_STEPS)) / 2
        for name, p in objective.encoder.named_parameters():
            wanted[name] = momentum * wanted[name] + (1 - momentum) * p
    for name, p in objective.teacher.named_parameters():
        torch.testing.assert_close(p, wanted[name])
        assert p.grad is None and not p.requires_grad


def test_a_refused_step_leaves_the_teacher_alone():
    objective = msbreg(Normed())
    before = [p.clone() for p in objective.teacher.parameters()]
    step_of(objective, 0, applied=0.0)
    assert all(torch.equal(p, was) for p, was in zip(objective.teacher.parameters(), before, strict=True))


def test_the_teachers_norms_see_its_own_batch_and_nothing_is_dropped():
    objective = msbreg(Normed())  # as an engine gets it
    assert [module.training for module in objective.teacher.children()] == [False, False, True, False]
    step_of(objective, 0)
    norm, of_student = objective.teacher[2], objective.encoder[2]
    assert norm.num_batches_tracked == 2  # one forward pass a view
    step_of(objective, 1)
    assert not torch.equal(norm.running_mean, of_student.running_mean)
    assert not any(module.training for module in objective.eval().teacher.modules())


# ---- beside other objectives


OTHERS = [
    (BarlowTwins, BarlowTwinsOptions, {}),
    (VICReg, VICRegOptions, {}),
    (LeJEPA, LeJEPAOptions, {"num_local": 0, "num_global": 3}),
]


@pytest.mark.parametrize(("cls", "options", "more"), OTHERS, ids=lambda value: getattr(value, "__name__", ""))
def test_the_two_terms_stand_beside_other_losses(cls, options, more):
    def built(**weights):
        torch.manual_seed(0)
        return cls(Flat(), options(projector=[8, 6], **more, **weights), **SIZE)

    plain, both = built(), built(singular_value_weight=0.5, brownian_weight=0.25)
    batch, progress, seen = made_up_batch(torch.arange(8), plain.views, 16), Progress(0, NUM_STEPS, 4.0), []
    both.projector.register_forward_hook(lambda module, given, result: seen.append(result.detach()))
    one, other = plain(batch, progress), both(batch, progress)
    z = unit(torch.cat(seen).unflatten(0, (-1, 8)))
    dispersion, kick = singular_values(z, [8]), brownian(z, kicks(batch.seeds, 6), [8])
    assert other.total.item() == pytest.approx((one.total + 0.5 * dispersion + 0.25 * kick).item(), rel=1e-6)
    assert [other.parts[name].item() for name in ("singular_values", "brownian")] == pytest.approx(
        [dispersion.item(), kick.item()], rel=1e-5
    )
    assert "brownian" not in one.parts and other.parts["trivial_loss"] > one.parts["trivial_loss"]


def test_bf16_embeddings_are_taken_as_float32():
    q, t, directions = (rows.bfloat16() for rows in rows(6, 3, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = msbreg(num_views=3).loss(q, t, directions.float(), [6]).total
    exact = msbreg(num_views=3).loss(q.double(), t.double(), directions.double(), [6]).total
    assert total.dtype == torch.float32 and total.item() == pytest.approx(exact.item(), rel=1e-5)


def test_the_cheaper_way_is_taken(monkeypatch):
    taken = []
    for name in ("_over_samples", "_over_columns"):
        way = getattr(embedding_dynamics, name)
        monkeypatch.setattr(
            embedding_dynamics, name, lambda *args, name=name, way=way: taken.append(name) or way(*args)
        )
    for num in (11, 12, 13):  # of two views
        singular_values(unit(rows(num, 2, 32)[0]), [num])
    assert taken == ["_over_samples", "_over_samples", "_over_columns"]
