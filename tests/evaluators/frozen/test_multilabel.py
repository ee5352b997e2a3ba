import dataclasses

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score

from prelude.data.errors import UserError
from prelude.evaluators.frozen.convex import LabelLoss, Space
from prelude.evaluators.frozen.multilabel import group_folds, judge, multilabel
from prelude.evaluators.frozen.ranking import _draws, auc

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


def test_train_images_of_one_group_are_refused(parts):
    train = {"mean": dataclasses.replace(parts[0]["mean"], groups=torch.full((500,), 4))}
    with pytest.raises(UserError, match="hold one group only.*; write shards of several groups, or leave --group"):
        multilabel(train, parts[1], names=NAMES)


def test_where_no_fold_can_judge_a_label_it_is_told_that_nothing_was_chosen(parts, features):
    values, _ = findings(60, 1)
    groups = torch.arange(60) % 2
    train = {"mean": dataclasses.replace(features(values, 1.0 - groups[:, None]), groups=groups)}
    test = {"mean": dataclasses.replace(parts[1]["mean"], labels=parts[1]["mean"].labels[:, :1])}
    outcome = multilabel(train, test, names=("a",), weight_decays=(0.1, 1.0))
    assert any("not chosen by macro AUC" in told for told in outcome.warnings)
    assert not any("edge of the grid" in told for told in outcome.warnings)
    assert not any("not chosen" in told for told in multilabel(*parts, names=NAMES, weight_decays=(0.1, 1.0)).warnings)


def test_groups_widen_the_interval_of_repeated_images(features):
    values, labels = findings(60, 2, unknown=0)
    repeated = features(values.repeat(10, 1), labels.repeat(10, 1))
    train = {"mean": features(*findings(300, 1))}
    plain = multilabel(train, {"mean": repeated}, names=NAMES).numbers["auc"]
    grouped = dataclasses.replace(repeated, groups=torch.arange(60).repeat(10))
    by_patient = multilabel(train, {"mean": grouped}, names=NAMES).numbers["auc"]
    assert by_patient.value == plain.value and by_patient.se > 2 * plain.se


def test_a_test_set_of_one_group_has_no_interval(parts):
    train, test = parts
    groups = torch.zeros(400, dtype=torch.int64)
    plain = multilabel(train, test, names=NAMES)
    grouped = multilabel(train, {"mean": dataclasses.replace(test["mean"], groups=groups)}, names=NAMES)
    assert grouped.numbers["auc"].value == plain.numbers["auc"].value
    for number in grouped.numbers.values():
        assert number.se is None and number.interval is None
    assert any(told.startswith("All test images are of one group") for told in grouped.warnings)
    assert not any("one group" in told for told in plain.warnings)


def test_few_groups_are_told_and_make_no_label_frequent(parts):
    train, test = parts
    for count, told in ((2, True), (9, True), (10, False)):
        groups = torch.arange(400) % count
        found = multilabel(train, {"mean": dataclasses.replace(test["mean"], groups=groups)}, names=NAMES)
        few = f"Test images are of {count} groups only, so standard errors and intervals are too small."
        assert (few in found.warnings) == told
        assert any(said.startswith("Every label is present or absent") for said in found.warnings) == (count < 5)


def test_permuting_test_labels_changes_no_choice(parts):
    train, test = parts
    mixed = {"mean": dataclasses.replace(test["mean"], labels=test["mean"].labels.roll(7, 0))}
    honest, blind = (multilabel(train, part, names=NAMES) for part in (test, mixed))
    assert honest.chosen == blind.chosen and honest.details["grid"] == blind.details["grid"]
    assert honest.numbers["auc"].value > blind.numbers["auc"].value + 10


def rare_findings(num_samples, counts, seed=0, width=96):
    """Correlated features, and for each count a finding that so many samples have."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(num_samples, width, generator=generator)
    labels = torch.zeros(num_samples, len(counts))
    for i, count in enumerate(counts):
        score = drawn @ torch.randn(width, generator=generator) + 8 * torch.randn(num_samples, generator=generator)
        labels[score.topk(count).indices, i] = 1
    return drawn @ (torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width)), labels


def test_weight_decay_is_chosen_by_auc_within_folds_as_scikit_learn_finds_it(features):
    values, labels = rare_findings(240, (12, 24, 60), width=48)
    decays = (1e-2, 1.0, 30.0)
    train = {"mean": features(values, labels)}
    grid = multilabel(train, train, names=NAMES, seed=3, weight_decays=decays).details["grid"]
    plain = ((values - values.mean(0)) / values.std(0, correction=0)).numpy()
    folds, within, pooled = group_folds(240, None, 3).numpy(), [], []
    for decay in decays:
        areas = []
        for i in range(3):
            wanted, scores = labels[:, i].numpy(), np.zeros(240)
            for fold in range(5):
                fit, held = folds != fold, folds == fold
                oracle = LogisticRegression(C=1 / (fit.sum() * decay), max_iter=10_000, tol=1e-9)
                scores[held] = oracle.fit(plain[fit], wanted[fit]).decision_function(plain[held])
                if 0 < wanted[held].sum() < held.sum():
                    areas.append((i, roc_auc_score(wanted[held], scores[held])))
            pooled.append(100 * roc_auc_score(wanted, scores))
        within.append(100 * np.mean([np.mean([area for which, area in areas if which == i]) for i in range(3)]))
    assert [row["held_out_auc"] for row in grid] == pytest.approx(within, abs=0.3)
    assert within[2] > np.mean(pooled[6:]) + 5  # what ranking the folds' heads together would have said of strong decay


def test_heads_of_rare_findings_reach_their_optimum_beside_frequent_ones():
    values, labels = rare_findings(600, (5, 30, 250))
    plain = ((values - values.mean(0)) / values.std(0, correction=0)).double().numpy()
    decays = (1e-4, 1e-2)
    heads = Space.of(values).fit(LabelLoss(labels), decays)
    assert heads.converged == [True, True] and heads.gaps.shape == (2, 3)
    for h, decay in enumerate(decays):
        for i in range(3):
            wanted = labels[:, i].double().numpy()

            def objective(weights, bias, wanted=wanted, decay=decay):
                logits = plain @ weights + bias
                return np.mean(np.logaddexp(0, logits) - wanted * logits) + decay / 2 * weights @ weights

            oracle = LogisticRegression(C=1 / (600 * decay), max_iter=20_000, tol=1e-10).fit(plain, wanted)
            least = objective(oracle.coef_[0], oracle.intercept_[0])
            ours = objective(heads.weights[h, i].double().numpy(), heads.biases[h, i].item())
            assert ours == pytest.approx(least, rel=1e-3), (decay, i)


def test_a_finding_is_fitted_as_if_it_were_alone():
    values, labels = rare_findings(300, (6, 100), width=32)
    together = Space.of(values).fit(LabelLoss(labels), (1e-3,))
    for i in range(2):
        alone = Space.of(values).fit(LabelLoss(labels[:, i : i + 1]), (1e-3,))
        assert together.passes[0, i] == alone.passes[0, 0]
        assert torch.allclose(together.weights[:, i], alone.weights[:, 0], atol=1e-3)


def test_estimate_and_interval_are_of_the_same_findings():
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(80, 3)
    for i, count in enumerate((5, 30, 4)):
        labels[:count, i] = 1
    scores = torch.randn(80, 3, generator=generator) + labels * torch.tensor([3.0, 0.3, 0.0])
    numbers, by_label = judge(scores, labels, NAMES, seed=1)
    assert [by_label[name]["counted"] for name in NAMES] == [True, True, False]
    assert [by_label[name]["num_present"] for name in NAMES] == [5, 30, 4]
    assert numbers["auc"].value == pytest.approx((by_label["a"]["auc"] + by_label["b"]["auc"]) / 2)
    weights = torch.cat(list(_draws(80, 1, None)))
    has_both = weights[:, :5].sum(1) > 0  # positives of the first finding; the second is in every draw
    lacking = int((~has_both).sum())
    areas = [auc(scores[:, i], labels[:, i] > 0, weights[has_both]) for i in range(2)]
    draws = 100 * torch.stack(areas).mean(0).numpy()
    assert 0 < lacking < 30
    assert numbers["auc"].interval == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=1e-6)
    assert numbers["auc"].se == pytest.approx(np.std(draws, ddof=1))


def test_positives_count_by_group_and_rare_findings_are_named(features):
    values, labels = rare_findings(200, (20, 60, 3), width=16)
    train = features(values, labels)
    groups = torch.arange(200)
    groups[labels[:, 0] == 1] = 1000 + torch.arange(20) % 4  # twenty images of four patients
    outcome = multilabel({"mean": train}, {"mean": dataclasses.replace(train, groups=groups)}, names=NAMES)
    by_label = outcome.details["by_features"]["mean"]["by_label"]
    assert [by_label[name]["counted"] for name in NAMES] == [False, True, False]
    assert any(warning.endswith("a (20 present), c (3 present).") for warning in outcome.warnings)
    assert [by_label[name]["num_present_train"] for name in NAMES] == [20, 60, 3]


def test_a_choice_at_the_edge_is_told(parts):
    outcome = multilabel(*parts, names=NAMES, weight_decays=(5.0, 30.0))
    assert any("weight decay" in warning and "edge of the grid (5 to 30)" in warning for warning in outcome.warnings)
    assert not any("edge" in warning for warning in multilabel(*parts, names=NAMES, weight_decays=(0.1,)).warnings)
