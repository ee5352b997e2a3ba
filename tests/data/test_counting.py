"""How things are counted: one is one."""

import numpy as np
import pytest

from prelude.data.counting import counted


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
