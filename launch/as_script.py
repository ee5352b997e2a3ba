"""Makes `python launch/pretrain.py` and `deepspeed launch/pretrain.py` import the package `prelude`, installed or not.

Python puts the folder of a launched script first on sys.path, where `prelude` would be this folder's prelude.py.
Importing this module, before anything of ours, puts there the folder that holds this checkout's package instead, and
nothing else. Spawned workers inherit the mended path.
"""

import sys
from pathlib import Path

_doors = Path(__file__).resolve().parent
_checkout = _doors.parent / "src"
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _doors]
if (_checkout / "prelude").is_dir():
    sys.path.insert(0, str(_checkout))

import prelude.launch  # noqa: E402, F401  what it sets has to be there before torch is imported
from prelude.launch import missing_package  # noqa: E402
from prelude.pretrain import stopping  # noqa: E402

missing_package.tell_while_imported()
stopping.listen()
