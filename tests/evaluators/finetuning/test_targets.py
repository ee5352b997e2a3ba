"""Targets and losses against loops over single answers, and scikit-learn's balanced weights."""

import math

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from prelude.data.errors import UserError
from prelude.evaluators.finetuning.targets import (
    class_targets,
    finding_targets,
    sigmoid_loss,
    softmax_loss,
    weights_of_classes,
    weights_of_findings,
)

NAN, UNCERTAIN = math.nan, -1.0
ANSWERS = torch.tensor([[1, 0, UNCERTAIN], [UNCERTAIN, NAN, 1], [0, 1, NAN], [1, UNCERTAIN, 0], [NAN, NAN, NAN]])
SEEDS = torch.arange(5) * 7919 + 11
LOGITS = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.tensor([[1.0, 0.5, 2.0], [3.0, 1.0, 0.25]])  # of absence, of presence
INSTEAD = {"ignore": NAN, "zeros": 0.0, "ones": 1.0}


def loss_by_loop(logits, targets, weights):
    """One answer after the other."""
    total = 0.0
    for row, wanted in zip(logits.double().tolist(), targets.double().tolist(), strict=True):
        for column, (x, y) in enumerate(zip(row, wanted, strict=True)):
            if math.isnan(y):
                continue
            absence, presence = (1.0, 1.0) if weights is None else weights[:, column].tolist()
            p = 1 / (1 + math.exp(-x))
            total -= presence * y * math.log(p) + absence * (1 - y) * math.log(1 - p)
    return total / logits.numel()


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
@pytest.mark.parametrize("policy", INSTEAD)
def test_the_loss_of_findings_is_that_of_a_loop_over_answers(policy, weights):
    targets = torch.tensor([[INSTEAD[policy] if y == UNCERTAIN else y for y in row] for row in ANSWERS.tolist()])
    found = finding_targets(ANSWERS, SEEDS, policy, smoothing=0.0)
    torch.testing.assert_close(found, targets, equal_nan=True)
    expected = loss_by_loop(LOGITS, targets, weights)
    assert sigmoid_loss(LOGITS, found, weights).item() == pytest.approx(expected, rel=1e-5)


def test_a_smoothed_answer_is_drawn_by_its_sample_and_finding_alone():
    uncertain = torch.full((2000, 2), UNCERTAIN)
    seeds = torch.arange(2000) * 7919
    drawn = finding_targets(uncertain, seeds, "smoothed", 0.0)
    assert 0.55 <= drawn.min() < 0.56 and 0.84 < drawn.max() <= 0.85
    assert drawn.mean().item() == pytest.approx(0.7, abs=0.005)
    assert (drawn[:, 0] != drawn[:, 1]).float().mean() > 0.99
    assert torch.equal(finding_targets(uncertain[5:9], seeds[5:9], "smoothed", 0.0), drawn[5:9])
    certain = finding_targets(ANSWERS, SEEDS, "smoothed", 0.0)
    sure = (ANSWERS == 0) | (ANSWERS == 1)
    assert torch.equal(certain[sure], ANSWERS[sure]) and torch.equal(certain.isnan(), ANSWERS.isnan())


def test_what_is_not_known_moves_nothing():
    logits = LOGITS.clone().requires_grad_()
    sigmoid_loss(logits, finding_targets(ANSWERS, SEEDS, "ignore", 0.0)).backward()
    assert torch.equal(logits.grad == 0, ANSWERS.isnan() | (ANSWERS == UNCERTAIN))


def test_smoothed_findings_lie_between_no_and_yes():
    found = finding_targets(torch.tensor([[1.0, 0.0]]), SEEDS[:1], "ignore", smoothing=0.1)
    assert found[0].tolist() == pytest.approx([0.95, 0.05])


def test_weighted_classes_are_those_of_a_loop_over_samples():
    classes, weights = torch.tensor([2, 5, 9]), torch.tensor([0.5, 3.0, 1.0])
    labels = torch.tensor([9, 2, 5, 5, 2])
    targets = class_targets(labels, classes, 0.1)
    expected = 0.0
    for logits, target in zip(LOGITS.double(), targets.double(), strict=True):
        share = logits.exp() / logits.exp().sum()
        expected -= sum(w * y * math.log(p) for w, y, p in zip(weights.tolist(), target, share, strict=True))
    assert softmax_loss(LOGITS, targets, weights).item() == pytest.approx(float(expected) / 5, rel=1e-5)


def test_two_halves_of_a_batch_have_the_loss_of_the_whole():
    """Ranks average theirs: a divisor that depends on what a half knows, or weighs, would change what is trained."""
    targets = finding_targets(ANSWERS[:4], SEEDS[:4], "ignore", 0.0)
    halves = [sigmoid_loss(LOGITS[i : i + 2], targets[i : i + 2], WEIGHTS) for i in (0, 2)]
    torch.testing.assert_close(sum(halves) / 2, sigmoid_loss(LOGITS[:4], targets, WEIGHTS))


def test_balanced_weights_are_scikit_learns():
    labels = torch.tensor([2] * 5 + [7] + [9] * 14)
    expected = compute_class_weight("balanced", classes=np.array([2, 7, 9]), y=labels.numpy())
    found = weights_of_classes("balanced", labels, labels.unique(), ())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_presence_and_absence_of_a_finding_are_balanced_as_two_classes_are():
    answers = torch.tensor([[1, 0, 1], [1, 0, NAN], [0, 0, 0], [1, NAN, 0], [1, 0, NAN]])
    found = weights_of_findings("balanced", answers, "abc")
    for column in (0, 2):
        known = answers[:, column][answers[:, column].isfinite()].numpy()
        expected = compute_class_weight("balanced", classes=np.array([0, 1]), y=known)
        np.testing.assert_allclose(found[:, column].numpy(), expected, rtol=1e-6)
    assert found[:, 1].tolist() == [1, 1]  # never present: there is nothing to balance


def test_weights_are_given_by_name():
    labels = torch.tensor([0, 1, 1, 2])
    assert weights_of_classes({"cat": 3, "dog": 0.5}, labels, labels.unique(), ("cat", "dog", "eel")).tolist() == [
        3.0,
        0.5,
        1.0,
    ]
    assert weights_of_classes({2: 3}, labels, labels.unique(), ()).tolist() == [1, 1, 3]
    assert weights_of_findings({"b": 2.5}, ANSWERS, "abc").tolist() == [[1, 1, 1], [1, 2.5, 1]]
    with pytest.raises(UserError, match=r"names 'd', which is not one of the findings; write some of a, b, c\."):
        weights_of_findings({"d": 2.5}, ANSWERS, "abc")
