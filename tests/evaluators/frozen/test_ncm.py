import dataclasses

import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestCentroid

from prelude.data.errors import UserError
from prelude.evaluators.frozen import ncm as module
from prelude.evaluators.frozen.ncm import class_means, ncm


def test_equals_scikit_learn(classes, features, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 100)
    train, labels = classes(500, 12, 10, seed=1, noise=2.0)
    test, test_labels = classes(700, 12, 10, seed=2, noise=2.0)
    oracle = NearestCentroid().fit(F.normalize(train.double()).numpy(), labels.numpy())
    expected = 100 * oracle.score(F.normalize(test.double()).numpy(), test_labels.numpy())
    outcome = ncm({"mean": features(train, labels)}, {"mean": features(test, test_labels)})
    assert outcome.numbers["top1"].value == pytest.approx(expected, abs=1e-9)
    assert 20 < expected < 95 and outcome.numbers["top5"].value > expected


def test_classes_come_in_tasks_and_are_told_among_those_that_have_come(classes, features):
    train, labels = classes(500, 12, 7, seed=1, noise=2.0)
    test, test_labels = classes(300, 12, 7, seed=2, noise=2.0)
    outcome = ncm({"mean": features(train, labels)}, {"mean": features(test, test_labels)}, num_tasks=3, seed=4)
    (curve,) = outcome.details["after_each_task"].values()
    assert sorted(sum((task["classes"] for task in curve), [])) == list(range(7)) and len(curve) == 3
    seen, expected = [], []
    for task in curve:
        seen += task["classes"]
        mine, theirs = (torch.isin(part, torch.tensor(seen)) for part in (labels, test_labels))
        oracle = NearestCentroid().fit(F.normalize(train[mine].double()).numpy(), labels[mine].numpy())
        expected.append(100 * oracle.score(F.normalize(test[theirs].double()).numpy(), test_labels[theirs].numpy()))
        assert task["top1"] == pytest.approx(expected[-1], abs=1e-4)
    number = outcome.numbers["incremental"]
    assert number.value == pytest.approx(sum(expected) / 3, abs=1e-4) and 0.5 < number.se < 5
    assert curve[-1]["top1"] == pytest.approx(outcome.numbers["top1"].value, abs=1e-4) and expected[0] > expected[-1]
    with pytest.raises(UserError, match="more than the 7 classes"):
        ncm({"mean": features(train, labels)}, {"mean": features(test, test_labels)}, num_tasks=8)


def test_means_are_not_brought_to_length_one_again():
    values = torch.tensor([[2.0, 0.0], [0.0, 3.0], [5.0, 0.0]])
    means = class_means(values, torch.tensor([0, 0, 1]), 2)
    assert means.tolist() == [[0.5, 0.5], [1.0, 0.0]]


def test_a_class_that_a_part_lacks_is_never_guessed():
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    means = class_means(values, torch.tensor([0, 2, 1]), 3, torch.tensor([0, 1]))
    found = module.accuracy(means, values, torch.tensor([1, 1, 1]))
    assert found["top1"].value == 0


def test_the_kind_of_feature_is_chosen_without_test_labels(problem):
    train, test = problem
    mixed = {kind: dataclasses.replace(f, labels=f.labels.roll(7)) for kind, f in test.items()}
    assert ncm(train, mixed).chosen == ncm(train, test).chosen == {"features": "mean"}
