import dataclasses

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score

from prelude.data.errors import UserError
from prelude.evaluators.convex import LabelLoss, Space
from prelude.evaluators.multilabel import group_folds, judge, multilabel

NAMES = ("a", "b", "c")


def findings(num_samples, seed, unknown=0.2):
    """Features of 8 values, three findings that depend on them, a share of them unknown."""
    shared = torch.Generator().manual_seed(0)
    directions = torch.randn(3, 8, generator=shared)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_samples, 8, generator=generator)
    noise = torch.randn(num_samples, 3, generator=generator)
    labels = (values @ directions.T + 2 * noise > torch.tensor([0.0, 1.0, 3.0])).float()
    labels[torch.rand(num_samples, 3, generator=generator) < unknown] = torch.nan
    return values * torch.logspace(0, -1, 8) + 1, labels


@pytest.fixture
def parts(features):
    return tuple({"mean": features(*findings(n, seed))} for n, seed in ((500, 1), (400, 2)))


def test_heads_are_the_optima_that_scikit_learn_finds_on_what_is_known():
    values, labels = findings(500, 1)
    plain = ((values - values.mean(0)) / values.std(0, correction=0)).numpy()
    heads = Space.of(values).fit(LabelLoss(labels), (1e-3, 1e-1))
    for h, decay in enumerate((1e-3, 1e-1)):
        ours = heads.logits(values)[h].sigmoid().numpy()
        for i in range(3):
            known = labels[:, i].isfinite().numpy()
            oracle = LogisticRegression(C=1 / (known.sum() * decay), max_iter=10_000, tol=1e-8)
            oracle.fit(plain[known], labels[:, i].numpy()[known])
            assert abs(ours[:, i] - oracle.predict_proba(plain)[:, 1]).max() < 0.01


def test_auc_and_map_are_those_of_scikit_learn(parts):
    train, test = parts
    outcome = multilabel(train, test, names=NAMES)
    space = Space.of(train["mean"].values)
    decay = outcome.chosen["weight_decay"]
    scores = space.fit(LabelLoss(train["mean"].labels), (decay,)).logits(test["mean"].values)[0].numpy()
    labels = test["mean"].labels.numpy()
    for name, metric in (("auc", roc_auc_score), ("map", average_precision_score)):
        each = []
        for i in range(3):
            known = np.isfinite(labels[:, i])
            each.append(100 * metric(labels[known, i], scores[known, i]))
        found = outcome.numbers[name]
        assert found.value == pytest.approx(np.mean(each), abs=1e-6)
        by_label = outcome.details["by_features"]["mean"]["by_label"]
        assert [by_label[n][name] for n in NAMES] == pytest.approx(each, abs=1e-6)
        assert found.interval[0] < found.value < found.interval[1] and found.se > 0


def test_unknown_labels_count_for_nothing():
    scores = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    labels = (scores + torch.randn(50, 2, generator=torch.Generator().manual_seed(1)) > 0).float()
    labels[:20, 1] = torch.nan
    numbers, _ = judge(scores, labels, ("a", "b"))
    scores[:20, 1] = 100.0
    assert judge(scores, labels, ("a", "b"))[0]["auc"].value == numbers["auc"].value


def test_labels_that_test_lacks_are_left_out_and_named(features):
    values, labels = findings(300, 1, unknown=0)
    test_values, test_labels = findings(200, 2, unknown=0)
    test_labels[:, 2] = 0
    outcome = multilabel({"mean": features(values, labels)}, {"mean": features(test_values, test_labels)}, names=NAMES)
    by_label = outcome.details["by_features"]["mean"]["by_label"]
    assert "auc" not in by_label["c"] and "map" not in by_label["c"] and by_label["c"]["num_absent"] == 200
    assert outcome.numbers["auc"].value == pytest.approx((by_label["a"]["auc"] + by_label["b"]["auc"]) / 2)
    assert any(warning.endswith("left out of macro AUC: c.") for warning in outcome.warnings)
    test_labels[:] = 1
    with pytest.raises(UserError, match="no label that is present"):
        multilabel({"mean": features(values, labels)}, {"mean": features(test_values, test_labels)}, names=NAMES)


def test_a_label_that_train_never_shows_is_told(features):
    values, labels = findings(300, 1)
    labels[labels[:, 1] == 1, 1] = 0
    test = {"mean": features(*findings(200, 2))}
    outcome = multilabel({"mean": features(values, labels)}, test, names=NAMES)
    assert any(warning.endswith("learned nothing from: b.") for warning in outcome.warnings)


def test_a_group_is_never_on_both_sides():
    groups = torch.arange(100) % 30
    folds = group_folds(100, groups, seed=0)
    assert all(len(folds[groups == group].unique()) == 1 for group in range(30))
    assert torch.bincount(folds).min() >= 15 and len(folds.unique()) == 5


def test_groups_widen_the_interval_of_repeated_images(features):
    values, labels = findings(60, 2, unknown=0)
    repeated = features(values.repeat(10, 1), labels.repeat(10, 1))
    train = {"mean": features(*findings(300, 1))}
    plain = multilabel(train, {"mean": repeated}, names=NAMES).numbers["auc"]
    grouped = dataclasses.replace(repeated, groups=torch.arange(60).repeat(10))
    by_patient = multilabel(train, {"mean": grouped}, names=NAMES).numbers["auc"]
    assert by_patient.value == plain.value and by_patient.se > 2 * plain.se


def test_permuting_test_labels_changes_no_choice(parts):
    train, test = parts
    mixed = {"mean": dataclasses.replace(test["mean"], labels=test["mean"].labels.roll(7, 0))}
    honest, blind = (multilabel(train, part, names=NAMES) for part in (test, mixed))
    assert honest.chosen == blind.chosen and honest.details["grid"] == blind.details["grid"]
    assert honest.numbers["auc"].value > blind.numbers["auc"].value + 10
