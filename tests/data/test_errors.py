"""How somebody else's error is told."""

import pytest

from prelude.data.errors import in_one_line


@pytest.mark.parametrize(
    "error, plain, typed",
    [
        (ValueError("bad\n  header"), "bad header", "ValueError: bad header"),
        (AssertionError(), "AssertionError", "AssertionError"),
    ],
)
def test_an_error_is_one_line_and_never_empty(error, plain, typed):
    assert in_one_line(error) == plain
    assert in_one_line(error, typed=True) == typed
    assert in_one_line(error, 3) == plain[:3]
