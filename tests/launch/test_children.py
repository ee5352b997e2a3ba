"""A door as a child process: what it says is shown, why it failed is known, and who stops the parent stops it too."""

import os
import signal
import threading
import time

import pytest

from prelude.launch import children
from prelude.launch.children import Preempted, run_door


@pytest.fixture
def a_door(tmp_path, monkeypatch):
    """Writes a door that does nothing but what a test wants."""
    monkeypatch.setattr(children, "DOORS", tmp_path)

    def write(text: str) -> str:
        (tmp_path / "small.py").write_text(text)
        return "small"

    return write


def test_its_lines_are_shown_under_its_name(a_door, capfd):
    door = a_door("import sys; print('given', *sys.argv[1:]); print('told', file=sys.stderr)")
    assert run_door(door, ["a", "b=c"], num_ranks=1, name="mae") is None
    assert sorted(capfd.readouterr().err.splitlines()) == ["[mae] given a b=c", "[mae] told"]


def test_of_several_ranks_only_what_they_say_is_shown(a_door, capfd):
    said = "given\n[2026-01-31 08:00:00,000] [ERROR] [launch.py:1:main] exits with code 1\n"
    door = a_door(f"import os; os.write(1, {said.encode()!r})")  # at once, or the ranks' words mix within a line
    assert run_door(door, [], num_ranks=2, name="mae") is None
    lines = capfd.readouterr().err.splitlines()
    assert lines.count("[mae] given") == 2 and len(lines) == 4 and all("given" in x or "[ERROR]" in x for x in lines)


def test_why_it_failed_is_one_sentence(a_door):
    door = a_door("print('error: Found 2 errors in x:\\n  one.\\n  two.\\nmore'); raise SystemExit(2)")
    assert run_door(door, [], num_ranks=1, name="mae") == "Found 2 errors in x: one. two."
    assert run_door(a_door("raise SystemExit(3)"), [], num_ranks=1, name="mae") == (
        "small ended with code 3 and did not say why."
    )


def test_one_that_was_pre_empted_ends_the_parent_too(a_door):
    with pytest.raises(Preempted):
        run_door(a_door("raise SystemExit(75)"), [], num_ranks=1, name="mae")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_and_the_child_ends_in_its_own_way(number, a_door, tmp_path):
    saved, ready = tmp_path / "saved", tmp_path / "ready"
    door = a_door(
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n"
        f"    pathlib.Path({str(saved)!r}).write_text('all')\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(60)\n"
    )

    def stop():
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(Preempted):
        run_door(door, [], num_ranks=1, name="mae")
    assert saved.read_text() == "all" and signal.getsignal(number) is before


def test_the_child_of_a_rank_is_no_rank(a_door, monkeypatch, capfd):
    """As of one that a launcher started: it would wait for the other ranks, which have ended."""
    of_a_rank = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29501",
                 "TORCHELASTIC_USE_AGENT_STORE": "True", "OMPI_COMM_WORLD_RANK": "0", "SLURM_PROCID": "0"}  # fmt: skip
    for name, value in of_a_rank.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    door = a_door(f"import os; print(sorted(set(os.environ) & {{*{sorted(of_a_rank)}, 'SLURM_JOB_ID'}}))")
    assert run_door(door, [], num_ranks=1, name="mae") is None
    assert "[mae] ['SLURM_JOB_ID']" in capfd.readouterr().err
