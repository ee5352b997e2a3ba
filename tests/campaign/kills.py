"""Kills, disk faults and damaged checkpoints, drawn at random: every run must end at bitwise the same weights as one
that nobody disturbed, or be refused in a sentence.

    python tests/campaign/kills.py --kills 100 --faults 40 --damaged 60 --seed 0

Each start is a real `prelude pretrain` of a small encoder on the embedded shapes, one process on the CPU. Runs that are
killed take turns with the objectives (--objectives), faults and damage meet the first of them. What is drawn depends on
--seed alone; where a signal meets the run depends on the machine too. With --folder, cases that were right
before are not repeated, so that a campaign can be cut short and taken up again. Exit code 1 where anything was wrong.
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
MOMENTS = ("at any time", "after a step", "in a save")
KILLS_OF_A_RUN = 5


def killed_run(bench: Bench, draw: random.Random, name: str, kills: int, counts: Counter) -> None:
    """One run that is ended `kills` times and then left alone."""
    run, best = bench.folder / name, 0
    for _ in range(kills):
        number, moment = draw.choice(SIGNALS), draw.choice(MOMENTS)
        started = bench.start(run, f"data.num_workers={draw.choice((0, 0, 0, 1))}")
        _wait_for(moment, draw, bench, run, started)
        over = started.poll() is not None
        started.send(number)
        code = started.wait()
        if over:
            require(code == 0, f"{moment}: ended by itself with {code}", started)
            counts["ended before the signal"] += 1
        else:
            codes = {signal.SIGKILL: (-9, 0), signal.SIGTERM: (75, 0), signal.SIGINT: (75, 130, 0)}[number]
            require(code in codes, f"{signal.Signals(number).name} {moment}: exit code {code}", started)
            require("Traceback" not in started.told, "a traceback", started)
            counts[f"{signal.Signals(number).name} {moment}"] += 1
        saved = bench.newest(run)
        require(saved >= best, f"step {best} was saved, and after {moment} step {saved} is the newest", started)
        best = saved
        if best == NUM_STEPS:
            break
    bench.finishes(run, resumed_at=best)


def _wait_for(moment: str, draw: random.Random, bench: Bench, run: Path, started) -> None:
    """Returns at the moment, or once the start is over."""
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
    """Cases by name, and what became of them."""

    def __init__(self, folder: Path, objectives: Sequence[str], seed: int):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)  # some starts are made without the rights of root
        self.folder, self.objectives, self.benches = folder, objectives, {}
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
            self.benches[objective] = Bench(self.folder / objective, objective)
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
    parser.add_argument("--folder", type=Path, help="where runs and the record lie (default: a temporary one)")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="prelude-campaign-"))
    started = time.monotonic()
    campaign = Campaign(folder.resolve(), args.objectives, args.seed)
    campaign.run(args.kills, args.faults, args.damaged)
    for what, count in sorted(campaign.counts.items()):
        print(f"{count:5}  {what}")
    print(f"{len(campaign.right)} cases right, {len(campaign.wrong)} wrong, {time.monotonic() - started:.0f} s")
    if not args.folder and not campaign.wrong:
        shutil.rmtree(folder)
    elif campaign.wrong:
        print(f"what the wrong ones left is in {folder}")
    return 1 if campaign.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
