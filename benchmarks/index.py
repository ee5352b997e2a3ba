"""How the start and the memory of an index grow with the number of samples: made once, then opened by a new process.

The tars are holes of the right size, and what a walk over their headers would find is made up (images of 110 kB on
average, each with a label), so that a hundred million samples need no hundred million images: all that comes after the
walk is real. The walk itself is timed on a tar that is there.

python benchmarks/index.py --samples 1e5 1e6 1e7 1e8 --folder /tmp/index --json index.json
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # so that it runs as a script from anywhere

import numpy as np  # noqa: E402

from prelude.data import kept_index  # noqa: E402
from prelude.data.order import DEFAULT_SHUFFLE  # noqa: E402
from prelude.data.shards import ShardIndex  # noqa: E402
from prelude.data.source import EndlessSource  # noqa: E402
from prelude.data.tar_index import TarIndex, index_every_label  # noqa: E402

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--samples", type=float, nargs="+", default=[1e5, 1e6, 1e7, 1e8])
    parser.add_argument("--shards", type=int, default=10_000, help="at most; a shard has at least 10 samples")
    parser.add_argument("--folder", type=Path, help="for shards and index, some 16 bytes a sample (default: temporary)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--open", metavar="PATTERN", help=argparse.SUPPRESS)  # what the new processes do
    args = parser.parse_args()
    if args.open:
        print(json.dumps(opened(args.open)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        rate = walk_rate(folder / "walked")
        print(f"walking the headers of a tar: {rate:,.0f} samples a second and core")
        print(
            f"{'samples':>13} {'shards':>7} {'made, s':>8} {'label, s':>8} {'bytes/sample':>12} {'opened, s':>9} "
            f"{'own MiB':>8} {'after 10k':>9} {'to a worker, kB':>15}"
        )
        rows = []
        for samples in map(int, args.samples):
            rows.append({"walked_a_second": rate} | one(samples, args.shards, folder / str(samples)))
            row = rows[-1]
            print(
                f"{samples:>13,} {row['shards']:>7,} {row['made_s']:>8.2f} {row['label_s']:>8.2f} "
                f"{row['bytes_a_sample']:>12.2f} {row['opened_s']:>9.3f} {row['own_mib']:>8.1f} "
                f"{row['own_mib_after']:>9.1f} {row['sent_kb']:>15.0f}",
                flush=True,
            )
            if args.json:
                args.json.write_text(json.dumps(rows, indent=2))


def one(samples: int, most_shards: int, folder: Path) -> dict:
    num_shards = min(most_shards, samples // 10)
    counts = np.diff(samples * np.arange(num_shards + 1) // num_shards)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PRELUDE_CACHE"] = str(folder / "cache")
    for number in range(num_shards):
        with open(folder / f"{number:06}.tar", "wb") as file:
            file.truncate(int(counts[number]) * 2**18)  # no byte of it is on the disk

    def walk(path: str, image: str) -> dict[str, TarIndex]:
        return made_up(int(Path(path).stem), counts)

    kept_index.index_every_label = walk
    pattern = f"{folder}/{{000000..{num_shards - 1:06}}}.tar"
    began = time.perf_counter()
    index = ShardIndex(pattern)
    made = time.perf_counter() - began
    index.with_label("cls").label_fingerprint()
    labelled = time.perf_counter() - began - made
    on_disk = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file())
    found = subprocess.run(
        [sys.executable, __file__, "--open", pattern], check=True, capture_output=True, text=True, env=os.environ
    )
    return {
        "samples": samples,
        "shards": num_shards,
        "made_s": made,
        "label_s": labelled,
        "bytes_a_sample": on_disk / samples,
        **json.loads(found.stdout),
    }


def made_up(number: int, counts: np.ndarray) -> dict[str, TarIndex]:
    rng = np.random.default_rng(number)
    sizes = rng.integers(20_000, 200_000, counts[number])
    ends = np.cumsum(-(-sizes // 512) * 512 + 1536)
    images = np.stack([ends - (-(-sizes // 512) * 512 + 1024), sizes], 1)
    labels = np.stack([ends - 512, rng.integers(1, 4, len(sizes))], 1)
    content = f"{number:032}"
    return {
        "": TarIndex(images, np.empty((0, 2), np.int64), (), True, content, ""),
        "cls": TarIndex(images, labels, (), True, content, content),
    }


def opened(pattern: str) -> dict:
    """In a process that has just begun: seconds, and what it has for itself before and after the places of ten thousand
    samples, in an order over all."""
    import pickle

    before = own_mebibytes()
    began = time.perf_counter()
    index = ShardIndex(pattern, "cls")
    seconds = time.perf_counter() - began
    at_once = own_mebibytes() - before
    source = EndlessSource(index, DEFAULT_SHUFFLE, seed=0, start=0, micro_batch=64, rank=0, world_size=1)
    sent = len(pickle.dumps([index, source])) / 1000
    for begin in range(0, 10_000, 64):
        sample_ids = source.order.samples_at(begin + np.arange(64))
        index.images[sample_ids], index.labels[sample_ids]
    return {"opened_s": seconds, "own_mib": at_once, "own_mib_after": own_mebibytes() - before, "sent_kb": sent}


def own_mebibytes() -> float:
    """That no other process shares, and no file can be read for again."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024


def walk_rate(folder: Path, samples: int = 20_000) -> float:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(samples):
            for extension in ("jpg", "cls"):
                info = tarfile.TarInfo(f"{number:08}.{extension}")
                info.size = 1 if extension == "cls" else 9000
                tar.addfile(info, Zeros())
    began = time.perf_counter()
    index_every_label(str(folder / "0.tar"))
    return samples / (time.perf_counter() - began)


class Zeros:
    def read(self, size: int) -> bytes:
        return bytes(size)


if __name__ == "__main__":
    main()
