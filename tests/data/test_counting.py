"""How things are counted and listed: one is one."""

import numpy as np
import pytest

from prelude.data.counting import counted, listed, shortened, size


@pytest.mark.parametrize(
    ("number", "what", "said"),
    [
        (0, "image", "0 images"),
        (1, "image", "1 image"),
        (np.int64(1), "rank", "1 rank"),
        ("1", "labelled image", "1 labelled image"),
        ("1,000", "image", "1,000 images"),
        (2, "class", "2 classes"),
        (1, "class", "1 class"),
        (2, "query", "2 queries"),
        (2, "key", "2 keys"),
        (2, "micro-batch", "2 micro-batches"),
        ("1.0", "step", "1.0 steps"),
    ],
)
def test_the_word_follows_the_number(number, what, said):
    assert counted(number, what) == said


def test_names_are_listed_as_one_says_them():
    assert [listed(["a", "b", "c"][:count]) for count in range(4)] == ["", "a", "a and b", "a, b and c"]


def test_of_many_names_the_first_are_told():
    assert shortened(["a", "b", "c"], most=3) == "a, b, c"
    assert shortened(["a", "b", "c"], most=1, between="; ") == "a; and 2 more"


def test_a_size_is_told_in_gib_from_one_on():
    assert [size(num_bytes) for num_bytes in (0, 2**30 - 2**20, 2**30, 1.5 * 2**40)] == [
        "0 MiB",
        "1,023 MiB",
        "1.0 GiB",
        "1,536.0 GiB",
    ]
