"""Makes `python launch/pretrain.py` and `deepspeed launch/pretrain.py` import the package `pretrain`.

Python puts the folder of a launched script first on sys.path, where `pretrain` would be this folder's
pretrain.py. Importing this module, before anything of ours, puts the repository root in that place.
Spawned workers inherit the mended path.
"""

import sys
from pathlib import Path

_doors = Path(__file__).resolve().parent
sys.path[:] = [str(_doors.parent)] + [entry for entry in sys.path if Path(entry or ".").resolve() != _doors]

import launch  # noqa: E402, F401  what it sets has to be there before torch is imported
