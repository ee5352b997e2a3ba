"""The benchmarks that wait for a GPU run to their end on a CPU at toy size, so that they work the first time there."""

import argparse
import json
import os
import signal
import subprocess
import sys

import pytest
from runs import ROOT


@pytest.mark.tutorial
def test_everything_on_gpu_py_does_works(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "on_gpu.py"), "--smoke", "--results", str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    entries = json.loads((tmp_path / "smoke.json").read_text())["entries"]
    kinds = {
        "host_waits",
        "regions",
        "photometric",
        "save",
        "loader",
        "fed",
        "resumed",
        "run",
        "predicted",
        "step mae-b compiled",
    }
    assert kinds <= set(entries) and not any("failed" in entry for entry in entries.values())
    assert entries["resumed"]["bitwise"] and 0 < entries["resumed"]["stopped_after"] < 12
    assert all(entry["mfu"] > 0 and entry["ms"] > 0 for name, entry in entries.items() if name.startswith("step "))
    assert all(f"| {name.removeprefix('step ')} |" in (tmp_path / "smoke.md").read_text() for name in entries)
    # What is done is not done again, what failed is
    entries["regions"] = {"failed": "by hand"}
    found = json.loads((tmp_path / "smoke.json").read_text()) | {"entries": entries}
    (tmp_path / "smoke.json").write_text(json.dumps(found))
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    said = [line.partition(":")[0] for line in again.stdout.splitlines()]
    assert said[:-1] == ["regions"] and again.returncode == 0


def test_a_process_that_dies_costs_the_entry_under_way_and_no_other(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import on_gpu

    with on_gpu.Worker(argparse.Namespace(folder=tmp_path, smoke=True)) as worker:
        assert "times_faster_14" in worker.measured("regions", 100)
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
        assert worker.measured("regions", 100) == {"failed": "exit code -9"}
        assert "AttributeError" in worker.measured("no such entry", 100)["failed"]
        started = worker.measured("regions", 100)
        assert "times_faster_14" in started and "no answer in time" in worker.measured("fed", 0.1)["failed"]
        assert worker.process is None
