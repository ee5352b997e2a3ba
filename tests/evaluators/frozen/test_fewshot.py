import dataclasses
import statistics

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from prelude.data.errors import UserError
from prelude.evaluators.frozen.fewshot import Amount, draw_rows, fewshot


@pytest.fixture
def parts(classes, features):
    train, labels = classes(600, 16, 6, seed=1, noise=1.5)
    test, test_labels = classes(500, 16, 6, seed=2, noise=1.5)
    return {"mean": features(train, labels)}, {"mean": features(test, test_labels)}


def test_a_draw_is_the_same_part_of_each_class_and_smaller_ones_are_in_larger_ones():
    labels = torch.tensor([0] * 200 + [1] * 50 + [2] * 3)[
        torch.randperm(253, generator=torch.Generator().manual_seed(0))
    ]
    one, five = (draw_rows(labels, Amount(per_class=n), 0, 0) for n in (1, 5))
    assert torch.bincount(labels[one]).tolist() == [1, 1, 1] and torch.bincount(labels[five]).tolist() == [5, 5, 3]
    assert set(one.tolist()) < set(five.tolist())
    tenth = draw_rows(labels, Amount(share=10), 0, 0)
    assert torch.bincount(labels[tenth]).tolist() == [20, 5, 1]
    assert draw_rows(labels, Amount(share=10), 0, 0).equal(tenth)
    assert not draw_rows(labels, Amount(share=10), 0, 1).equal(tenth)
    assert not draw_rows(labels, Amount(share=10), 1, 0).equal(tenth)


def test_accuracy_is_that_of_scikit_learn_on_the_same_draws(parts):
    train, test = parts
    outcome = fewshot(train, test, per_class=[10], shares=[], draws=3)
    values, labels = train["mean"].values, train["mean"].labels
    for number, draw in enumerate(outcome.details["by_amount"]["10 a class"]["draws"]):
        rows = draw_rows(labels, Amount(per_class=10), 0, number)
        mean, deviation = values[rows].mean(0), values[rows].std(0, correction=0)
        oracle = LogisticRegression(C=1 / (len(rows) * draw["weight_decay"]), max_iter=10_000)
        oracle.fit(((values[rows] - mean) / deviation).numpy(), labels[rows].numpy())
        expected = 100 * oracle.score(((test["mean"].values - mean) / deviation).numpy(), test["mean"].labels.numpy())
        assert draw["top1"].value == pytest.approx(expected, abs=0.5)  # of 500 images
    found = [draw["top1"].value for draw in outcome.details["by_amount"]["10 a class"]["draws"]]
    number = outcome.numbers["10 a class"]
    assert number.value == pytest.approx(statistics.mean(found)) and number.spread == statistics.stdev(found)


def test_more_labels_are_worth_more(parts):
    numbers = fewshot(*parts, per_class=[1, 10], shares=[50], draws=2).numbers
    assert list(numbers) == ["1 a class", "10 a class", "50 %"]
    assert numbers["1 a class"].value + 5 < numbers["10 a class"].value < numbers["50 %"].value


def test_labels_outside_of_a_draw_are_never_looked_at(parts):
    train, test = parts
    rows = draw_rows(train["mean"].labels, Amount(per_class=5), 0, 0)
    outcome = fewshot(train, test, per_class=[5], shares=[], draws=1)
    features = train["mean"].values.clone()
    outside = torch.ones(600, dtype=torch.bool)
    outside[rows] = False
    features[outside] = torch.nan
    spoilt = {"mean": dataclasses.replace(train["mean"], values=features)}
    assert fewshot(spoilt, test, per_class=[5], shares=[], draws=1).numbers == outcome.numbers


def test_the_kind_of_feature_is_chosen_inside_the_draw(problem):
    outcome = fewshot(*problem, per_class=[10], shares=[], draws=2)
    assert outcome.chosen["features"] == "mean"
    untuned = fewshot(*problem, per_class=[1], shares=[], draws=1)
    assert untuned.chosen["features"] == "cls"  # the first: one image a class leaves none to choose on
    ncm = outcome.details["by_amount"]["10 a class"]["ncm"]
    assert ncm["mean"].value > ncm["cls"].value


def test_too_few_images_and_impossible_amounts_are_told(parts):
    outcome = fewshot(*parts, per_class=[500], shares=[], draws=1)
    assert any("fewer than 500" in warning for warning in outcome.warnings)
    for wrong in ({"per_class": [0]}, {"shares": [0.0]}, {"shares": [101.0]}, {"draws": 0}):
        with pytest.raises(UserError, match="write others"):
            fewshot(*parts, **{"per_class": [], "shares": [1.0], "draws": 1} | wrong)
