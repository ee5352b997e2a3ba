import dataclasses

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from prelude.data.errors import UserError
from prelude.evaluators.frozen.convex import ClassLoss, FoldLoss, Space
from prelude.evaluators.frozen.linear_probe import WEIGHT_DECAYS, linear_probe

FEW = (1e-3, 1e-1)  # weight decays, where it is not told what a grid of all finds


def standardised(values, by):
    return ((values - by.mean(0)) / by.std(0, correction=0)).numpy()


@pytest.mark.parametrize("decay", [1e-4, 1e-2, 1.0])
def test_a_head_is_the_optimum_that_scikit_learn_finds(classes, decay):
    values, labels = classes(600, 20, 5, seed=1, noise=2.0)
    head = Space.of(values).fit(ClassLoss(labels, 5), (decay,))
    # scikit-learn minimises C * (sum of losses) + |W|^2 / 2, hence C = 1 / (N * decay).
    oracle = LogisticRegression(C=1 / (600 * decay), max_iter=10_000, tol=1e-8).fit(
        standardised(values, values), labels.numpy()
    )
    ours = head.logits(values)[0].softmax(-1).numpy()
    assert abs(ours - oracle.predict_proba(standardised(values, values))).max() < 0.01


def test_accuracy_is_that_of_scikit_learn(classes, features):
    train, labels = classes(2000, 32, 10, seed=1, noise=2.0)
    test, test_labels = classes(4000, 32, 10, seed=2, noise=2.0)
    outcome = linear_probe({"mean": features(train, labels)}, {"mean": features(test, test_labels)})
    oracle = LogisticRegression(C=1 / (2000 * outcome.chosen["weight_decay"]), max_iter=5000)
    oracle.fit(standardised(train, train), labels.numpy())
    expected = 100 * oracle.score(standardised(test, train), test_labels.numpy())
    assert 30 < expected < 95  # neither chance nor trivial
    assert outcome.numbers["top1"].value == pytest.approx(expected, abs=0.3)


def test_fitting_some_rows_is_fitting_a_set_of_these_rows(classes):
    values, labels = classes(400, 10, 4, seed=1)
    rows = torch.arange(0, 400, 2)
    space = Space.of(values)
    # The same standardisation: on the rows alone it would be another problem.
    oracle = LogisticRegression(C=1 / (200 * 1e-2), max_iter=10_000, tol=1e-8)
    oracle.fit(standardised(values, values)[::2], labels[rows].numpy())
    ours = space.fit(ClassLoss(labels, 4), (1e-2,), rows).logits(values)[0].softmax(-1).numpy()
    assert abs(ours - oracle.predict_proba(standardised(values, values))).max() < 0.01


def test_folds_trained_together_are_the_optima_of_their_own_samples(classes):
    values, labels = classes(300, 10, 4, seed=1)
    parts = torch.stack([torch.arange(300) % 5 != fold for fold in range(5)], 1)
    parts[:, 4] &= torch.arange(300) < 200  # folds may be of any size
    heads = Space.of(values).fit(FoldLoss(labels, 4, parts), (1e-2, 1e-1))
    for fold in range(5):
        rows, ours = parts[:, fold], heads.part(fold, 4).logits(values).softmax(-1).numpy()
        for h, decay in enumerate((1e-2, 1e-1)):
            oracle = LogisticRegression(C=1 / (int(rows.sum()) * decay), max_iter=10_000, tol=1e-8)
            oracle.fit(standardised(values, values)[rows.numpy()], labels[rows].numpy())
            assert abs(ours[h] - oracle.predict_proba(standardised(values, values))).max() < 0.01


def test_heads_trained_together_are_those_trained_alone(classes):
    values, labels = classes(300, 10, 4, seed=1)
    together = Space.of(values).fit(ClassLoss(labels, 4), (1e-3, 1e-1)).logits(values).softmax(-1)
    for h, decay in enumerate((1e-3, 1e-1)):
        alone = Space.of(values).fit(ClassLoss(labels, 4), (decay,)).logits(values).softmax(-1)
        assert (together[h] - alone[0]).abs().max() < 5e-3


@pytest.mark.parametrize("room", [True, False], ids=["rotated", "streamed"])
@pytest.mark.parametrize("rows", [None, torch.arange(0, 300, 3)], ids=["all", "a part"])
def test_pieces_of_the_training_set_change_nothing(classes, monkeypatch, room, rows):
    values, labels = classes(300, 10, 4, seed=1)
    whole = Space.of(values).fit(ClassLoss(labels, 4), (1e-3, 1e-1), rows)
    monkeypatch.setattr("prelude.evaluators.frozen.pieces.PIECE_ELEMENTS", 10 * 70)
    monkeypatch.setattr("prelude.evaluators.frozen.design.LOGITS", 8 * 70)
    monkeypatch.setattr("prelude.evaluators.frozen.design.has_room", lambda *_: room)
    pieces = Space.of(values).fit(ClassLoss(labels, 4), (1e-3, 1e-1), rows)
    assert torch.allclose(whole.weights, pieces.weights, atol=1e-3)


def test_where_memory_has_no_room_heads_are_the_optima_all_the_same(classes, monkeypatch):
    monkeypatch.setattr("prelude.evaluators.frozen.design.has_room", lambda *_: False)
    test_a_head_is_the_optimum_that_scikit_learn_finds(classes, 1e-2)
    test_fitting_some_rows_is_fitting_a_set_of_these_rows(classes)
    test_more_features_than_samples(classes)


def test_features_that_are_all_constant_leave_the_most_frequent_class(features):
    labels = torch.tensor([0, 1, 1, 2, 1] * 20)
    constant = {"mean": features(torch.full((100, 6), 0.3), labels)}
    assert linear_probe(constant, constant).numbers["top1"].value == 60


def test_scale_offset_and_constant_features_change_nothing(classes):
    values, labels = classes(300, 10, 4, seed=1)
    plain = Space.of(values).fit(ClassLoss(labels, 4), (1e-2,)).logits(values)
    changed = torch.cat([values * 1e-3 + 2.0, torch.full((300, 2), 0.1)], 1)
    assert torch.allclose(plain, Space.of(changed).fit(ClassLoss(labels, 4), (1e-2,)).logits(changed), atol=2e-2)


def test_without_batch_norm_features_keep_their_proportions(classes):
    values, labels = classes(400, 10, 4, seed=1)
    values[:, 0] *= 100
    space = Space.of(values, "none")
    head = space.fit(ClassLoss(labels, 4), (1e-2,))
    plain = (values - values.mean(0)) / values.var(0, correction=0).mean().sqrt()
    oracle = LogisticRegression(C=1 / (400 * 1e-2), max_iter=10_000, tol=1e-8).fit(plain.numpy(), labels.numpy())
    assert abs(head.logits(values)[0].softmax(-1).numpy() - oracle.predict_proba(plain.numpy())).max() < 0.01


def test_heads_with_and_without_batch_norm_are_in_one_grid(problem):
    outcome = linear_probe(*problem, norms=("batch", "none"), weight_decays=FEW)
    assert len(outcome.details["grid"]) == 2 * 2 * len(FEW)
    best = max(outcome.details["grid"], key=lambda row: (row["held_out_top1"], -row["held_out_loss"]))
    assert outcome.chosen == {key: best[key] for key in ("features", "norm", "weight_decay")}
    alone = linear_probe(*problem, norms=(outcome.chosen["norm"],), weight_decays=FEW)
    assert alone.numbers == outcome.numbers


def test_more_features_than_samples(classes):
    values, labels = classes(40, 100, 4, seed=1)
    head = Space.of(values).fit(ClassLoss(labels, 4), (1e-3,))
    assert head.gaps.max() < 1e-6
    assert (head.logits(values)[0].argmax(-1) == labels).all()


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_with_more_features_than_samples_a_part_is_fitted_as_scikit_learn_fits_it(classes, norm):
    values, labels = classes(80, 120, 4, seed=1, noise=2.0)
    values[:, 0] *= 3
    rows = torch.arange(0, 80, 2)
    head = Space.of(values, norm).fit(ClassLoss(labels, 4), (1e-2,), rows)
    plain = values - values.mean(0)
    plain = (plain / (plain.std(0, correction=0) if norm == "batch" else plain.square().mean().sqrt())).numpy()
    oracle = LogisticRegression(C=1 / (40 * 1e-2), max_iter=10_000, tol=1e-8).fit(plain[::2], labels[rows].numpy())
    apart = abs(head.logits(values)[0].softmax(-1).numpy() - oracle.predict_proba(plain))
    assert apart[::2].max() < 1e-3
    assert apart.max() < 0.05  # of samples that were not fitted, which a loss within 1e-6 of the least leaves freer


def test_permuting_test_labels_changes_no_choice(problem):
    train, test = problem
    shuffled = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    mixed = {kind: dataclasses.replace(f, labels=f.labels[shuffled]) for kind, f in test.items()}
    honest, blind = (linear_probe(train, each, weight_decays=FEW) for each in (test, mixed))
    assert honest.chosen == blind.chosen
    assert honest.details["grid"] == blind.details["grid"]
    assert honest.numbers["top1"].value > blind.numbers["top1"].value + 20


def test_the_same_seed_gives_the_same_outcome(problem):
    train, test = problem
    one, again, other = (linear_probe(train, test, seed=seed, weight_decays=FEW) for seed in (3, 3, 4))
    assert one == again
    assert one.details["grid"] != other.details["grid"]


def test_the_better_kind_of_feature_is_chosen_and_both_are_reported(problem):
    outcome = linear_probe(*problem)
    assert outcome.chosen["features"] == "mean"
    assert len(outcome.details["grid"]) == 2 * len(WEIGHT_DECAYS)
    by_features = outcome.details["by_features"]
    assert by_features["mean"]["test"] == outcome.numbers
    assert by_features["cls"]["test"]["top1"].value < outcome.numbers["top1"].value
    best = max((r for r in outcome.details["grid"]), key=lambda r: (r["held_out_top1"], -r["held_out_loss"]))
    assert best["weight_decay"] == outcome.chosen["weight_decay"]


def test_a_choice_at_the_edge_is_told(problem):
    outcome = linear_probe(*problem, weight_decays=(2.0, 4.0))
    assert any("edge of the grid" in warning for warning in outcome.warnings)
    inside = linear_probe(*problem, weight_decays=(1e-9, outcome.chosen["weight_decay"] / 100, 1e3))
    assert not inside.warnings


def test_class_numbers_need_not_be_contiguous_and_unknown_test_classes_are_missed(classes, features):
    values, labels = classes(400, 12, 4, seed=1, noise=0.1)
    sparse = torch.tensor([7, 100, 10**9, -3])[labels]
    train = {"mean": features(values, sparse)}
    assert linear_probe(train, train, weight_decays=FEW).numbers["top1"].value > 95
    unknown = {"mean": features(values, torch.where(labels == 0, 5, sparse))}
    expected = 100 * (labels != 0).float().mean().item()
    assert linear_probe(train, unknown, weight_decays=FEW).numbers["top1"].value == pytest.approx(expected, abs=3)


def test_one_class_is_refused(classes, features):
    values, _ = classes(20, 4, 2, seed=1)
    one = {"mean": features(values, torch.full((20,), 3))}
    with pytest.raises(UserError, match="one class only"):
        linear_probe(one, one)


def test_a_grid_of_heads_on_5000_images_takes_tens_of_passes(classes):
    values, labels = classes(5000, 192, 10, seed=1, noise=4.0)
    heads = Space.of(values).fit(ClassLoss(labels, 10), WEIGHT_DECAYS)
    assert all(heads.converged)
    assert heads.passes.float().mean() < 150  # measured 50


def test_a_head_with_little_decay_is_at_its_optimum_where_it_says_so(classes):
    values, labels = classes(120, 60, 6, seed=1, noise=1.5)
    plain = torch.from_numpy(standardised(values, values)).double()

    def objective(weights, bias):
        loss = torch.nn.functional.cross_entropy(plain @ weights.double().T + bias.double(), labels)
        return loss.item() + 5e-5 * weights.double().square().sum().item()

    head = Space.of(values).fit(ClassLoss(labels, 6), (1e-4,))
    oracle = LogisticRegression(C=1 / (120 * 1e-4), max_iter=20_000, tol=1e-10).fit(plain.numpy(), labels.numpy())
    least = objective(torch.from_numpy(oracle.coef_), torch.from_numpy(oracle.intercept_))
    assert head.converged == [True] and objective(head.weights[0], head.biases[0]) == pytest.approx(least, rel=1e-3)
