"""What plain tools (tarfile, json) read from packed shards, and shards that they write."""

import io
import json
import tarfile
from pathlib import Path


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def grey(side: int) -> bytes:
    """A PPM file of so many pixels in each direction."""
    return f"P6 {side} {side} 255\n".encode() + bytes([128]) * (3 * side * side)


def read_tar(path: Path) -> dict[str, dict[str, bytes]]:
    """{key: {extension: content}} by Python's own tar reader, in order."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            assert extension not in samples.setdefault(key, {})
            samples[key][extension] = tar.extractfile(member).read()
    return samples


def read_shards(folder: Path, split: str = "train") -> list[dict]:
    """Every sample with its `key`, `source` (as NAME.samples.jsonl tells) and members."""
    found = []
    sources = {}
    for path in folder.glob("*.samples.jsonl"):
        sources |= {(line["shard"], line["key"]): line["source"] for line in map(json.loads, path.open())}
    for path in sorted(folder.glob(f"{split}-*.tar")):
        for key, members in read_tar(path).items():
            found.append({"key": key, "source": sources[path.name, key], "shard": path.name, **members})
    return found


def image_of(sample: dict) -> bytes:
    return next(content for name, content in sample.items() if name in ("png", "jpg", "tif", "ppm", "gif", "webp"))


def left_out(folder: Path, name: str = "train") -> dict[str, tuple[str, bool]]:
    lines = map(json.loads, (folder / f"{name}.left_out.jsonl").open())
    return {line["source"]: (line["reason"], line["lost"]) for line in lines}
