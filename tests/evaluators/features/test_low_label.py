import numpy as np
import pytest

from prelude.data.errors import UserError
from prelude.evaluators.features.low_label import low_label

CLASSES = np.random.default_rng(0).permutation(np.repeat([0, 3, 7], [40, 55, 205]))


def counts(ids) -> list[int]:
    return np.unique(CLASSES[ids], return_counts=True)[1].tolist()


def test_each_class_gives_exactly_what_is_asked_for():
    assert counts(low_label(CLASSES, per_class=5)) == [5, 5, 5]
    assert counts(low_label(CLASSES, fraction=0.1)) == [4, 6, 20]
    assert counts(low_label(CLASSES, fraction=0.001)) == [1, 1, 1]
    assert low_label(CLASSES).tolist() == list(range(300))
    assert low_label(CLASSES, fraction=1.0).tolist() == list(range(300))


def test_parts_of_one_seed_are_nested_and_those_of_two_differ():
    parts = [set(low_label(CLASSES, per_class=n, seed=3).tolist()) for n in (1, 4, 20, 40)]
    assert all(small < large for small, large in zip(parts, parts[1:], strict=False))
    assert set(low_label(CLASSES, fraction=0.1, seed=3)) <= set(low_label(CLASSES, fraction=0.3, seed=3))
    assert parts[2] != set(low_label(CLASSES, per_class=20, seed=4).tolist())


def test_every_image_of_a_class_is_as_likely():
    drawn = np.zeros(300)
    for seed in range(600):
        drawn[low_label(CLASSES, per_class=10, seed=seed)] += 1
    share = drawn[CLASSES == 0] / 600
    assert share.mean() == pytest.approx(0.25) and share.min() > 0.17 and share.max() < 0.33


def test_ids_grow_and_do_not_repeat():
    ids = low_label(CLASSES, per_class=12)
    assert (np.diff(ids) > 0).all()


def test_a_class_with_too_few_images_is_named():
    with pytest.raises(UserError, match=r"Class 0 has 40 training images, fewer than objective.per_class=41"):
        low_label(CLASSES, per_class=41)
