"""Between two logged steps the host never waits for the device: counted for every objective, at every ZeRO stage."""

import json
import os
import subprocess

import pytest
import torch
import waiting_cases
from runs import LAUNCHED, deepspeed

from prelude.pretrain.host_waits import counting_waits


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, list[dict[str, list[str]]]]:
    """By number of ranks, for each of them."""
    out = tmp_path_factory.mktemp("worlds")
    command = [*deepspeed(2), waiting_cases.__file__, str(out)]
    env = os.environ | LAUNCHED
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {
        ranks: [json.loads((out / str(ranks) / f"{rank}.json").read_text()) for rank in range(ranks)]
        for ranks in (1, 2)
    }


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", waiting_cases.CASES)
def test_a_step_that_is_not_logged_waits_for_nothing(found, case, ranks):
    for of_rank in found[ranks]:
        expected = ["tolist"] if case.startswith("dseqjepa") else []  # the lengths that its packing needs
        assert [line.split()[0] for line in of_rank[case]] == expected, "\n".join(of_rank[case])


def test_the_count_sees_what_waits():
    values, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    for wait in [
        lambda: values[0].item(),
        lambda: float(values.sum()),
        lambda: bool(mask.any()),
        lambda: values.tolist(),
        lambda: values[mask],
        lambda: torch.equal(values, values),
        lambda: mask.nonzero(),
        lambda: values.cpu(),
        lambda: torch.tensor([1.0], device=values.device),
        lambda: values.new_tensor([1.0]),
    ]:
        with counting_waits() as lines:
            wait()
        assert len(lines) == 1
    with counting_waits() as lines:
        values.sum().add_(1).clone().numpy()
    assert lines == []
