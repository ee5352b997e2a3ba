"""Tables of plain text: nothing is cut, no word is broken, and 80 columns are enough."""

import pytest

from prelude.launch.plain_tables import columns, pairs, paragraph

LONG = "runs/" + "a_very_long_name_of_a_folder/" * 5


@pytest.mark.parametrize("terminal", ["20", "80", "200"])
def test_every_word_stands_whole_and_lines_fit_as_far_as_words_do(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", terminal)
    words = ["memory", *["train.micro_batch=128,"] * 12, LONG, "well-known", "end"]
    width = max(int(terminal), 80)
    for told in (pairs("a title", [("first", " ".join(words)), ("the second", "short")]), paragraph(" ".join(words))):
        assert all(word in told.split() for word in words)
        assert all(len(line) <= width for line in told.splitlines() if LONG not in line)


def test_columns_are_right_justified_below_titles_of_several_lines(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    told = columns("of a machine", ("ZeRO", "largest\nmicro-batch"), [("0", "4 (17)"), ("1", "none")])
    assert told.splitlines() == [
        "of a machine",
        "ZeRO      largest",
        "      micro-batch",
        "----  -----------",
        "   0       4 (17)",
        "   1         none",
    ]
