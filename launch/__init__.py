"""The doors: each reads its arguments, builds the parts and hands them to each other."""

if __name__ != "prelude.launch":  # under a second name every module would exist twice
    raise ImportError("launch is imported as prelude.launch")

import os
import sys

from prelude.launch import light_imports  # noqa: F401  before timm and DeepSpeed are imported

# Read when torch is first imported. On CPU, compute threads share their cores with loader workers; threads that spin
# while they wait for one another then cost most of the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# A lost connection is a stack of C++ frames otherwise, above the sentence that says which rank is gone.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

if sys.argv[0] == "-m":  # `python -m prelude.launch.pretrain`: no script has run yet that could do it
    from prelude.launch import missing_package
    from prelude.pretrain import stopping

    missing_package.tell_while_imported()
    stopping.listen()
