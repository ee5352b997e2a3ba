import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from extracting import extract

from prelude.data.errors import UserError
from prelude.data.shards import ShardIndex
from prelude.evaluators.features.pixels import open_pixels
from prelude.evaluators.frozen import knn as module
from prelude.evaluators.frozen import pieces
from prelude.evaluators.frozen.exact_search import Neighbours
from prelude.evaluators.frozen.knn import K, classify, knn
from prelude.evaluators.frozen.splits import hold_out

CIFAR = Path(__file__).resolve().parents[4] / "shared" / "data" / "cifar10"


def search(bank, labels, queries, query_labels, num_classes, ks, *, weighted=True, centred=True, temperature=0.07):
    """Accuracy by k of one bank (N, D), as `knn` counts it; without `weighted`, every neighbour has one vote."""
    neighbours = Neighbours(bank, labels, centred=centred, device=bank.device)
    temperatures = (temperature if weighted else None,)
    found = classify(neighbours, queries, query_labels, num_classes, ks, temperatures, always=(K,))
    return {k: numbers for (k, _), numbers in found.items()}


def brute_force(bank, labels, queries, num_classes, k, temperature, weighted, centred):
    """Class rankings by loops over samples, neighbours and features."""
    bank, queries = bank.double().tolist(), queries.double().tolist()
    if centred:
        mean = [sum(column) / len(bank) for column in zip(*bank, strict=True)]
        bank = [[x - m for x, m in zip(row, mean, strict=True)] for row in bank]
        queries = [[x - m for x, m in zip(row, mean, strict=True)] for row in queries]
    rankings = []
    for query in queries:
        similar = []
        for row, label in zip(bank, labels.tolist(), strict=True):
            product = sum(a * b for a, b in zip(query, row, strict=True))
            norm = math.sqrt(sum(a * a for a in query)) * math.sqrt(sum(b * b for b in row))
            similar.append((product / norm, label))
        votes = [0.0] * num_classes
        for s, label in sorted(similar, reverse=True)[:k]:
            votes[label] += math.exp(s / temperature) if weighted else 1.0
        order = sorted(range(num_classes), key=lambda c: (-votes[c], c))
        rankings.append([c for c in order if votes[c] > 0])
    return rankings


@pytest.mark.parametrize("weighted, temperature", [(True, 0.07), (True, 0.01), (True, 0.5), (False, 0.07)])
@pytest.mark.parametrize("centred", [True, False])
def test_equals_brute_force(classes, weighted, temperature, centred, monkeypatch):
    monkeypatch.setattr(module, "QUERIES", 20)  # several chunks and pieces, the last ones short
    monkeypatch.setattr(pieces, "PIECE_ELEMENTS", 20 * 33)
    bank, labels = classes(130, 6, 12, seed=1)
    queries, query_labels = classes(45, 6, 12, seed=2)
    settings = {"weighted": weighted, "centred": centred, "temperature": temperature}
    found = search(bank, labels, queries, query_labels, 12, (1, 5, 20, 50), **settings)
    for k in (1, 5, 20, 50):
        rankings = brute_force(bank, labels, queries, 12, k, temperature, weighted, centred)
        for name, guesses in (("top1", 1), ("top5", 5)):
            hits = sum(int(y) in r[:guesses] for r, y in zip(rankings, query_labels, strict=True))
            assert found[k][name].value == pytest.approx(100 * hits / 45), (k, name)


def test_a_class_without_a_vote_is_never_among_the_five(features):
    values = torch.eye(12)
    labels = torch.arange(12)
    found = search(values, labels, values + 0.01, labels.roll(1), 12, (1,), centred=False)
    assert found[1]["top5"].value == 0


def test_adding_a_constant_to_every_feature_changes_nothing_when_centred(classes):
    bank, labels = classes(200, 8, 4, seed=1)
    queries, query_labels = classes(100, 8, 4, seed=2)
    plain = search(bank, labels, queries, query_labels, 4, (20,))
    moved = search(bank + 5, labels, queries + 5, query_labels, 4, (20,))
    assert plain == moved


def test_headline_is_k_20_weighted_and_centred(problem):
    train, test = problem
    outcome = knn(train, test)
    assert outcome.recipe["k"] == [20] and outcome.recipe["temperature"] == [0.07]
    assert outcome.numbers == outcome.details["by_features"]["mean"]["cosW, centred"][20]
    assert set(outcome.numbers) == {"top1", "top5"}
    others = outcome.details["by_features"]["mean"]["cosW, centred"]
    assert sorted(others) == [1, 5, 10, 20, 50, 100, 200]


def test_the_kind_of_feature_is_chosen_without_test_labels(problem):
    train, test = problem
    assert knn(train, test).chosen["features"] == "mean"
    swapped = {"cls": test["mean"], "mean": test["cls"]}
    swapped = {kind: dataclasses.replace(f, values=test[kind].values) for kind, f in swapped.items()}
    mixed = {kind: dataclasses.replace(f, labels=f.labels.roll(7)) for kind, f in swapped.items()}
    assert knn(train, mixed).chosen["features"] == "mean"


def test_k_and_temperature_are_chosen_on_a_held_out_part_of_train(problem):
    train, test = ({"mean": part["mean"]} for part in problem)
    ks, temperatures = (1, 10, 100), (0.01, 0.07, 1.0)
    outcome = knn(train, test, ks=ks, temperatures=temperatures)
    held_out = outcome.details["held_out"]
    assert len(held_out) == 9
    fit, held = hold_out(train["mean"].labels, 0)
    for row in held_out:
        values, labels = train["mean"].values, train["mean"].labels
        alone = search(
            values[fit], labels[fit], values[held], labels[held], 10, (row["k"],), temperature=row["temperature"]
        )
        assert alone[row["k"]]["top1"].value == row["held_out_top1"]
    best = max(held_out, key=lambda row: row["held_out_top1"])
    assert outcome.chosen == {key: best[key] for key in ("features", "k", "temperature")}
    k, temperature = outcome.chosen["k"], outcome.chosen["temperature"]
    assert outcome.numbers == outcome.details["by_features"]["mean"]["cosW, centred"][k][temperature]
    mixed = {"mean": dataclasses.replace(test["mean"], labels=test["mean"].labels.roll(7))}
    assert knn(train, mixed, ks=ks, temperatures=temperatures).chosen == outcome.chosen


def test_impossible_settings_are_refused(problem):
    for wrong in ({"ks": (0, 5)}, {"temperatures": (0.0,)}):
        with pytest.raises(UserError, match="above 0"):
            knn(*problem, **wrong)


def test_a_small_temperature_does_not_overflow(classes):
    bank, labels = classes(100, 6, 3, seed=1)
    assert search(bank, labels, bank, labels, 3, (20,), temperature=1e-5)[20]["top1"].value == 100


def test_few_training_samples_are_all_neighbours(classes, features):
    values, labels = classes(8, 4, 2, seed=1)
    outcome = knn({"mean": features(values, labels)}, {"mean": features(values, labels)})
    assert sorted(outcome.details["by_features"]["mean"]["cos"]) == [1, 5, 20]
    assert "top5" not in outcome.numbers


@pytest.mark.skipif(not CIFAR.is_dir(), reason=f"needs {CIFAR}")
def test_pixels_of_real_images_from_shards_to_accuracy():
    train, test = ([str(CIFAR / f"{name}-{i:06d}.tar") for i in range(n)] for name, n in (("train", 2), ("test", 1)))
    encoder = open_pixels("pixels:32")
    parts = [extract(encoder, ShardIndex(shards, "cls"), "cls", batch_size=512) for shards in (train, test)]
    found = knn(*parts).numbers["top1"].value

    def plain(shards):
        decoded = wds.WebDataset(shards, shardshuffle=False).decode("rgb").to_tuple("jpg", "cls")
        images, labels = zip(*decoded, strict=True)
        return ((np.stack(images) - encoder.mean) / encoder.std).reshape(len(images), -1), np.array(labels)

    (bank, labels), (queries, query_labels) = plain(train), plain(test)
    mean = bank.mean(0)
    bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank - mean, queries - mean))
    similar = queries @ bank.T
    nearest = np.argsort(-similar, 1)[:, :20]
    votes = np.zeros((len(queries), 10))
    for c in range(10):
        votes[:, c] = (np.exp(np.take_along_axis(similar, nearest, 1) / 0.07) * (labels[nearest] == c)).sum(1)
    expected = 100 * (votes.argmax(1) == query_labels).mean()
    assert found == pytest.approx(expected, abs=0.11)  # one image of 1,000: float32 against float64
    assert 30 < found < 43
