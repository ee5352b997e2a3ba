"""The doors: each reads its arguments, builds the parts and hands them to each other."""

if __name__ != "prelude.launch":  # under a second name every module would exist twice
    raise ImportError("launch is imported as prelude.launch")

import os

# Read when torch is first imported. On CPU, compute threads share their cores with loader workers; threads that spin
# while they wait for one another then cost most of the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
