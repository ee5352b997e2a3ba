"""Kills, disk faults and damaged checkpoints, drawn at random: every run must end at bitwise the same weights as one
that nobody disturbed, or be refused in a sentence.

    python tests/campaign/kills.py --kills 100 --faults 40 --damaged 60 --seed 0

Each start is a real `prelude pretrain` of a small encoder on the embedded shapes, on the CPU. Runs that are
killed take turns with the objectives (--objectives), faults and damage meet the first of them. What is drawn depends on
--seed alone; where a signal meets the run depends on the machine too. With --folder, cases that were right before are
not repeated, so that a campaign can be cut short and taken up again. Exit code 1 where anything was wrong.

With --ranks 2 (or both, --ranks 1 2, where two ranks have a third of the cases) each start has two ranks, which write
their parts of a checkpoint: one of them is killed, or both, or one finds its disk full.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import damage
import disk
from runs_of_campaign import NUM_STEPS, OBJECTIVES, Bench, Wrong, require

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
AT_A_FILE = "at a file operation"
MOMENTS = ("at any time", "after a step", "in a save", AT_A_FILE)
FILE_OPERATIONS = (240, 90)  # of rank 0, and of another, in a run: some more than there are
KILLS_OF_A_RUN = 5


def killed_run(bench: Bench, draw: random.Random, name: str, kills: int, counts: Counter) -> None:
    """One run that is ended `kills` times and then left alone."""
    run, best = bench.folder / name, 0
    for _ in range(kills):
        number, moment = draw.choice(SIGNALS), draw.choice(MOMENTS)
        met = draw.choice(([0], [1], [0, 1]) if bench.ranks > 1 else ([0],))
        killed_at = {}
        if moment == AT_A_FILE:
            number, killed_at = signal.SIGKILL, {rank: draw.randrange(FILE_OPERATIONS[rank]) for rank in met}
        started = bench.start(run, f"data.num_workers={draw.choice((0, 0, 0, 1))}", killed_at=killed_at)
        _wait_for(moment, draw, bench, run, started)
        over = started.poll() == 0
        if not killed_at:
            started.send(number, met)
        started.wait()
        if over:
            counts["ended before the signal"] += 1
        else:
            name = signal.Signals(number).name
            _ended_well(started, number, met, f"{name} {moment}")
            counts[f"{name} {moment}" + (f" to rank {' and '.join(map(str, met))}" if bench.ranks > 1 else "")] += 1
        saved = bench.newest(run)
        require(saved >= best, f"step {best} was saved, and after {moment} step {saved} is the newest", started)
        best = saved
        if best == NUM_STEPS:
            break
    bench.finishes(run, resumed_at=best)


def _ended_well(started, number: signal.Signals, met: list[int], what: str) -> None:
    """A rank that lives on when another is killed says so and leaves; a stop is all ranks'."""
    asked = {signal.SIGKILL: (-9, 0), signal.SIGTERM: (75, 0), signal.SIGINT: (75, 130, 0)}[number]
    others = (3, 0) if number == signal.SIGKILL else asked
    for rank, code in started.codes.items():
        allowed = asked + others if rank in met else others  # who is to be killed may hear of the other's death before
        require(code in allowed, f"{what}: exit code {code} of rank {rank}", started)
    require("Traceback" not in started.told, f"{what}: a traceback", started)


def _wait_for(moment: str, draw: random.Random, bench: Bench, run: Path, started) -> None:
    """Returns at the moment, or once the start is over."""
    if moment == AT_A_FILE:
        started.wait()
        return
    until = time.monotonic() + draw.uniform(0, bench.seconds)
    if moment == "at any time":
        while time.monotonic() < until and started.poll() is None:
            time.sleep(0.002)
        return
    steps = bench.logged(run) + draw.randint(1, 9)
    while started.poll() is None and bench.logged(run) < steps:
        time.sleep(0.001)
    if moment == "in a save":
        while started.poll() is None and not any(run.glob("checkpoints/.tmp-*")):
            time.sleep(0)
    time.sleep(draw.uniform(0, 0.01))


class Campaign:
    """Cases by name, and what became of them. ranks: of each start."""

    def __init__(self, folder: Path, objectives: Sequence[str], seed: int, ranks: int = 1):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)  # some starts are made without the rights of root
        self.folder, self.objectives, self.ranks, self.benches = folder, objectives, ranks, {}
        self.seed, self.counts, self.wrong = seed, Counter(), []
        self.record = folder / f"right-{seed}.jsonl"
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        self.right = {case["name"]: case["counts"] for case in map(json.loads, lines)}

    def case(
        self, name: str, act: Callable[[Bench, random.Random, str, int, Counter], None], number: int, turn: int = 0
    ) -> None:
        """turn: whose among the objectives it is."""
        objective = self.objectives[turn % len(self.objectives)]
        name = f"{objective}-{name}"
        if name not in self.right:
            bench, counts = self._bench(objective), Counter()
            shutil.rmtree(bench.folder / name, ignore_errors=True)
            try:
                act(bench, random.Random(f"{self.seed} {name}"), name, number, counts)
            except Wrong as error:
                self.wrong.append(f"{name}: {error}")
                print(f"WRONG {name}: {error}", flush=True)
                return
            finally:
                disk.unmount(bench.folder / name)
            shutil.rmtree(bench.folder / name, ignore_errors=True)
            self.right[name] = dict(counts)
            with self.record.open("a") as file:
                file.write(json.dumps({"name": name, "counts": counts}) + "\n")
        self.counts.update(self.right[name])

    def _bench(self, objective: str) -> Bench:
        if objective not in self.benches:
            self.benches[objective] = Bench(self.folder / objective, objective, self.ranks)
        return self.benches[objective]

    def run(self, kills: int, faults: int, damaged: int) -> None:
        for number in range(kills):  # a run may be over before it has had all of its kills
            left = kills - sum(count for what, count in self.counts.items() if what.startswith("SIG"))
            if left > 0:
                self.case(f"kills-{number}", killed_run, min(KILLS_OF_A_RUN, left), turn=number)
        for number in range(faults):
            self.case(f"fault-{number}", disk.fault, number)
        for number in range(damaged):
            self.case(f"damaged-{number}", damage.case, number)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    for name, default, what in (
        ("kills", 100, "signals that end a run"),
        ("faults", 40, "disks that are full, read-only or in the way"),
        ("damaged", 60, "checkpoints that were damaged"),
        ("seed", 0, "of all draws"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: {default})")
    parser.add_argument(
        "--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES), metavar="NAME",
        help="that runs take turns with (default: all that ship)",
    )  # fmt: skip
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], choices=(1, 2), help="of a start (default: 1)")
    parser.add_argument("--folder", type=Path, help="where runs and the record lie (default: a temporary one)")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="prelude-campaign-"))
    started = time.monotonic()
    right, wrong = 0, 0
    for ranks in args.ranks:
        campaign = Campaign(folder.resolve() / f"ranks-{ranks}", args.objectives, args.seed, ranks)
        share = 1 if ranks == 1 or len(args.ranks) == 1 else 3
        campaign.run(args.kills // share, args.faults // share, args.damaged // share)
        for what, count in sorted(campaign.counts.items()):
            print(f"{count:5}  {what}{f', {ranks} ranks' if ranks > 1 else ''}")
        right, wrong = right + len(campaign.right), wrong + len(campaign.wrong)
    print(f"{right} cases right, {wrong} wrong, {time.monotonic() - started:.0f} s")
    if not args.folder and not wrong:
        shutil.rmtree(folder)
    elif wrong:
        print(f"what the wrong ones left is in {folder}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
