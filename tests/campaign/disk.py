"""Disks that do not take what is written: full, read-only, or with something else in a file's place."""

import os
import random
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path

from damage import snapshot
from runs_of_campaign import NUM_STEPS, Bench, require


def fault(bench: Bench, draw: random.Random, name: str, number: int, counts: Counter) -> None:
    """Number tells the kind, so that a campaign meets all."""
    kinds = (small_files, full_disk, full_from_the_start, read_only, in_the_way, unreadable, logs_that_cannot_be)
    kinds = kinds[:2] if bench.ranks > 1 else kinds  # the others are met by rank 0 alone
    kind = kinds[number % len(kinds)]
    counts[kind(bench, draw, bench.folder / name)] += 1


def small_files(bench: Bench, draw: random.Random, run: Path) -> str:
    """No file may be longer than some bytes, as under `ulimit -f`; of several ranks, of one's."""
    rank = draw.randrange(bench.ranks)
    mine = f"*-{rank:05d}-of-*.safetensors" if bench.ranks > 1 else "*.safetensors"
    largest = max(path.stat().st_size for path in (bench.folder / "unbroken").rglob(mine))
    started = bench.start(run, file_limit={rank: draw.randrange(512, largest)})
    started.wait()
    require(started.refused_in_words(2, 3), f"exit codes {started.codes}", started)
    bench.finishes(run, resumed_at=bench.newest(run))
    return "files that may not grow" + (f", of rank {rank}" if bench.ranks > 1 else "")


def full_disk(bench: Bench, draw: random.Random, run: Path) -> str:
    """Fills up under the run, and is emptied again."""
    size = draw.randrange(200, 1500) * 1024
    if not mount(run, size):
        return small_files(bench, draw, run)
    inside = run / "run"
    started, steps = bench.start(inside), draw.randint(1, 18)
    while started.poll() is None and bench.logged(inside) < steps:
        time.sleep(0.001)
    _fill(run / "filler")
    started.wait()
    saved = bench.newest(inside)
    if started.code != 0:
        require(started.refused_in_words(2, 3), f"exit code {started.code}", started)
        require("free" in started.told or "room" in started.told, "it does not say to make room", started)
    (run / "filler").unlink()
    roomy = run.parent / f"{run.name}-roomy"
    shutil.rmtree(roomy, ignore_errors=True)
    shutil.copytree(inside, roomy)
    bench.finishes(roomy, resumed_at=saved)
    shutil.rmtree(roomy)
    return "a disk that fills up"


def full_from_the_start(bench: Bench, draw: random.Random, run: Path) -> str:
    if not mount(run, 64 * 1024):
        return small_files(bench, draw, run)
    existing = draw.random() < 0.5
    if existing:
        (run / "run" / "checkpoints").mkdir(parents=True)
        (run / "run" / "config.yaml").touch()
    _fill(run / "filler")
    started = bench.start(run / "run")
    started.wait()
    require(started.refused_in_words(2, 3), f"exit code {started.code}", started)
    require("free" in started.told or "room" in started.told, "it does not say to make room", started)
    return f"a disk that is full at the start of {'a run that is there' if existing else 'a new run'}"


def read_only(bench: Bench, draw: random.Random, run: Path) -> str:
    shutil.copytree(bench.crashed(), run)
    for path in (run, *run.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = snapshot(run)
    started = bench.start(run, without_rights=True)
    started.wait()
    require(started.refused_in_words(2, 3), f"exit code {started.code}", started)
    require(snapshot(run) == before, "a refused start changed the run folder", started)
    for path in (run, *run.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    bench.finishes(run, resumed_at=bench.newest(run))
    return "a folder that is read-only"


def unreadable(bench: Bench, draw: random.Random, run: Path) -> str:
    """Checkpoints that this user may not read: never a fresh start."""
    shutil.copytree(bench.crashed(), run)
    for path in (run, *run.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    closed = draw.choice(
        [["checkpoints"], sorted(f"checkpoints/{p.name}" for p in (run / "checkpoints").glob("step-*"))]
    )
    for name in closed:
        (run / name).chmod(0)
    before = snapshot(run)
    started = bench.start(run, without_rights=True)
    started.wait()
    require(started.refused_in_words(2), f"exit code {started.code}", started)
    require(snapshot(run) == before, "a refused start changed the run folder", started)
    for name in closed:
        (run / name).chmod(0o755)
    bench.finishes(run, resumed_at=bench.newest(run))
    return "checkpoints that may not be read"


def in_the_way(bench: Bench, draw: random.Random, run: Path) -> str:
    """Something else where a folder of the run belongs."""
    what = draw.choice(("run folder", "checkpoints", "link to nowhere"))
    if what == "run folder":
        run.write_text("a file")
    elif what == "checkpoints":
        run.mkdir()
        (run / "checkpoints").write_text("a file")
    else:
        run.mkdir()
        (run / "checkpoints").symlink_to(run / "nowhere")
    started = bench.start(run)
    started.wait()
    require(started.refused_in_words(2, 3), f"exit code {started.code}", started)
    if run.is_file():
        run.unlink()
    return f"in the way: {what}"


def logs_that_cannot_be(bench: Bench, draw: random.Random, run: Path) -> str:
    """Folders where logs belong: told, and no reason to end the run."""
    names = draw.sample(["metrics.jsonl", "config.yaml", "environment.json", "deepspeed.log"], draw.randint(1, 3))
    for name in names:
        (run / name).mkdir(parents=True)
    started = bench.start(run)
    require(started.wait() == 0, f"exit code {started.code}", started)
    require("Traceback" not in started.told, "a traceback", started)
    require(bench.newest(run) == NUM_STEPS, "it is not finished", started)
    return "logs that cannot be written"


def mount(place: Path, size: int) -> bool:
    """A small file system of its own, where that is permitted."""
    place.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    return shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0


def unmount(place: Path) -> None:
    if place.is_dir() and os.path.ismount(place):
        subprocess.run(["umount", "--lazy", str(place)], capture_output=True)


def _fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        try:
            while file.write(bytes(1024)):
                pass
        except OSError:
            pass
