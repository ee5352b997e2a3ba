"""Retrieval against scikit-learn and loops; the search against loops in test_knn.py."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from prelude.data.errors import UserError
from prelude.evaluators.frozen import pieces, retrieval
from prelude.evaluators.frozen.exact_search import Neighbours
from prelude.evaluators.frozen.knn import knn
from prelude.evaluators.frozen.retrieval import ranked


def by_hand(gallery, queried, left_out, ks):
    """Means over queries by loops and scikit-learn. left_out: (query, image) to whether they may not meet."""
    bank, queries = gallery.values.double().numpy(), queried.values.double().numpy()
    bank, queries = bank - bank.mean(0), queries - bank.mean(0)
    bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))
    rows = {name: [] for name in (*(f"recall@{k}" for k in ks), "map", "r_precision")}
    for q in range(len(queries)):
        allowed = [i for i in range(len(bank)) if not left_out(q, i)]
        scores = bank[allowed] @ queries[q]
        relevant = (gallery.labels[allowed] == queried.labels[q]).numpy()
        if not relevant.any():
            continue
        order = np.argsort(-scores)
        for k in ks:
            rows[f"recall@{k}"].append(relevant[order[:k]].any())
        rows["map"].append(average_precision_score(relevant, scores))
        rows["r_precision"].append(relevant[order[: relevant.sum()]].mean())
    return {name: 100 * np.mean(values) for name, values in rows.items()}


@pytest.fixture
def parts(classes, features, monkeypatch):
    monkeypatch.setattr(retrieval, "ELEMENTS", 7 * 90)  # several chunks of queries, and pieces of the gallery
    monkeypatch.setattr(pieces, "PIECE_ELEMENTS", 20 * 8)
    gallery = features(*classes(90, 8, 5, seed=1, noise=3.0), fingerprint="a")
    queried = features(*classes(40, 8, 5, seed=2, noise=3.0), fingerprint="b")
    return gallery, queried


def test_numbers_are_those_of_scikit_learn_and_loops(parts):
    gallery, queried = parts
    outcome = retrieval.retrieval({"mean": gallery}, {"mean": queried}, ks=(1, 3, 20))
    expected = by_hand(gallery, queried, lambda q, i: False, (1, 3, 20))
    assert {name: number.value for name, number in outcome.numbers.items()} == pytest.approx(expected)
    assert 20 < expected["map"] < 90 and outcome.numbers["map"].se == pytest.approx(3, abs=2)


def test_an_image_and_its_group_are_no_answers_to_itself(parts):
    gallery, _ = parts
    groups = torch.arange(len(gallery)) // 3
    alone = retrieval.retrieval({"mean": gallery}, {"mean": gallery})
    assert alone.recipe["leave_one_out"] and alone.warnings == []
    expected = by_hand(gallery, gallery, lambda q, i: q == i, retrieval.KS)
    assert {name: number.value for name, number in alone.numbers.items()} == pytest.approx(expected)
    grouped = dataclasses.replace(gallery, groups=groups)
    outcome = retrieval.retrieval({"mean": grouped}, {"mean": grouped})
    expected = by_hand(gallery, gallery, lambda q, i: groups[q] == groups[i], retrieval.KS)
    assert {name: number.value for name, number in outcome.numbers.items()} == pytest.approx(expected)
    assert outcome.recipe["grouped"]


def test_queries_without_an_answer_are_counted_and_no_number(parts):
    gallery, queried = parts
    labels = queried.labels.clone()
    labels[:7] = 99
    outcome = retrieval.retrieval({"mean": gallery}, {"mean": dataclasses.replace(queried, labels=labels)})
    expected = by_hand(gallery, dataclasses.replace(queried, labels=labels), lambda q, i: False, retrieval.KS)
    assert {name: number.value for name, number in outcome.numbers.items()} == pytest.approx(expected)
    assert "7 queries" in outcome.warnings[0]
    with pytest.raises(UserError, match="classes in common"):
        ranked(gallery, dataclasses.replace(queried, labels=labels + 99))


def test_the_kind_is_chosen_on_the_gallery_alone(problem):
    train, test = problem
    test = {kind: dataclasses.replace(part, data_fingerprint="others") for kind, part in test.items()}
    outcome = retrieval.retrieval(train, test)
    assert outcome.chosen["features"] == "mean" and set(outcome.by_kind) == {"cls", "mean"}
    mixed = {kind: dataclasses.replace(part, labels=part.labels.roll(7)) for kind, part in test.items()}
    assert retrieval.retrieval(train, mixed).chosen == outcome.chosen


def test_a_gallery_that_no_kind_can_be_chosen_on_is_searched_by_the_first(problem):
    """All of one camera, queried from another: within the gallery nothing may be found."""
    train, test = problem
    groups = [torch.zeros(len(train["cls"]), dtype=torch.int64), torch.ones(len(test["cls"]), dtype=torch.int64)]
    gallery, queried = (
        {kind: dataclasses.replace(of, groups=group, data_fingerprint=str(number)) for kind, of in part.items()}
        for number, (part, group) in enumerate(zip(problem, groups, strict=True))
    )
    outcome = retrieval.retrieval(gallery, queried)
    alone = retrieval.retrieval({"cls": gallery["cls"]}, {"cls": queried["cls"]})
    assert list(gallery) == ["cls", "mean"] and outcome.chosen["features"] == "cls"
    assert outcome.numbers["map"].value == alone.numbers["map"].value
    assert any("not chosen" in told for told in outcome.warnings)
    assert outcome.numbers["map"].se is None  # of another camera nothing is known
    assert [told.startswith("All test images are of one group") for told in alone.warnings] == [True]


def test_knn_searches_once_for_each_centring(problem, monkeypatch):
    train, test = ({"mean": part["mean"]} for part in problem)
    searched, nearest = [], Neighbours.nearest

    def counted(self, queries, k):
        searched.append(bool(self.mean.any()))
        return nearest(self, queries, k)

    monkeypatch.setattr(Neighbours, "nearest", counted)
    found = knn(train, test).details["by_features"]["mean"]
    assert searched == [True, False] and len(found) == 4


def test_a_query_that_is_in_the_gallery_too_is_no_answer_to_itself(parts):
    gallery, queried = parts
    same = torch.full((40,), -1)
    same[:25] = torch.arange(60, 85)
    values, labels = queried.values.clone(), queried.labels.clone()
    values[:25], labels[:25] = gallery.values[60:85], gallery.labels[60:85]
    queried = dataclasses.replace(queried, values=values, labels=labels, same_as=same)
    outcome = retrieval.retrieval({"mean": gallery}, {"mean": queried})
    expected = by_hand(gallery, queried, lambda q, i: same[q] == i, retrieval.KS)
    assert {name: number.value for name, number in outcome.numbers.items()} == pytest.approx(expected)
    with pytest.raises(UserError, match="in which a query finds 89 images"):
        retrieval.retrieval({"mean": gallery}, {"mean": queried}, ks=(89,))
