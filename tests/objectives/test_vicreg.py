"""VICReg against its formula in numpy, and beside DSeq-JEPA. Two ranks: see test_jepa_ranks.py."""

import numpy as np
import pytest
import torch
from jepa_models import a_batch, tiny
from pydantic import ValidationError

from prelude.objectives.dseqjepa import DSeqJEPA, DSeqJEPAOptions
from prelude.objectives.vicreg import VICReg
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
    term = VICReg(6, [9, 7]).double()
    predicted, target = torch.randn(11, 6).double(), torch.randn(11, 6).double()
    sides = [term.projector(side).detach().numpy() for side in (predicted, target)]
    assert term(predicted, target).item() == pytest.approx(by_hand(*sides), rel=1e-9)


def test_features_that_are_all_alike_cost_the_whole_hinge():
    term = VICReg(6, [7]).double()
    same = torch.ones(5, 6).double()
    assert term(same, same).item() == pytest.approx(25 * (1 - 0.01), rel=1e-6)


@pytest.mark.parametrize("context", ["causal", "reencode"])
def test_it_compares_each_images_mean_prediction_with_its_mean_target(context, monkeypatch):
    seen = []
    monkeypatch.setattr(VICReg, "forward", lambda self, *sides: seen.append(sides) or sides[0].sum() * 0)
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
