"""Runs from Python: what is asked reaches the doors, an interrupt leaves a checkpoint, a refusal is one sentence."""

import io
import os
import queue
import time
from pathlib import Path

import pytest
from jupyter_client import KernelManager
from runs import ROOT, RunDir

import prelude
from prelude.data.errors import UserError
from prelude.launch import notebook
from prelude.launch.children import Preempted
from prelude.launch.progress_line import ProgressLine
from prelude.launch.python_settings import option_words, overrides_of


def test_settings_are_named_in_full_or_by_their_last_part():
    told = overrides_of("mae_cifar10", {"shards": Path("a.tar"), "epochs": 5, "optimizer.lr": 1e-3, "seed": 3})
    assert told == ["data.shards=a.tar", "train.epochs=5", "optimizer.lr=0.001", "seed=3"]
    told = overrides_of("mae_cifar10", {"optimizer": {"lr": 1e-3, "betas": (0.9, 0.99)}, "mask_ratio": 0.6})
    assert told == ["optimizer.lr=0.001", "optimizer.betas=[0.9, 0.99]", "objective.mask_ratio=0.6"]
    assert overrides_of("mae_cifar10", {"kwargs": {"depth": 2}}) == ['encoder.kwargs={"depth": 2}']
    told = overrides_of("mae_cifar10", {"compile": True, "weights": None})
    assert told == ["train.compile=true", "encoder.weights=null"]


def test_a_short_name_of_several_keys_is_refused_with_all_of_them():
    with pytest.raises(UserError, match=r"momentum may be objective\.momentum or optimizer\.momentum; write the one"):
        overrides_of("ijepa_cifar10", {"momentum": 0.9})
    with pytest.raises(UserError, match="seed cannot be a object"):
        overrides_of("mae_cifar10", {"seed": object()})


def test_options_are_those_of_the_command():
    told = option_words({"features": ["cls", "mean"], "num_workers": 0, "balanced": True, "bank": None, "check": False})
    assert told == ["--features", "cls", "mean", "--num-workers", "0", "--balanced"]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: prelude.pretrain("mae_cifar10", epoch=5), "epoch does not exist; did you mean train.epochs?"),
        (lambda: prelude.pretrain("mea_cifar10"), "No config at mea_cifar10; did you mean mae_cifar10?"),
        (lambda: prelude.open_run("nowhere"), "nowhere holds no run; write the folder"),
    ],
)
def test_a_mistake_is_a_run_error_before_any_process_is_started(call, sentence, monkeypatch):
    monkeypatch.setattr(notebook, "run_door", None)
    with pytest.raises(prelude.RunError) as refused:
        call()
    assert sentence in str(refused.value) and refused.value.__cause__ is None


def test_a_run_that_somebody_else_ended_is_no_interrupt_of_ours(monkeypatch):
    def ended(*_, **__):
        raise Preempted(through_us=False)

    monkeypatch.setattr(notebook, "run_door", ended)
    with pytest.raises(prelude.RunError, match="asked to end by somebody else"):
        prelude.pretrain("mae_cifar10")


def test_steps_are_one_line_that_moves_and_all_else_stays():
    shown = io.StringIO()
    line = ProgressLine(shown, live=True)
    for text in (
        "begins",
        "step 1/4  loss 2",
        "step 2/4  loss 1.5",
        "step 2  k-NN 40",
        "step 4/4  loss 1",
        "error: no",
    ):
        line(text)
    line.end()
    told = shown.getvalue()
    assert (
        told.startswith("begins\n")
        and told.split("\r")[-2].endswith("step 2/4  loss 1.5\nstep 2  k-NN 40\n")
        and "error" not in told
    )
    assert told.count("\r") == 3 and told.endswith("█ step 4/4  loss 1\n") and "█████░░" in told
    shown = io.StringIO()
    for text in ("step 1/4  loss 2", "step 2/4  loss 1"):
        ProgressLine(shown, live=False)(text)
    assert shown.getvalue() == "step 1/4  loss 2\nstep 2/4  loss 1\n"


class Kernel:
    """A real kernel, asked to run one cell after another."""

    def __init__(self, folder: Path):
        self.manager = KernelManager()
        env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        self.manager.start_kernel(env=env, cwd=str(folder))
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def run(self, code: str, meanwhile=lambda: None) -> tuple[str, list[str]]:
        """What the cell printed, and the lines of its error."""
        self.client.execute(code)
        printed, error, until = "", [], time.monotonic() + 240
        while time.monotonic() < until:
            meanwhile()
            try:
                message = self.client.get_iopub_msg(timeout=0.05)
            except queue.Empty:
                continue
            content = message["content"]
            if message["msg_type"] == "stream":
                printed += content["text"]
            elif message["msg_type"] == "error":
                error = content["traceback"]
            elif message["msg_type"] == "status" and content["execution_state"] == "idle":
                return printed, error
        raise AssertionError(f"the cell does not end: {printed[-2000:]}")

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


def test_a_kernel_is_interrupted_with_a_checkpoint_and_goes_on_at_two_ranks(recipe, tmp_path):
    kernel, run = Kernel(tmp_path), RunDir(tmp_path / "run")
    call = "run = prelude.pretrain(%r, run_dir='run', epochs=8, ranks=%d, **{'checkpoint.every_steps': 1000})"
    stopped = []

    def interrupt():
        if not stopped and len(run.metrics()) >= 3:
            stopped.append(True)
            kernel.manager.interrupt_kernel()

    try:
        assert kernel.run("import prelude, sys") == ("", [])
        printed, error = kernel.run(call % (str(recipe), 1), meanwhile=interrupt)
        assert error == ["Interrupted: pretrain was asked to end, and has; the same call goes on from there."]
        assert "\r░" in printed
        (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
        assert 3 <= int(saved.name.removeprefix("step-")) < 100

        printed, error = kernel.run(call % (str(recipe), 2))
        assert error == [] and f"resumed at step {int(saved.name.removeprefix('step-'))} of 100" in printed
        assert kernel.run("print(run.metrics()[-1]['step'], 'torch' in sys.modules)") == ("100 False\n", [])
        printed, error = kernel.run("run.knn(train='nowhere/*.tar', test='nowhere/*.tar')")
        assert len(error) == 1 and error[0].startswith("RunError: ") and "nowhere/*.tar" in error[0]
    finally:
        kernel.close()
