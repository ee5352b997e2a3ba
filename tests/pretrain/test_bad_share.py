from contextlib import nullcontext
from pathlib import Path

import pytest

from prelude.data.errors import RunStopped
from prelude.pretrain.bad_share import refuse_many


@pytest.mark.parametrize(
    ("bad", "read", "share", "ends"),
    [
        (9, 100, 0.05, False),  # no more than a global batch, of which a share says nothing
        (11, 100, 0.05, True),
        (11, 1000, 0.05, False),
        (1, 1000, 0.0, True),  # none at all
        (0, 1000, 0.0, False),
        (0, 0, 0.0, False),
    ],
)
def test_a_run_ends_above_a_share_of_bad_samples_at_any_number_of_ranks(bad, read, share, ends):
    with pytest.raises(RunStopped, match="more than data.max_bad_share") if ends else nullcontext():
        refuse_many(bad, read, share, 10, Path("bad_samples.jsonl"))
