"""One start of a training run through a real launcher, to be waited for, signalled and looked into."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
_HELPERS = ROOT / "tests" / "helpers"
LAUNCHED = {  # of a process that a test starts
    "OMP_NUM_THREADS": "1",
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", _HELPERS, _HELPERS / "without_trackers"))),
}


class RunDir:
    """What a run has left in its folder so far."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir

    def metrics(self) -> list[dict]:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def weights(self, step: int) -> dict:
        from prelude.checkpoints.saved import open_tensors

        return dict(open_tensors(self.run_dir / "checkpoints" / f"step-{step:08d}"))

    def records(self) -> dict[int, dict]:
        """What was drawn for each position, over all ranks and all starts; a position drawn twice must agree."""
        found = {}
        for path in self.run_dir.glob("rank*.jsonl"):
            for line in path.read_text().splitlines():
                record = json.loads(line)
                assert found.setdefault(record["position"], record) == record
        return found


class Run(RunDir):
    """One start of a door, with its own arguments (`launch/pretrain.py` unless told otherwise), in a process group of
    its own."""

    def __init__(
        self,
        launcher: list[str],
        recipe: Path,
        run_dir: Path,
        *overrides: str,
        cwd: Path = ROOT,
        door: tuple[str, ...] = ("pretrain.py",),
    ):
        super().__init__(run_dir)
        script = [str(ROOT / "launch" / door[0]), *door[1:]]
        command = [*launcher, *script, "--config", str(recipe), f"run_dir={run_dir}", *overrides]
        run_dir.mkdir(parents=True, exist_ok=True)
        self.output = run_dir.parent / f"{run_dir.name}.out"
        with open(self.output, "a") as output:
            self.process = subprocess.Popen(
                command, env=os.environ | LAUNCHED | {"RECORD_TO": str(run_dir)}, cwd=cwd, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip

    def wait(self) -> int:
        """The exit code of the command, once every process that it started is gone: after a signal to the group
        the launcher ends first, while its ranks still save. None may say what failed while Python took it down."""
        code = self.process.wait(timeout=240)
        assert "Exception ignored" not in self.output.read_text(errors="replace")
        until = time.monotonic() + 240
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < until:
                os.killpg(self.process.pid, 0)
                time.sleep(0.05)
        return code

    def at_step(self, step: int) -> "Run":
        """Waits until this many steps are logged and the run still goes on."""
        until = time.monotonic() + 240
        while len(self.metrics()) < step:
            assert self.process.poll() is None and time.monotonic() < until, self.output.read_text()[-3000:]
            time.sleep(0.005)
        return self

    def until_said(self, text: str, times: int = 1) -> "Run":
        """Waits until the run has printed `text`, so many times."""
        until = time.monotonic() + 240
        while self.output.read_text().count(text) < times:
            assert self.process.poll() is None and time.monotonic() < until, self.output.read_text()[-3000:]
            time.sleep(0.05)
        return self

    def signal_group(self, number: signal.Signals) -> "Run":
        os.killpg(self.process.pid, number)
        return self


def deepspeed(num_ranks: int) -> list[str]:
    """The real launcher, on a port of its own so that two can run on one host."""
    return [str(BIN / "deepspeed"), "--num_gpus", str(num_ranks), "--master_port", str(free_port())]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
