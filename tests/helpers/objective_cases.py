"""Run by test_at_two_ranks.py through the real launcher: objectives trained by the engine.

`deepspeed --num_gpus 2 objective_cases.py OUT`: what jepa_cases.py and convnet_cases.py write goes into OUT/2, and that
of jepa_cases.py also into OUT/1, where the first rank is then alone.
"""

import sys
from pathlib import Path

import convnet_cases
import jepa_cases
from two_and_one import at_two_ranks_and_one

from prelude.pretrain import distributed


def cases(out: Path) -> None:
    jepa_cases.cases(out)
    if distributed.world_size() > 1:
        convnet_cases.cases(out)


if __name__ == "__main__":
    at_two_ranks_and_one(cases, Path(sys.argv[-1]))
