import dataclasses

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

from prelude.data.errors import UserError
from prelude.evaluators.frozen.anomaly import anomaly, fit_gaussian, mahalanobis


@pytest.mark.parametrize("num_samples", [200, 12])  # fewer than features, too
def test_the_gaussian_and_its_distances_are_those_of_scikit_learn(classes, num_samples):
    values, _ = classes(num_samples, 20, 3, seed=1)
    mean, covariance, shrinkage = fit_gaussian(values)
    oracle = LedoitWolf().fit(values.double().numpy())
    assert 0 < shrinkage < 1 and shrinkage == pytest.approx(oracle.shrinkage_, rel=1e-8)
    assert np.allclose(covariance.numpy(), oracle.covariance_, rtol=1e-8)
    queries, _ = classes(50, 20, 3, seed=2)
    assert np.allclose(mahalanobis(queries, mean, covariance) ** 2, oracle.mahalanobis(queries.double().numpy()))


def test_each_class_is_normal_in_turn(problem):
    train, test = ({"mean": part["mean"]} for part in problem)
    outcome = anomaly(train, test)
    expected = {}
    for number in range(10):
        oracle = LedoitWolf().fit(train["mean"].values[train["mean"].labels == number].double().numpy())
        distance = oracle.mahalanobis(test["mean"].values.double().numpy())
        expected[number] = 100 * roc_auc_score((test["mean"].labels != number).numpy(), distance)
    assert {c: found["auroc"] for c, found in outcome.details["by_class"].items()} == pytest.approx(expected)
    assert outcome.numbers["auroc"].value == pytest.approx(np.mean(list(expected.values())))
    assert 0 < outcome.numbers["auroc"].se < 5
    alone = anomaly(train, test, normal=[3])
    assert alone.numbers["auroc"].value == pytest.approx(expected[3])


def test_distances_of_several_kinds_are_added(problem):
    train, test = problem
    outcome = anomaly(train, test, normal=[0])
    distances = []
    for kind in ("cls", "mean"):
        normal = train[kind].values[train[kind].labels == 0]
        distances.append(mahalanobis(test[kind].values, *fit_gaussian(normal)[:2]))
    expected = 100 * roc_auc_score((test["mean"].labels != 0).numpy(), sum(distances).numpy())
    assert outcome.numbers["auroc"].value == pytest.approx(expected)
    assert outcome.chosen == {"features": "cls + mean"}


def test_anomalies_of_the_train_set_change_nothing(problem):
    train, test = ({"mean": part["mean"]} for part in problem)
    values = train["mean"].values.clone()
    values[train["mean"].labels != 4] = 1e6
    other = {"mean": dataclasses.replace(train["mean"], values=values)}
    assert anomaly(other, test, normal=[4]).numbers == anomaly(train, test, normal=[4]).numbers


def test_features_that_never_vary_are_survived(features):
    same, labels = torch.ones(20, 4), torch.arange(20) % 2
    test = torch.cat([torch.ones(10, 4), torch.full((10, 4), 2.0)])
    outcome = anomaly({"mean": features(same, labels)}, {"mean": features(test, torch.arange(20) // 10)}, normal=[0])
    assert outcome.numbers["auroc"].value == 100


def test_classes_that_are_not_there_are_refused(problem):
    with pytest.raises(UserError, match="Class 77 is not in train and test"):
        anomaly(*problem, normal=[77])


def test_rare_classes_are_left_out_of_the_mean_and_named(problem):
    train, test = ({"mean": part["mean"]} for part in problem)
    rows = ~((test["mean"].labels == 3) & ((test["mean"].labels == 3).cumsum(0) > 4))
    few = dataclasses.replace(test["mean"], values=test["mean"].values[rows], labels=test["mean"].labels[rows])
    outcome = anomaly(train, {"mean": few})
    assert 3 not in outcome.details["by_class"] and len(outcome.details["by_class"]) == 9
    assert [warning for warning in outcome.warnings if warning.endswith("class 3.")]
    assert anomaly(train, {"mean": few}, normal=[3]).warnings == []
