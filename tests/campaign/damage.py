"""Damaged checkpoints: the newest that is whole is gone on from, and where none is the start is refused and nothing is
touched."""

import random
import shutil
from collections import Counter
from pathlib import Path

from runs_of_campaign import Bench, require

WAYS = ("cut", "emptied", "zeroed", "a byte changed", "missing", "a folder", "garbage", "of another run")


def case(bench: Bench, draw: random.Random, name: str, number: int, counts: Counter) -> None:
    """Number tells which file and how, so that a campaign meets all; the draw tells where, and how many checkpoints."""
    run = bench.folder / name
    shutil.copytree(bench.crashed(), run)
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    files = sorted(path.name for path in checkpoints[0].iterdir())
    file, way = files[number % len(files)], WAYS[number // len(files) % len(WAYS)]
    all_of_them = draw.random() < 0.4
    spoilt = checkpoints if all_of_them else checkpoints[-1:]
    for checkpoint in spoilt:
        spoil(checkpoint / file, way, draw, bench.folder / "unbroken" / "checkpoints" / "step-00000024" / file)
    if draw.random() < 0.3:
        spoil(run / "checkpoints" / "latest", draw.choice(WAYS[:5]), draw)
    counts[f"{file} {way}, in {'every checkpoint' if all_of_them else 'the newest checkpoint'}"] += 1
    if not all_of_them:
        started = bench.finishes(run, resumed_at=int(checkpoints[-2].name.partition("-")[2]))
        require(f"{checkpoints[-1]} is passed over" in started.told, "what is passed over is not told", started)
        return
    before = snapshot(run)
    started = bench.start(run)
    started.wait()
    require(started.refused_in_words(2), f"exit code {started.code}", started)
    require(all(checkpoint.name in started.told for checkpoint in checkpoints), "not each is named", started)
    require(snapshot(run) == before, "a refused start changed the run folder", started)


def spoil(path: Path, way: str, draw: random.Random, other: Path | None = None) -> None:
    """other: what has its name in another run."""
    content = bytearray(path.read_bytes())
    path.unlink()
    match way:
        case "cut":
            path.write_bytes(content[: draw.randrange(len(content))])
        case "emptied":
            path.write_bytes(b"")
        case "zeroed":
            path.write_bytes(bytes(len(content)))
        case "a byte changed":
            content[draw.randrange(len(content))] ^= 0xFF
            path.write_bytes(content)
        case "a folder":
            path.mkdir()
        case "garbage":
            path.write_bytes(draw.randbytes(len(content)))
        case "of another run":
            shutil.copy(other, path)


def snapshot(folder: Path) -> dict[str, bytes]:
    """What the files hold, but for the lock, which a start takes and gives back."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
