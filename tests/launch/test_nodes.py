"""Two nodes, each with a launcher of its own: one is cut off, and the run goes on at another size."""

import os
import subprocess
import sys

from runs import ROOT

DRILL = ROOT / "tests" / "campaign" / "nodes.py"


def test_a_node_is_cut_off_and_the_run_goes_on_without_it(tmp_path):
    """On addresses of the loopback, where everybody may; the whole drill has networks that can be taken away."""
    words = ["--launcher", "torchrun", "--loopback", "--without-comparison", "--folder", str(tmp_path / "drill")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(DRILL), *words], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "node 1 is cut off (kill)" in done.stdout and "resumed at step 8 of 36" in done.stdout
    assert "Rank 1" in next(line for line in done.stdout.splitlines() if "node0 says: error:" in line)
