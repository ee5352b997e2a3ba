"""Between two logged steps the host never waits for the device: counted for every objective, at every ZeRO stage."""

import json
import os
import subprocess

import pytest
import torch
import waiting_cases
from runs import BIN, ROOT, deepspeed

from prelude.pretrain.host_waits import counted


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def found(request, tmp_path_factory) -> list[dict[str, list[str]]]:
    out = tmp_path_factory.mktemp(f"world{request.param}")
    command = [*deepspeed(request.param), waiting_cases.__file__, str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("case", waiting_cases.CASES)
def test_a_step_that_is_not_logged_waits_for_nothing(found, case):
    for of_rank in found:
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
        with counted() as lines:
            wait()
        assert len(lines) == 1
    with counted() as lines:
        values.sum().add_(1).clone().numpy()
    assert lines == []
