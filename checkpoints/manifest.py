"""A checkpoint's manifest: what vouches for its files, and what keeps a folder from being a complete checkpoint.

A checkpoint has three contents: the model's tensors, the optimizer's, and a state in JSON. Each is one file; or tensors
lie in one file a rank, and `pieces.json` says which elements of which tensor are where.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import xxhash

from prelude.data.counting import counted, shortened
from prelude.pretrain.files import reason

FORMAT = 2  # 1 has other checksums, which a version of before would take for damage
FORMAT_OF_PARTS = 3
_READABLE = (1, FORMAT, FORMAT_OF_PARTS)
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
PIECES = "pieces.json"
FILES = (MODEL, OPTIMIZER, STATE)  # of a checkpoint without parts, and by which its contents are called

# Against accidents, not against forgers: the fastest there is. Checkpoints of before have the other.
_CHECKSUMS = {"xxh3_128": xxhash.xxh3_128, "blake2b": hashlib.blake2b}


@dataclass(frozen=True)
class Fault:
    """What keeps a folder from being a complete checkpoint."""

    why: str
    lost: bool  # whether it was read, and is not what was written. Else it may be whole for another reader


@dataclass(frozen=True)
class Listed:
    """What a manifest says of a file."""

    size: int  # in bytes
    kind: str  # of its checksum
    digest: str


def part_name(content: str, rank: int, ranks: int) -> str:
    """content: MODEL or OPTIMIZER."""
    return content.replace(".", f"-{rank:05d}-of-{ranks:05d}.", 1)


def ranks_of(manifest: dict) -> int:
    """How many ranks wrote parts; 0 for a checkpoint without parts. Raises KeyError, ValueError or TypeError."""
    if manifest["format"] != FORMAT_OF_PARTS:
        return 0
    if (ranks := int(manifest["ranks"])) < 1:
        raise ValueError(f"parts of {counted(ranks, 'rank')}")
    return ranks


def files_of(contents: tuple[str, ...], ranks: int) -> list[str]:
    """The files that hold these contents, of as many ranks as `ranks_of` says."""
    if not ranks:
        return list(contents)
    tensors = [content for content in contents if content != STATE]
    names = [part_name(content, rank, ranks) for content in tensors for rank in range(ranks)]
    return names + [PIECES] * bool(tensors) + [STATE] * (STATE in contents)


def read_manifest(path: str | Path) -> dict:
    """Raises OSError or ValueError."""
    return json.loads((Path(path) / MANIFEST).read_bytes())


def fault_of(path: str | Path, contents: tuple[str, ...] = FILES, *, checksums: bool = True) -> Fault | None:
    """None for a complete checkpoint. Opens the files of `contents`, and checks their sizes and, if asked to, their
    checksums; every file that is wrong is named."""
    listed = listed_files(path, contents)
    return listed if isinstance(listed, Fault) else joined(faults_of(path, listed, checksums=checksums))


def listed_files(path: str | Path, contents: tuple[str, ...] = FILES) -> dict[str, Listed] | Fault:
    """What the manifest says of each file of `contents`, or why it does not say it."""
    path = Path(path)
    try:
        manifest = read_manifest(path)
        if (found := manifest.get("format", "unknown")) not in _READABLE:
            return Fault(f"it is of format {found}, and this version reads formats up to {_READABLE[-1]}", lost=False)
        entries, ranks = manifest["files"], ranks_of(manifest)
        listed = {name: _listed(entries[name]) for name in files_of(FILES, ranks)}
    except OSError as error:
        if not path.is_dir():
            return Fault("there is no such folder", lost=False)
        return Fault(f"{MANIFEST} cannot be read ({reason(error)})", lost=False)
    except (ValueError, KeyError, TypeError, AttributeError):
        return Fault(f"{MANIFEST} is damaged", lost=True)
    return {name: listed[name] for name in files_of(contents, ranks)}


def faults_of(path: str | Path, listed: dict[str, Listed], *, checksums: bool = True) -> list[Fault]:
    """Of these files of a checkpoint, at most one each."""
    return [fault for name, file in listed.items() if (fault := _fault_of(Path(path, name), file, checksums))]


def joined(faults: list[Fault]) -> Fault | None:
    """Several as one; None for none."""
    if not faults:
        return None
    return Fault(shortened([fault.why for fault in faults], between="; "), all(fault.lost for fault in faults))


def _fault_of(path: Path, listed: Listed, checksums: bool) -> Fault | None:
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != listed.size:
                return Fault(f"{path.name} has {found} bytes instead of {listed.size}", lost=True)
            if checksums and _digest(file, listed.kind) != listed.digest:
                return Fault(f"{path.name} does not match its checksum", lost=True)
    except OSError as error:
        return Fault(f"{path.name} cannot be read ({reason(error)})", lost=isinstance(error, FileNotFoundError))
    return None


def problem(path: str | Path, contents: tuple[str, ...] = FILES) -> str | None:
    """What keeps `path` from being a complete checkpoint, in words, or None."""
    fault = fault_of(path, contents)
    return fault and fault.why


def obvious_fault(path: Path) -> Fault | None:
    """The cheap part of `fault_of`."""
    return fault_of(path, checksums=False)


def _digest(file, kind: str) -> str:
    return hashlib.file_digest(file, _CHECKSUMS[kind]).hexdigest()


def _listed(entry: dict) -> Listed:
    """Raises KeyError where there is no checksum that is known."""
    kind = next((kind for kind in _CHECKSUMS if kind in entry), "xxh3_128")
    return Listed(entry["bytes"], kind, entry[kind])
