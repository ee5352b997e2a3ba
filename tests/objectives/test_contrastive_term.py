"""VICReg as a second term, against its formula in numpy, and beside DSeq-JEPA. Two ranks: see test_at_two_ranks.py."""

import numpy as np
import pytest
import torch
from jepa_models import a_batch, tiny
from pydantic import ValidationError

from prelude.objectives.contrastive_term import BlockTerm, ContrastiveTerm
from prelude.objectives.covariance import spread
from prelude.objectives.dseqjepa import DSeqJEPA, DSeqJEPAOptions
from prelude.objectives.ijepa import IJEPA
from prelude.pretrain.schedules import Progress

MIDDLE = Progress(60, 100, 10.0)
WIDTHS = {"contrastive_projector": [12, 10]}


def by_hand(first: np.ndarray, second: np.ndarray) -> float:
    total = 25 * ((first - second) ** 2).mean()
    for z in (first, second):
        covariance = np.cov(z, rowvar=False)
        total += 25 / 2 * np.maximum(0, 1 - np.sqrt(np.diag(covariance) + 1e-4)).mean()
        total += (covariance**2).sum() / z.shape[1] - (np.diag(covariance) ** 2).sum() / z.shape[1]
    return total


def test_the_loss_is_its_formula():
    torch.manual_seed(0)
    term = ContrastiveTerm(6, [9, 7]).double()
    predicted, target = torch.randn(11, 6).double(), torch.randn(11, 6).double()
    sides = [term.projector(side).detach().numpy() for side in (predicted, target)]
    assert term(predicted, target).item() == pytest.approx(by_hand(*sides), rel=1e-9)


def test_features_that_are_all_alike_cost_the_whole_hinge():
    term = ContrastiveTerm(6, [7]).double()
    same = torch.ones(5, 6).double()
    assert term(same, same).item() == pytest.approx(25 * (1 - 0.01), rel=1e-6)


@pytest.mark.parametrize("context", ["causal", "reencode"])
def test_it_compares_each_images_mean_prediction_with_its_mean_target(context, monkeypatch):
    seen = []
    monkeypatch.setattr(ContrastiveTerm, "forward", lambda self, *sides: seen.append(sides) or sides[0].sum() * 0)
    model = tiny(DSeqJEPA, contrastive_weight=0.001, context=context, lambda_granularity="sample", **WIDTHS)
    batch = a_batch(6)
    model(batch, MIDDLE)
    together = [side.detach() for side in seen[0]]
    for row in range(6):  # an image alone has the same means, whatever group it was computed in
        model(batch._map(lambda tensor, row=row: tensor[row : row + 1]), MIDDLE)
        for whole, alone in zip(together, seen[-1], strict=True):
            torch.testing.assert_close(whole[row], alone[0], atol=1e-5, rtol=1e-4)


def test_it_is_weighed_into_the_loss_and_trains_its_projector():
    model = tiny(DSeqJEPA, contrastive_weight=0.01, **WIDTHS)
    loss = model(a_batch(6), MIDDLE)
    assert loss.total.item() == pytest.approx((loss.parts["prediction"] + 0.01 * loss.parts["contrastive"]).item())
    loss.total.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.vicreg.parameters() if p.ndim == 2)


def test_a_statistic_of_the_batch_is_not_accumulated():
    assert tiny(DSeqJEPA).accumulates and not tiny(DSeqJEPA, contrastive_weight=0.001, **WIDTHS).accumulates


def test_a_projector_that_nothing_reads_is_refused():
    with pytest.raises(ValidationError, match="contrastive_projector has no effect"):
        DSeqJEPAOptions(contrastive_projector=[8])


def blocks_of_the_reference() -> tuple[torch.Tensor, torch.Tensor]:
    b, m, d = torch.meshgrid(*(torch.arange(x, dtype=torch.float64) for x in (8, 3, 4)), indexing="ij")
    predicted = torch.sin(0.3 * b + 0.9 * m + 0.7 * d + 0.11 * b * d)
    return predicted, predicted + 0.25 * torch.cos(0.9 * b - 0.4 * d + m)


def test_the_term_of_blocks_is_the_reference_value():
    predicted, target = blocks_of_the_reference()
    predicted.requires_grad_()
    total = BlockTerm(4, [])(predicted, target)
    total.backward()
    assert total.item() == pytest.approx(20.7947616506, abs=6e-11)
    assert predicted.grad.norm().item() == pytest.approx(5.3175223765, abs=6e-11)
    spreads = [spread(block, [8]) for block in predicted.detach().unbind(1)]
    assert sum(s.variance for s in spreads).item() / 3 == pytest.approx(0.3922195984, abs=6e-11)
    assert sum(s.covariance for s in spreads).item() / 3 == pytest.approx(0.2000509800, abs=6e-11)


def test_the_term_of_blocks_is_weighed_into_i_jepa_and_reaches_encoder_and_predictor():
    model = tiny(IJEPA, contrastive_weight=0.01)
    loss = model(a_batch(6), MIDDLE)
    assert loss.total.item() == pytest.approx((loss.parts["prediction"] + 0.01 * loss.parts["contrastive"]).item())
    plain = tiny(IJEPA)
    assert loss.parts["prediction"].item() == pytest.approx(plain(a_batch(6), MIDDLE).total.item())
    gradients = []
    for each in (model, plain):
        each(a_batch(6), MIDDLE).total.backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert any(not torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[1] if "encoder." in name)
    assert not model.accumulates and plain.accumulates
    assert not any(p.requires_grad for p in model.teacher.parameters())


def test_a_projector_of_blocks_is_trained_where_it_is_asked_for():
    model = tiny(IJEPA, contrastive_weight=0.01, contrastive_projector=[8, 6])
    model(a_batch(6), MIDDLE).total.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.vicreg.parameters() if p.ndim == 2)
