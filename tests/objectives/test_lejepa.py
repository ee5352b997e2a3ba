"""LeJEPA against reference values of the authors' statistic, and around its loss. Uneven ranks: test_ranks.py."""

import pytest
import torch
from rank_cases import Flat

from prelude.data.errors import UserError
from prelude.objectives import check_objective, options_for
from prelude.objectives.building import build_objective
from prelude.objectives.lejepa import LeJEPA
from prelude.objectives.options import LeJEPAOptions
from prelude.objectives.sigreg import Knots, directions, sigreg
from prelude.pretrain.images import images
from prelude.pretrain.recipes import validate_config
from prelude.pretrain.schedules import Progress
from prelude.pretrain.step_cost import blank_batch


def along(dim: int, num: int) -> torch.Tensor:
    d, k = torch.arange(dim, dtype=torch.float64)[:, None], torch.arange(num, dtype=torch.float64)
    columns = torch.cos(1.3 * d * (k + 1) + 0.5 * k) + 0.1
    return columns / columns.norm(dim=0)


def rows(num_views: int, num: int, dim: int) -> torch.Tensor:
    v, n, d = torch.meshgrid(*(torch.arange(x, dtype=torch.float64) for x in (num_views, num, dim)), indexing="ij")
    return 1.4 * torch.sin(0.3 * n + 0.7 * d + 0.11 * n * d) + 0.2 * torch.cos(1.7 * v + 0.5 * n - 0.3 * d)


def lejepa(**options) -> LeJEPA:
    given = {"projector": [8, 8]} | options
    return LeJEPA(Flat(), LeJEPAOptions(**given), image_size=(5, 5), mean=(0.5,) * 3, std=(0.5,) * 3)


def statistic(z, directions, knots=Knots()):  # noqa: B008 (frozen)
    return sigreg(z, directions, knots, [z.shape[1]])


def test_the_directions_of_the_reference_are_ours():
    expected = [0.7237896001, 0.2418107547, -0.4980256437, -0.4118575383]
    assert along(4, 3)[:, 0].tolist() == pytest.approx(expected, abs=6e-11)


@pytest.mark.parametrize(
    ("num", "dim", "count", "values", "norm", "entry"),
    [
        (8, 4, 3, [3.5033569710, 3.5137422164, 3.5143031670], 1.5316820383, 0.0491851309),
        (32, 6, 5, [2.4614014262, 2.4740863886, 2.4747456658], 1.1994160193, 0.1266865751),
    ],
)
def test_the_statistic_and_its_gradient_are_the_reference_values(num, dim, count, values, norm, entry):
    z = rows(1, num, dim).requires_grad_()
    found = [statistic(z, along(dim, count), Knots(num_knots)) for num_knots in (5, 17, 33)]
    assert [value.item() for value in found] == pytest.approx(values, abs=6e-11)
    found[1].backward()
    assert [z.grad.norm().item(), z.grad[0, 0, 0].item()] == pytest.approx([norm, entry], abs=6e-11)


def test_each_direction_is_the_reference_value_and_float32_agrees():
    z, columns = rows(1, 8, 4), along(4, 3)
    found = [statistic(z, columns[:, k, None]).item() for k in range(3)]
    assert found == pytest.approx([4.53807317, 3.38363091, 2.61952257], abs=6e-9)
    assert statistic(z.float(), columns.float()).item() == pytest.approx(3.5137422164, rel=2e-6)


@pytest.mark.parametrize(
    ("num_views", "num_global", "num", "dim", "count", "expected", "norm"),
    [
        (4, 2, 8, 4, 3, [0.0285707436, 3.4746707830, 0.2008757456], 0.0516787911),
        (8, 2, 16, 6, 5, [0.0279256026, 1.7185954700, 0.1124590960], 0.0228840526),
        (4, 4, 8, 4, 3, [0.0197993827, 3.4746707830, 0.1925429527], 0.0442918006),
    ],
)
def test_the_loss_is_the_reference_value(num_views, num_global, num, dim, count, expected, norm):
    objective = lejepa(num_global=num_global, num_local=num_views - num_global)
    z = rows(num_views, num, dim).requires_grad_()
    loss = objective.loss(z, along(dim, count), [num])
    loss.total.backward()
    found = [loss.parts["agreement"].item(), loss.parts["sigreg"].item(), loss.total.item()]
    assert found == pytest.approx(expected, abs=6e-11)
    assert z.grad.norm().item() == pytest.approx(norm, abs=6e-11)


def test_all_views_pooled_into_one_sample_score_in_proportion():
    pooled = rows(4, 8, 4).reshape(1, 32, 4)
    assert statistic(pooled, along(4, 3)).item() == pytest.approx(13.7353407166, abs=6e-11)


def test_the_gradient_is_that_of_the_formula():
    z = rows(2, 6, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: statistic(z, along(4, 3), Knots(5, 2.0)), (z,))


@pytest.mark.parametrize(("num_knots", "value"), [(5, 0.3994142559), (17, 0.4020475797), (33, 0.4021870771)])
def test_zero_rows_score_in_proportion_to_their_number_and_have_no_gradient(num_knots, value):
    z = torch.zeros(1, 8, 4, dtype=torch.float64, requires_grad=True)
    found = statistic(z, along(4, 3), Knots(num_knots))
    found.backward()
    assert found.item() == pytest.approx(8 * value, abs=1e-8) and not z.grad.any()
    assert Knots(num_knots).expected(0.0, 8) == pytest.approx(8 * value, abs=1e-8)


def test_rows_next_to_zero_are_spread():
    z = (1e-3 * torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)).view(1, 8, 1).requires_grad_()
    statistic(z, torch.ones(1, 1)).backward()
    assert z.grad[0, 0, 0].item() == pytest.approx(-0.0030920686, abs=6e-11)


def test_normal_rows_score_what_is_expected_of_every_number():
    assert Knots().expected(1.0, 7) == pytest.approx(1.0524641548, abs=6e-11)
    drawn = torch.randn(500, 256, 1, generator=torch.Generator().manual_seed(0))
    assert statistic(drawn, torch.ones(1, 1)).item() == pytest.approx(1.0524641548, abs=0.06)


def test_what_leaves_the_statistic_unchanged_and_what_does_not():
    z, columns = rows(2, 8, 4), along(4, 3)
    value = statistic(z, columns).item()
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    for changed in [(z @ turn, turn.T @ columns), (z[:, order], columns), (-z, columns), (z, -columns)]:
        assert statistic(*changed).item() == pytest.approx(value, rel=1e-12)
    assert statistic(z.repeat(1, 3, 1), columns).item() == pytest.approx(3 * value, rel=1e-12)
    assert statistic(z + 0.5, columns).item() != pytest.approx(value, rel=0.01)
    objective = lejepa(num_local=0)
    shifted = [objective.loss(each, columns, [8]).parts["agreement"].item() for each in (z, z + 0.5)]
    assert shifted[0] == pytest.approx(shifted[1], rel=1e-12)


def test_equal_views_agree_and_score_as_one():
    z = rows(1, 8, 4)
    parts = lejepa(num_local=0).loss(z.expand(2, -1, -1), along(4, 3), [8]).parts
    assert parts["agreement"].item() < 1e-30
    assert parts["sigreg"].item() == pytest.approx(statistic(z, along(4, 3)).item(), rel=1e-12)


def test_the_centre_is_the_global_views_or_all_and_has_a_gradient():
    z = rows(3, 5, 4)
    found = {
        centre: lejepa(num_local=1, centre=centre).loss(z, along(4, 2), [5]).parts["agreement"].item()
        for centre in ("global", "all")
    }
    assert found["all"] == pytest.approx((z - z.mean(0)).square().mean().item(), rel=1e-12)
    assert found["global"] == pytest.approx((z - z[:2].mean(0)).square().mean().item(), rel=1e-12)


def test_directions_are_unit_and_the_step_s_and_the_run_s_own():
    device = torch.device("cpu")
    drawn = directions(6, 5, 3, 7, device)
    torch.testing.assert_close(drawn.norm(dim=0), torch.ones(5))
    assert torch.equal(drawn, directions(6, 5, 3, 7, device))
    assert not torch.equal(drawn, directions(6, 5, 3, 8, device))
    assert not torch.equal(drawn, directions(6, 5, 4, 7, device))
    state = torch.get_rng_state()
    directions(6, 5, 3, 7, device)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("num_local", "centre"), [(0, "global"), (2, "global"), (2, "all")])
def test_the_trivial_loss_is_that_of_views_with_nothing_in_common(num_local, centre):
    objective = lejepa(num_local=num_local, centre=centre)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2 + num_local, 64, 32, generator=generator, dtype=torch.float64)
    columns = directions(32, 400, 0, 0, torch.device("cpu"))
    losses = [objective.loss(std * noise, columns, [64]).total.item() for std in torch.linspace(0, 1.2, 25)]
    trivial = objective.loss(noise, columns, [64]).parts["trivial_loss"].item()
    assert trivial == pytest.approx(min(losses), rel=0.03)


def test_the_statistic_stays_float32_under_autocast():
    objective, z = lejepa(num_local=0), rows(2, 8, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = objective.loss(z, along(4, 3).float(), [8]).total
    assert lower.dtype == torch.float32
    assert lower.item() == pytest.approx(objective.loss(z.double(), along(4, 3), [8]).total.item(), rel=1e-5)


# ---- views of several sizes


def config(encoder, **objective):
    return validate_config(
        {
            "run_dir": "x",
            "data": {"shards": "x"},
            "encoder": encoder,
            "objective": {"name": "lejepa", "projector": [16, 8], "num_directions": 8} | objective,
            "train": {"epochs": 1, "global_batch": 4},
            "optimizer": {"lr": 1e-3},
        },
        "a test",
        options_for,
    )


VIT = {
    "name": "vit_tiny_patch16_224",
    "image_size": 32,
    "patch_size": 4,
    "kwargs": {"depth": 1, "embed_dim": 16, "num_heads": 2, "dynamic_img_size": True},
}
RESNET = {"name": "resnet10t", "image_size": 32, "kwargs": {"channels": [4, 6, 8, 12], "stem_width": 8}}


@pytest.mark.parametrize(("encoder", "local"), [(VIT, 12), (RESNET, 14)])
def test_small_views_belong_to_the_plan_and_train_the_same_encoder(encoder, local):
    settings = config(encoder)
    check_objective(settings)
    objective = build_objective(settings)
    assert [view.size[0] for view in objective.views.views] == [32] * 2 + [local] * 6
    assert {view.scale for view in objective.views.views} == {(0.3, 1.0), (0.05, 0.3)}
    batch = blank_batch(objective.views, 4)
    for v, view in enumerate(batch.views):
        view.copy_(torch.randint(0, 256, view.shape, generator=torch.Generator().manual_seed(v)))
    loss = objective(batch, Progress(0, 10, 1.0))
    loss.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())
    assert objective.pictures(batch)["views"].size == (8 * 34 - 2, 4 * 34 - 2)


def test_views_of_one_size_are_encoded_together_and_all_projected_together():
    objective = build_objective(config(VIT))
    seen = []
    objective.encoder.register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape)))
    objective.projector.register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape)))
    batch = blank_batch(objective.views, 4)
    objective(batch, Progress(0, 10, 1.0))
    assert seen == [(8, 3, 32, 32), (24, 3, 12, 12), (32, 16)]
    assert [len(view) for view in images(batch, objective.views)] == [4] * 8


def test_an_encoder_of_one_size_is_refused_small_views_and_takes_large_ones():
    fixed = VIT | {"kwargs": VIT["kwargs"] | {"dynamic_img_size": False}}
    with pytest.raises(UserError, match=r"takes no local views of 12 x 12 .*dynamic_img_size: true"):
        check_objective(config(fixed))
    check_objective(config(fixed, num_local=0, num_global=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_global": 1, "num_local": 0}, "nothing to agree with"),
        ({"num_local": 0, "local_size": 16}, "no effect at num_local=0"),
        ({"colours": {"blurr": 1}}, "did you mean objective.colours.blur"),
        ({"projector": [4, 1]}, "write the widths of one or more layers"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        config(VIT, **options)
