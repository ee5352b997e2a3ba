"""Support vector machines against liblinear."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.svm import LinearSVC

from prelude.data.errors import UserError
from prelude.evaluators.features.extraction import Features
from prelude.evaluators.frozen.convex import Space
from prelude.evaluators.frozen.splits import hold_out_groups
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


def of_findings(present, count, seed, groups=None, strength=4.0):
    """A finding that `mean` shows and `cls` does not."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(count, 1)
    labels[torch.as_tensor(present)] = 1
    found = {}
    for kind, of_kind in (("cls", 0.0), ("mean", strength)):
        values = torch.randn(count, 8, generator=generator)
        values[:, 0] += of_kind * labels[:, 0]
        found[kind] = Features(values, labels, torch.arange(count), str(seed), kind, groups=groups)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_a_rare_finding_is_held_out_too_and_equals_are_at_no_edge(seed):
    train, test = of_findings(range(8), 200, 1, strength=20.0), of_findings(range(20), 100, 2, strength=20.0)
    outcome = svm(train, test, seed=seed, cs=(0.1, 1.0, 10.0))
    assert outcome.chosen["features"] == "mean" and not outcome.warnings
    assert [row["held_out"] for row in outcome.details["grid"] if row["features"] == "mean"] == [100] * 3


def test_groups_are_drawn_whole():
    groups = torch.arange(200) // 10
    train, test = of_findings(range(0, 200, 7), 200, 1, groups), of_findings(range(0, 200, 7), 200, 2, strength=1.0)
    copies = torch.arange(50).repeat(4)  # each test image four times
    test = {
        kind: dataclasses.replace(of, values=of.values[copies], labels=of.labels[copies]) for kind, of in test.items()
    }
    outcome = svm(train, {kind: dataclasses.replace(of, groups=copies) for kind, of in test.items()}, cs=(1.0,))
    alone = svm(train, test, cs=(1.0,))
    assert outcome.recipe["grouped"] and outcome.numbers["map"].value == alone.numbers["map"].value
    assert outcome.numbers["map"].se > 1.5 * alone.numbers["map"].se


def test_where_nothing_can_be_chosen_it_is_told_and_no_edge_is():
    groups = torch.arange(200) // 10
    train, test = of_findings(range(10), 200, 1, groups), of_findings(range(20), 100, 2)
    (seed, *_) = (seed for seed in range(9) if 0 not in groups[hold_out_groups(groups, seed, 0.1)[1]])
    (told,) = svm(train, test, seed=seed).warnings
    assert "not chosen by mAP" in told
    one = {"mean": train["mean"]}, {"mean": test["mean"]}
    assert not svm(*one, seed=seed, cs=(1.0,)).warnings  # there was no choice
