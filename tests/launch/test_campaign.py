"""A small part of the campaign of kills and faults, which finds what is wrong where something is."""

import os
import subprocess
import sys

from runs import ROOT

CAMPAIGN = ROOT / "tests" / "campaign" / "kills.py"


def test_a_few_kills_faults_and_damaged_checkpoints_end_right(tmp_path):
    words = ["--kills", "3", "--faults", "4", "--damaged", "2", "--seed", "7", "--ranks", "1", "2"]
    words += ["--folder", str(tmp_path / "campaign")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(CAMPAIGN), *words], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert ", 0 wrong" in done.stdout and "SIG" in done.stdout and ", 2 ranks" in done.stdout
