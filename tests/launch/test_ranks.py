"""A rank that stalls, dies, never comes or differs is named by the others, and no run waits for it for long.

Ranks are started as srun does, each by itself: no launcher notices what becomes of them.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from runs import BIN, LAUNCHED, ROOT, Run, deepspeed

LONG = "train.epochs=1000"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Ranks:
    """One process for each entry of `settings`, which are added to the recipe's; None: that rank never comes."""

    def __init__(self, recipe: Path, run_dir: Path, *settings: list[str] | None, port: int = 0, **env: str):
        self.run_dir, self.processes, port = run_dir, [], port or free_port()
        for rank, own in enumerate(settings):
            if own is None:
                continue
            place = {"SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_NTASKS": str(len(settings))}
            place |= {"SLURM_LOCALID": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            command = [sys.executable, ROOT / "launch" / "pretrain.py", "--config", recipe, f"run_dir={run_dir}", LONG]
            with open(f"{run_dir}-{rank}.out", "w") as output:
                self.processes.append(
                    subprocess.Popen(
                        [*command, *own], stdout=output, stderr=output,
                        env=os.environ | LAUNCHED | place | env,
                    )
                )  # fmt: skip

    def num_logged(self) -> int:
        metrics = self.run_dir / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def at_step(self, step: int) -> "Ranks":
        while self.num_logged() < step:
            assert self.processes[0].poll() is None, self.output(0)
            time.sleep(0.02)
        return self

    def saved(self) -> "Ranks":
        """Once there is a checkpoint, which is written while the run goes on."""
        while not list((self.run_dir / "checkpoints").glob("step-*")):
            assert self.processes[0].poll() is None, self.output(0)
            time.sleep(0.02)
        return self

    def output(self, rank: int) -> str:
        return Path(f"{self.run_dir}-{rank}.out").read_text()

    def error(self, rank: int) -> str:
        """The one sentence."""
        output = self.output(rank)
        (sentence,) = [line for line in output.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in output, output
        return sentence

    def end(self) -> list[int]:
        try:
            return [process.wait(timeout=200) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()


SIGNALS = [(0, signal.SIGKILL), (1, signal.SIGKILL), (0, signal.SIGSTOP)]
TROUBLES = ["sleep", "raise"]


@pytest.fixture(scope="module")
def without_one(recipe, tmp_path_factory):
    """Two ranks of which one, after the seventh step, has got a signal, or trouble of its own: {which: ranks}. All are
    begun before the end of the first is waited for, which is a limit that passes."""
    folder, found = tmp_path_factory.mktemp("without_one"), {}
    limit = "train.rank_timeout_seconds=20"  # longer than two starts on a busy machine may lie apart
    try:
        for victim, number in SIGNALS:
            ranks = Ranks(recipe, folder / f"{number.name}-{victim}", [limit], [limit])
            found[victim, number] = ranks.at_step(7).saved()
            ranks.at_step(ranks.num_logged() + 2)  # by then the other rank knows of it
            ranks.processes[victim].send_signal(number)
        for trouble in TROUBLES:
            settings = [limit, "objective.name=troubled:TroubledMAE"]
            found[trouble] = Ranks(recipe, folder / trouble, settings, settings, TROUBLE=trouble).at_step(7)
        yield found
    finally:
        for process in (process for ranks in found.values() for process in ranks.processes):
            process.kill()


@pytest.mark.parametrize("victim, number", SIGNALS)
def test_a_rank_that_dies_or_freezes_is_named_with_its_host_and_the_last_checkpoint(victim, number, without_one):
    ranks = without_one[victim, number]
    assert ranks.processes[1 - victim].wait(timeout=200) == 3, ranks.output(1 - victim)
    sentence = ranks.error(1 - victim)
    assert f"Rank {victim} on {socket.gethostname()}" in sentence
    assert f"{ranks.run_dir / 'checkpoints'}/step-000000" in sentence


@pytest.mark.parametrize("trouble, named", [("sleep", "in the forward pass of step 8 (in forward, troubled.py"),
                                            ("raise", "exit code 1 (KeyError: 'a fault of ours')")])  # fmt: skip
def test_a_rank_that_hangs_or_fails_alone_ends_the_run_with_what_it_was_doing(trouble, named, without_one):
    ranks = without_one[trouble]
    assert ranks.end() == [3, 3 if trouble == "sleep" else 1]
    assert "Rank 1" in ranks.error(0) and named in ranks.error(0)
    assert trouble == "raise" or "warning: 1 of 2 ranks wait: Rank 1" in ranks.output(0)


def test_a_rank_with_other_data_and_settings_is_refused_by_all(recipe, tmp_path):
    shards = recipe.parent / "shapes" / "train-000000.tar"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train-000001.tar").symlink_to(shards)
    ranks = Ranks(recipe, tmp_path / "run", [], [f"data.shards={tmp_path}/other/*.tar", "optimizer.lr=0.02"])
    assert ranks.end() == [2, 2]
    for rank in (0, 1):
        sentence = ranks.error(rank)
        assert f"Rank 1 on {socket.gethostname()} differs" in sentence
        assert "data.fingerprint" in sentence and "config.optimizer.lr is 0.02 there, 0.01 on rank 0" in sentence
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_port_in_use_is_one_sentence_under_a_launcher_and_without(recipe, tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        ranks = Ranks(recipe, tmp_path / "srun", [], None, port=port)
        launcher = [*deepspeed(2)[:-1], str(port)]
        run = Run(launcher, recipe, tmp_path / "deepspeed")
        assert ranks.end() == [2] and run.wait() == 2
        for output in (ranks.output(0), run.output.read_text()):
            assert f"error: Port {port} is taken" in output and f"--master_port {port + 1}" in output
            assert "Traceback" not in output


@pytest.mark.parametrize("killed", ["the launcher", "the deepspeed command"])
def test_ranks_whose_launcher_is_killed_save_and_leave(killed, recipe, tmp_path):
    run = Run(deepspeed(2), recipe, tmp_path / "run", LONG, "checkpoint.every_steps=100000").at_step(3)
    (launch,) = psutil.Process(run.process.pid).children()
    (launch if killed == "the launcher" else run.process).kill()
    run.wait()  # until the whole process group is gone
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert int(checkpoint.name.removeprefix("step-")) >= len(run.metrics()) - 1
    assert f"{killed} is gone" in run.output.read_text()


def test_ctrl_c_once_saves_and_leaves_with_75(recipe, tmp_path):
    run = Run([sys.executable], recipe, tmp_path / "run", LONG, "checkpoint.every_steps=100000").at_step(3)
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == 75, run.output.read_text()[-2000:]
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1


@pytest.mark.parametrize("start", [["launch/pretrain.py"], ["launch/knn.py"], ["-m", "prelude.launch.export"],
                                   [str(BIN / "prelude"), "pretrain"]])  # fmt: skip
def test_a_signal_in_the_first_second_of_any_door_is_75(start, recipe):
    path = Path("/proc/self/status")
    if not path.exists():
        pytest.skip("what a process handles is read from /proc")
    env = os.environ | LAUNCHED
    process = subprocess.Popen(
        [sys.executable, *start, "--config", str(recipe)], cwd=ROOT, env=env, stdout=-1, stderr=-1, text=True
    )
    while not handles(process.pid, signal.SIGUSR1):
        assert process.poll() is None
    assert "torch" not in Path(f"/proc/{process.pid}/maps").read_text()
    process.send_signal(signal.SIGUSR1)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and "Traceback" not in output + errors


def handles(pid: int, number: signal.Signals) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (caught,) = [int(line.split()[1], 16) for line in lines if line.startswith("SigCgt")]
    return bool(caught >> (number - 1) & 1)
