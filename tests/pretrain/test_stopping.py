"""Signals, each in a small process of its own: what it was busy with decides what becomes of them."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from engine_cases import NUM_SAMPLES, Regression, batch_at, config_of
from forked import code_of
from in_memory import MemoryLoader, NoStore
from runs import ROOT

from prelude.pretrain import distributed, stopping
from prelude.pretrain.engine import Engine
from prelude.pretrain.monitors import Monitor

# In C most of the time, as in a collective or an import.
STUCK_IN_C = "import ctypes\nwhile True: ctypes.CDLL(None).pause()\n"


class Process:
    def __init__(self, body: str, tmp_path, **env: str):
        script = tmp_path / "script.py"
        script.write_text("from prelude.pretrain import stopping\nstopping.listen()\n" + body)
        env = os.environ | {"PYTHONPATH": str(ROOT / "src")} | env
        self.process = subprocess.Popen(
            [sys.executable, "-u", script], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def until(self, line: str) -> "Process":
        while (read := self.process.stdout.readline()).strip() != line:
            assert read, f"{line!r} never came"
        return self

    def signal(self, number: int) -> "Process":
        self.process.send_signal(number)
        return self

    def end(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=60)
        return self.process.returncode, output


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_before_there_is_anything_to_save_a_signal_leaves_at_once_even_out_of_c(number, code, tmp_path):
    process = Process("print('here')\n" + STUCK_IN_C, tmp_path).until("here")
    found, output = process.signal(number).end()
    assert found == code and "Traceback" not in output and len(output.splitlines()) == 1


POSTPONED = (
    "import time\n"
    "with stopping.postponed():\n"
    "    print('here')\n"
    "    while not stopping.requested(): time.sleep(0.01)\n"
    "    print('asked')\n"
    "    time.sleep(0.2)  # a save takes as long, in which the thread that hears signals gets its turn\n"
    "    while waiting: time.sleep(0.01)\n"
    "print('left'); raise SystemExit(7)\n"
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_postponed_signal_is_a_request(number, tmp_path):
    code, output = Process("waiting = False\n" + POSTPONED, tmp_path).until("here").signal(number).end()
    assert code == 7 and output.splitlines()[0].startswith(signal.Signals(number).name)
    assert output.splitlines()[1:] == ["asked", "left"]


def test_who_is_told_to_end_once_more_after_saving_is_not_told_that_nothing_was_saved(tmp_path):
    body = "waiting = False\n" + POSTPONED.replace("raise SystemExit(7)", STUCK_IN_C)
    process = Process(body, tmp_path).until("here").signal(signal.SIGTERM).until("left")
    code, output = process.signal(signal.SIGTERM).end()
    assert code == 75 and output.splitlines()[-1] == "SIGTERM: ended at once"


def test_terminating_twice_is_still_a_request_and_ctrl_c_twice_is_not(tmp_path):
    body = "stopping._SAME_INTERRUPT = 0.0\nwaiting = True\n" + POSTPONED
    process = Process(body, tmp_path).until("here")
    process.signal(signal.SIGTERM).until("asked").signal(signal.SIGTERM).signal(signal.SIGINT)
    assert process.process.poll() is None
    while process.process.poll() is None:  # two that come together are one to the operating system
        process.signal(signal.SIGINT)
    code, output = process.end()
    assert code == 130 and "left" not in output


def test_ctrl_c_that_a_launcher_passes_on_is_not_a_second_one(tmp_path):
    body = "stopping._SAME_INTERRUPT = 60.0\nwaiting = False\n" + POSTPONED
    process = Process(body, tmp_path).until("here").signal(signal.SIGINT).signal(signal.SIGINT)
    assert process.end()[0] == 7


def test_what_a_shell_ignores_stays_ignored(tmp_path):
    body = "import signal; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    script = tmp_path / "script.py"
    script.write_text("from prelude.pretrain import stopping\nstopping.listen()\n" + body)
    command = ["sh", "-c", f"trap '' INT; exec {sys.executable} {script}"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize(
    "launcher", [{"TORCHELASTIC_RUN_ID": "x"}, {"LOCAL_SIZE": "2", "CROSS_RANK": "0"}, {"PRELUDE_PARENT": "own"}, {}]
)
def test_a_rank_without_its_launcher_asks_itself_to_end_and_a_plain_run_goes_on(launcher, tmp_path):
    """A process between the test and the rank, killed."""
    rank, found = tmp_path / "rank.py", tmp_path / "found"
    rank.write_text(
        "from prelude.pretrain import stopping\nstopping.listen()\nimport os, time, pathlib\n"
        "with stopping.postponed():\n"
        "    print(os.getpid(), flush=True)\n"
        "    until = time.monotonic() + (60 if stopping._lifelines() else 3)\n"
        "    while not stopping.requested() and time.monotonic() < until: time.sleep(0.01)\n"
        f"    pathlib.Path({str(tmp_path / 'writing')!r}).write_text(str(stopping.requested()))\n"
        f"os.rename({str(tmp_path / 'writing')!r}, {str(found)!r})\n"
    )
    between = (
        "import os, subprocess, sys\n"
        f"env = os.environ | ({{'PRELUDE_PARENT': str(os.getpid())}} if 'PRELUDE_PARENT' in os.environ else {{}})\n"
        f"subprocess.Popen([sys.executable, {str(rank)!r}], env=env, start_new_session=True).wait()\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")} | launcher
    parent = subprocess.Popen([sys.executable, "-c", between], env=env, stdout=subprocess.PIPE, text=True)
    parent.stdout.readline()
    parent.kill()
    parent.wait()
    while not found.exists():
        time.sleep(0.05)
    assert found.read_text() == str(bool(launcher))


def test_a_rank_that_leaves_is_not_disturbed_by_others_that_leave_when_they_hear_it():
    """Their connections close while a thread still tells them; the collective that fails for it is no failure."""

    class Telling:
        def leave(self, code, why):
            told.set()
            time.sleep(0.5)

        def explain(self, error):
            return None

    def act():
        distributed._Watching.watch = Telling()
        threading.Thread(target=lambda: (distributed.left(stopping.PREEMPTED), os._exit(75))).start()
        with distributed.explained():
            told.wait()
            raise RuntimeError("Connection closed by peer")

    told = threading.Event()
    assert code_of(act) == 75


@pytest.mark.parametrize("by_signal", [True, False], ids=["by a signal", "by its file"])
def test_a_run_that_was_asked_to_end_knows_it_until_its_monitors_are_closed(by_signal, tmp_path):
    class Asking(Monitor):
        closed_when_asked: list[tuple[bool, bool]] = []

        def record(self, record):
            if by_signal:
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                (tmp_path / "STOP").touch()

        def close(self):
            self.closed_when_asked.append((stopping.requested(), stopping.wanted()))

    distributed.start()
    loader = MemoryLoader(8, NUM_SAMPLES, batch_at)
    outcome = Engine(config_of({"train": {}}, tmp_path), Regression(), loader, NoStore(), [Asking()]).run()
    distributed.stop()
    assert outcome.reason == "preempted"
    assert Asking.closed_when_asked == [(by_signal, True)]
    assert not (stopping.requested() or stopping.wanted())
