"""Scores of what is none of the known classes, against scikit-learn and scipy."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.neighbors import NearestNeighbors

from prelude.data.errors import UserError
from prelude.evaluators.frozen.outliers import (
    SCORES,
    distance_to_neighbour,
    fit_mixture,
    fpr_at_95,
    k_means,
    mahalanobis_to_classes,
    minus_log_density,
    outliers,
)


@pytest.fixture
def parts(classes, features):
    train = features(*classes(400, 6, 5, seed=1), fingerprint="a")
    values, labels = classes(150, 6, 5, seed=2)
    strange = torch.randn(60, 6, generator=torch.Generator().manual_seed(3)) * values.std(0) * 2 + values.mean(0)
    test = features(torch.cat([values, strange]), torch.cat([labels, torch.full((60,), -1)]), fingerprint="b")
    return train, test


def test_mahalanobis_is_that_of_the_nearest_class_under_one_covariance(parts):
    train, test = parts
    values, labels = train.values.double().numpy(), train.labels.numpy()
    means = np.stack([values[labels == number].mean(0) for number in range(5)])
    precision = np.linalg.inv(LedoitWolf().fit(values - means[labels]).covariance_)
    away = test.values.double().numpy()[:, None] - means
    expected = np.sqrt(np.einsum("ncd,de,nce->nc", away, precision, away)).min(1)
    assert np.allclose(mahalanobis_to_classes(train, test).numpy(), expected, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("score", SCORES)
def test_scores_are_those_of_a_cpu_on_a_gpu_too(parts, score):
    assert torch.allclose(SCORES[score](*parts, device="cuda"), SCORES[score](*parts), rtol=1e-4, atol=1e-5)


def test_the_neighbour_is_that_of_scikit_learn(parts):
    train, test = parts
    near = NearestNeighbors(n_neighbors=7, metric="cosine").fit(train.values.double().numpy())
    expected = near.kneighbors(test.values.double().numpy())[0][:, -1]
    assert np.allclose(distance_to_neighbour(train, test, k=7).numpy(), expected, atol=1e-5)
    assert len(distance_to_neighbour(train, test, k=10_000)) == 210


@pytest.mark.parametrize("components", [1, 3])
def test_the_density_is_that_of_scipy(parts, components):
    train, test = parts
    centres, weights, _, _ = fit_mixture(train, components, 0, "cpu")
    assert len(centres) == 5 * components and weights.sum() == pytest.approx(1)
    values = train.values.double().numpy()
    if components == 1:
        expected = np.stack([values[train.labels == number].mean(0) for number in range(5)])
        assert np.allclose(centres.numpy(), expected)
    found = minus_log_density(train, test, components=components).numpy()
    # The covariance is that around the centre that each sample went to, within its class.
    _, own = _assigned(train, components)
    covariance = LedoitWolf().fit(values - own).covariance_
    queries = test.values.double().numpy()
    logs = [multivariate_normal(centre, covariance).logpdf(queries) for centre in centres.numpy()]
    expected = -logsumexp(np.stack(logs, 1) + np.log(weights.numpy()), axis=1)
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-6)


def _assigned(train, components):
    """The centre of each sample by the means of what k-means put together."""
    from prelude.evaluators.frozen.outliers import _round_classes

    _, classes, whiten = _round_classes(train, "cpu")
    generator, own = torch.Generator().manual_seed(0), torch.zeros(train.values.shape, dtype=torch.float64)
    for number in range(5):
        rows = (classes == number).nonzero()[:, 0]
        which = k_means(whiten(train.values[rows].double()), components, generator)
        for c in which.unique():
            own[rows[which == c]] = train.values[rows[which == c]].double().mean(0)
    return classes, own.numpy()


def test_k_means_finds_heaps_and_leaves_no_number_out():
    heaps = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]]).double()
    values = heaps.repeat_interleave(20, 0) + 0.3 * torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    found = k_means(values, 3, torch.Generator().manual_seed(1))
    assert sorted(torch.bincount(found).tolist()) == [20, 20, 20]
    assert all(len(found[i : i + 20].unique()) == 1 for i in (0, 20, 40))
    same = k_means(torch.ones(5, 2).double(), 3, torch.Generator())
    assert same.tolist() == [0] * 5


def test_areas_and_passing_are_those_of_scikit_learn(parts):
    train, test = parts
    other = test.labels < 0
    for name, score in SCORES.items():
        scores = score(train, test, seed=0)
        outcome = outliers({"mean": train}, {"mean": test}, score=name)
        assert outcome.evaluator == f"ood_{name}"
        assert outcome.numbers["auroc"].value == pytest.approx(100 * roc_auc_score(other, scores))
        passing, detected, _ = roc_curve(~other, -scores)  # the known as positives
        expected = passing[np.argmax(detected >= 0.95)]
        assert outcome.numbers["fpr95"].value == pytest.approx(100 * expected)
        assert outcome.numbers["auroc"].value > 70 and outcome.numbers["fpr95"].se > 0


def test_equal_scores_pass_together():
    scores, other = torch.tensor([1.0, 1.0, 1.0, 2.0]), torch.tensor([False, True, False, True])
    assert fpr_at_95(scores, other).item() == 0.5


def test_a_draw_without_known_images_or_without_others_is_no_number():
    scores, other = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False, True])
    weights = torch.tensor([[1, 1, 1], [2, 0, 1], [0, 3, 0]], dtype=torch.float64)
    assert fpr_at_95(scores, other, weights).nan_to_num(-1).tolist() == [0.5, -1, -1]


def test_classes_that_are_taken_out_of_train_are_others(parts):
    train, test = parts
    known = dataclasses.replace(test, values=test.values[:150], labels=test.labels[:150])
    outcome = outliers({"mean": train}, {"mean": known}, score="mahalanobis", unknown=[3, 4])
    kept = train.labels < 3
    less = dataclasses.replace(train, values=train.values[kept], labels=train.labels[kept])
    scores = mahalanobis_to_classes(less, known)
    assert outcome.numbers["auroc"].value == pytest.approx(100 * roc_auc_score(known.labels >= 3, scores))
    assert outcome.details["num_others"] == int((known.labels >= 3).sum())
    for unknown, told in (([], "known classes only"), (range(5), "leaves no class")):
        with pytest.raises(UserError, match=told):
            outliers({"mean": train}, {"mean": known}, score="knn", unknown=list(unknown))
    strangers = dataclasses.replace(known, labels=known.labels * 0 - 1)
    with pytest.raises(UserError, match="no image of a class"):
        outliers({"mean": train}, {"mean": strangers}, score="knn")
