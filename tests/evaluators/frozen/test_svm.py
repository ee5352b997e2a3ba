"""Support vector machines against liblinear."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.svm import LinearSVC

from prelude.data.errors import UserError
from prelude.evaluators.frozen.convex import Space
from prelude.evaluators.frozen.svm import HingeLoss, _each, svm


def liblinear(values, labels, c):
    """Its bias is punished as a weight of a constant; a large constant makes that nothing."""
    return LinearSVC(C=c, loss="squared_hinge", dual=False, intercept_scaling=1e3, tol=1e-9, max_iter=100_000).fit(
        values, labels
    )


@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_machines_are_those_of_liblinear(c, classes):
    values, labels = classes(300, 12, 4, seed=1, noise=2.0)
    values = torch.nn.functional.normalize(values, dim=1)
    wanted = (torch.arange(4) == labels[:, None]).float()
    ((_, heads),) = _each(Space.of(values, "none"), HingeLoss(wanted), (c,), None)
    expected = liblinear(values.double().numpy(), labels.numpy(), c).decision_function(values.double().numpy())
    assert heads.converged == [True]
    assert np.abs(heads.logits(values)[0].numpy() - expected).max() < 0.01 * np.abs(expected).max()


def test_numbers_of_classes_and_the_choice_of_c(problem):
    train, test = ({"mean": part["mean"]} for part in problem)
    outcome = svm(train, test, cs=(0.1, 10.0))
    values, queries = (
        torch.nn.functional.normalize(part["mean"].values, dim=1).double().numpy() for part in (train, test)
    )
    oracle = liblinear(values, train["mean"].labels.numpy(), outcome.chosen["c"])
    scores, labels = oracle.decision_function(queries), test["mean"].labels.numpy()
    assert outcome.numbers["top1"].value == pytest.approx(100 * (scores.argmax(1) == labels).mean(), abs=0.3)
    expected = np.mean([average_precision_score(labels == number, scores[:, number]) for number in range(10)])
    assert outcome.numbers["map"].value == pytest.approx(100 * expected, abs=0.3)
    best = max(outcome.details["grid"], key=lambda row: row["held_out"])
    assert outcome.chosen["c"] == best["c"] and {"top1", "top5", "map"} == set(outcome.numbers)
    mixed = {"mean": dataclasses.replace(test["mean"], labels=test["mean"].labels.roll(7))}
    assert svm(train, mixed, cs=(0.1, 10.0)).chosen == outcome.chosen


def test_findings_have_machines_of_their_own_and_unknown_ones_count_for_nothing(problem):
    train, test = ({"mean": part["mean"]} for part in problem)
    labels = [(part["mean"].labels[:, None] % torch.tensor([2, 3]) == 0).float() for part in (train, test)]
    labels[0][::5, 0], labels[1][::4, 1] = torch.nan, torch.nan
    parts = [
        {"mean": dataclasses.replace(part["mean"], labels=own)} for part, own in zip((train, test), labels, strict=True)
    ]
    outcome = svm(*parts, cs=(1.0,))
    expected = []
    for i in range(2):
        (rows, mine), (queries, theirs) = (
            (torch.nn.functional.normalize(part["mean"].values, dim=1).double().numpy(), own[:, i].numpy())
            for part, own in zip((train, test), labels, strict=True)
        )
        known, asked = np.isfinite(mine), np.isfinite(theirs)
        scores = liblinear(rows[known], mine[known], 1.0).decision_function(queries)
        expected.append(average_precision_score(theirs[asked], scores[asked]))
    assert set(outcome.numbers) == {"map"}
    assert outcome.numbers["map"].value == pytest.approx(100 * np.mean(expected), abs=0.3)


def test_c_weighs_a_sample_alike_however_few_are_known(classes):
    """Of a finding that is known of a fifth of the samples, as of all."""
    values, numbers = classes(300, 12, 4, seed=1, noise=2.0)
    values = torch.nn.functional.normalize(values, dim=1)
    labels = (numbers == 0).float()[:, None].repeat(1, 2)
    labels[torch.arange(300) % 5 > 0, 1] = torch.nan
    ((_, heads),) = _each(Space.of(values, "none"), HingeLoss(labels), (1.0,), None)
    found = heads.logits(values)[0].numpy()
    for label in range(2):
        known = labels[:, label].isfinite().numpy()
        own = labels[:, label].numpy()[known]
        expected = liblinear(values.double().numpy()[known], own, 1.0).decision_function(values.double().numpy())
        assert np.abs(found[:, label] - expected).max() < 0.01 * np.abs(expected).max()


def test_what_cannot_be_is_refused(problem):
    with pytest.raises(UserError, match="above 0"):
        svm(*problem, cs=(0.0,))
    one = {"mean": dataclasses.replace(problem[0]["mean"], labels=torch.zeros(900, dtype=torch.long))}
    with pytest.raises(UserError, match="one class only"):
        svm(one, {"mean": problem[1]["mean"]})
