"""What is told apart: paired tests against simulations, a bootstrap and scipy; pretrainings repeated over seeds."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from prelude.evaluators.comparing.comparison import Comparison, Entry
from prelude.evaluators.comparing.headline import headline
from prelude.evaluators.comparing.paired import pair, sentences
from prelude.evaluators.comparing.repeats import as_one
from prelude.evaluators.comparing.report.page import page
from prelude.evaluators.comparing.report.words import summary
from prelude.evaluators.comparing.table import markdown, to_json
from prelude.evaluators.features.extraction import Features
from prelude.evaluators.frozen.fewshot import fewshot
from prelude.evaluators.frozen.knn import knn
from prelude.evaluators.frozen.linear_probe import linear_probe
from prelude.evaluators.frozen.ncm import ncm
from prelude.evaluators.results import packed

FIXED = {"recipe": "", "num_parameters": 9, "objective": "mae", "kind": "pretrained"}


def entry_of(name: str, right: np.ndarray, fingerprint: str = "f", encoder: str = "resnet18 at 32 px") -> Entry:
    """right: (draws, images)."""
    value, count = 100 * right.mean(), right.shape[1]
    number = {"top1": {"value": value, "se": float(np.sqrt(value * (100 - value) / count))}}
    result = {
        "evaluator": "knn", "numbers": number, "chosen": {"features": "pool"}, "by_kind": {"pool": number},
        "right": [packed(torch.from_numpy(row)) for row in right], "recipe": {}, "details": {},
        "data": {"test": {"fingerprint": fingerprint, "num_samples": count}},
    }  # fmt: skip
    return Entry(name=name, source=f"runs/{name}", encoder=encoder, results={"knn": result}, **FIXED)


def comparison_of(*entries: Entry) -> Comparison:
    data = entries[0].results["knn"]["data"]
    return Comparison("t", list(entries), ["knn"], data, "prelude compare", "2026-01-31", 1.0, None, {})


def of_recipe(name: str, rights) -> Entry:
    entries = [entry_of(f"{name}-seed{i}" if i else name, right[None]) for i, right in enumerate(rights)]
    (entry,), warnings = as_one(entries, [[each.source for each in entries]])
    assert not warnings and entry.name == name
    return entry


def test_the_same_images_tell_apart_what_their_intervals_do_not():
    rng = np.random.default_rng(0)
    easy = rng.random(2000) < 0.7
    first, second = easy | (rng.random(2000) < 0.05), easy & (rng.random(2000) < 0.99)
    ours, theirs = entry_of("ours", first[None]), entry_of("theirs", second[None])
    found = pair(ours, theirs, "knn")
    expected = stats.ttest_rel(100.0 * first, 100.0 * second).confidence_interval()
    assert (found.low, found.high) == pytest.approx(tuple(expected))
    drawn = rng.integers(2000, size=(4000, 2000))  # a paired bootstrap, written out
    differences = 100 * (first[drawn].mean(1) - second[drawn].mean(1))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])), abs=0.1)
    assert found.told_apart and headline(theirs, "knn").high > headline(ours, "knn").low  # which overlap


def experiment(rng, num_seeds: int, seed_deviation: float = 0.05) -> tuple[Entry, Entry]:
    """Two recipes that are worth the same: images are easy or hard, and seeds lucky or not, for each by itself."""
    easy = rng.normal(size=400)
    sides = []
    for name in ("ours", "theirs"):
        luck = rng.normal(size=(num_seeds, 1)) * seed_deviation * 10
        rights = easy + luck + rng.normal(size=(num_seeds, 400)) > 0
        sides.append(of_recipe(name, rights) if num_seeds > 1 else entry_of(name, rights))
    return tuple(sides)


def test_95_of_100_intervals_over_seeds_hold_the_truth_and_those_of_one_seed_far_fewer():
    rng = np.random.default_rng(1)
    misses = {count: np.mean([pair(*experiment(rng, count), "knn").told_apart for _ in range(200)]) for count in (1, 3)}
    assert misses[3] < 0.09 and misses[1] > 0.4


def test_without_images_that_differ_the_interval_is_welchs():
    rng = np.random.default_rng(2)
    ours, theirs = (100 * rng.random(3) for _ in range(2))
    rights = [[np.arange(100_000) < 1000 * value for value in side] for side in (ours, theirs)]
    found = pair(of_recipe("ours", rights[0]), of_recipe("theirs", rights[1]), "knn")
    expected = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval()
    assert (found.low, found.high) == pytest.approx(tuple(expected), rel=0.01) and found.num_seeds == (3, 3)


def test_no_pair_is_made_of_other_images():
    right = np.ones((1, 10), dtype=bool)
    assert pair(entry_of("a", right), entry_of("b", right, "other"), "knn") is None
    assert pair(entry_of("a", right), entry_of("b", np.ones((1, 11), dtype=bool)), "knn") is None
    same = pair(entry_of("a", right), entry_of("b", right), "knn")
    assert (same.points, same.low, same.high, same.told_apart) == (0, 0, 0, False)


def test_repeated_pretrainings_are_one_row_with_the_spread_of_seeds_apart_from_that_of_the_images():
    rights = [np.arange(100) < 50, np.arange(100) < 56, np.arange(100) < 62]
    entry = of_recipe("ours", rights)
    found = entry.results["knn"]["numbers"]["top1"]
    assert (found["value"], found["seeds"], found["num_seeds"]) == (pytest.approx(56), pytest.approx(6), 3)
    assert found["se"] == pytest.approx(4.94, abs=0.03)  # of 100 images, however many the seeds
    shown = headline(entry, "knn")
    assert (shown.text, shown.seeds) == ("56.0 ± 4.9", "seeds ± 6.0")
    comparison = comparison_of(entry)
    assert "56.0 ± 4.9, seeds ± 6.0" in markdown(comparison) and "seeds ± 6.0, pool" in page(comparison)
    half = np.hypot(1.96 * found["se"], stats.t.ppf(0.975, 2) * 6 / np.sqrt(3))
    assert (shown.low, shown.high) == (pytest.approx(56 - half), pytest.approx(56 + half))
    assert [each.numbers["knn"]["top1"]["value"] for each in entry.repeats] == pytest.approx([50, 56, 62])


def test_a_pretraining_that_failed_is_told_and_the_others_are_the_mean():
    entries = [entry_of(f"ours-{i}", np.arange(10)[None] < i) for i in (2, 4, 6)]
    entries[1] = replace(entries[1], results={}, problem="out of luck.")
    (entry,), warnings = as_one(entries, [[each.source for each in entries]])
    assert entry.results["knn"]["numbers"]["top1"]["value"] == 40 and warnings == ["ours-4: out of luck."]
    assert entry.problem is None and len(entry.repeats) == 2


def test_a_run_of_a_recipes_name_stands_beside_the_mean_of_its_pretrainings():
    rights = [np.arange(10)[None] < i for i in (2, 4, 6)]
    run, *ours = (entry_of(name, right) for name, right in zip(("ours", "ours (2)", "ours-seed1"), rights, strict=True))
    found, _ = as_one([run, *ours], [[run.source], [each.source for each in ours]])
    values = [entry.results["knn"]["numbers"]["top1"]["value"] for entry in found]
    assert [entry.name for entry in found] == ["ours", "ours (2)"] and values == [20, 50]


def test_sentences_say_who_is_told_apart_and_from_what():
    rng = np.random.default_rng(3)
    base = rng.random(1000) < 0.6
    entries = [
        entry_of("ours", (base | (rng.random(1000) < 0.2))[None]),
        entry_of("close", (base | (rng.random(1000) < 0.19))[None]),
        entry_of("far", base[None], encoder="vit at 32 px"),
    ]
    comparison = comparison_of(*entries)
    told, about = sentences(comparison)
    assert told.startswith("By k-NN, ours is told apart from far (+") and " and is not told apart from close (" in told
    assert "same 1,000 test images; of an encoder that was pretrained once another seed may order them" in about
    assert "The leader is not told apart from close (k-NN" in summary(comparison) and "far (" not in summary(comparison)
    table, html = markdown(comparison), page(comparison)
    assert "told apart from far" in table and 'id="told-apart"' in html
    unlike = "The encoders differ, so that this compares objective and encoder together"
    assert unlike in table and unlike in html
    pairs = json.loads(to_json(comparison))["pairs"]
    assert [(each["first"], each["second"]) for each in pairs] == [("ours", "close"), ("ours", "far"), ("close", "far")]


def features(seed: int, count: int) -> dict[str, Features]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    made = {}
    for kind, noise in (("cls", 1.5), ("mean", 1.0)):
        values = torch.randn(count, 6, generator=generator) * noise
        values[torch.arange(count), labels] += 1.5
        made[kind] = Features(values, labels, torch.arange(count), "f", kind)
    return made


def few(train, test):
    return fewshot({"cls": train["cls"]}, {"cls": test["cls"]}, per_class=(3,), shares=(), draws=2)


def first_of(features: dict[str, Features], count: int) -> dict[str, Features]:
    parts = {name: slice(count) for name in ("values", "labels", "sample_ids")}
    return {
        kind: replace(found, **{name: getattr(found, name)[part] for name, part in parts.items()})
        for kind, found in features.items()
    }


@pytest.mark.parametrize("evaluator", [knn, ncm, linear_probe, few])
def test_evaluators_say_which_images_are_right(evaluator):
    """The share of any first part of them is the number that this part alone would get."""
    train, test = features(0, 90), features(1, 40)
    right = torch.stack(list(evaluator(train, test).right)).double()
    assert right.shape == (2 if evaluator is few else 1, 40)
    for part in (40, 13):
        (number,) = evaluator(train, first_of(test, part)).numbers.values()
        assert 100 * right[:, :part].mean().item() == pytest.approx(number.value)


def test_95_of_100_intervals_over_draws_of_few_labels_hold_the_truth():
    """Two encoders that are worth the same; each draw of labels suits one of them better, on all images."""
    rng, apart = np.random.default_rng(4), 0
    for _ in range(200):
        easy = rng.normal(size=2000)
        lucky = rng.normal(size=(2, 5, 1)) * 0.15
        ours, theirs = easy + lucky + rng.normal(size=(2, 5, 2000)) * 0.3 > 0
        apart += pair(entry_of("ours", ours), entry_of("theirs", theirs), "knn").told_apart
    assert apart < 0.09 * 200


def test_draws_that_are_alike_add_their_variance_by_hand():
    rng = np.random.default_rng(5)
    ours, theirs = rng.random((5, 300)) < 0.6, rng.random((5, 300)) < 0.5
    found = pair(entry_of("ours", ours), entry_of("theirs", theirs), "knn")
    images, draws = (100 * (ours.mean(axis) - theirs.mean(axis)) for axis in (0, 1))
    parts = [images.var(ddof=1) / 300, draws.var(ddof=1) / 5]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 299 + parts[1] ** 2 / 4)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(sum(parts))
    assert (found.low, found.high) == pytest.approx((images.mean() - half, images.mean() + half))
