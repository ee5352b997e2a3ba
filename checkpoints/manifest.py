"""A checkpoint's manifest: what vouches for its files, and what keeps a folder from being a complete checkpoint."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import xxhash

from prelude.pretrain.files import reason

FORMAT = 2  # 1 has other checksums, which a version of before would take for damage
_READABLE = (1, 2)
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
FILES = (MODEL, OPTIMIZER, STATE)

# Against accidents, not against forgers: the fastest there is. Checkpoints of before have the other.
_CHECKSUMS = {"xxh3_128": xxhash.xxh3_128, "blake2b": hashlib.blake2b}


@dataclass(frozen=True)
class Fault:
    """What keeps a folder from being a complete checkpoint."""

    why: str
    lost: bool  # whether it was read, and is not what was written. Else it may be whole for another reader


def fault_of(path: str | Path, files: tuple[str, ...] = FILES, *, checksums: bool = True) -> Fault | None:
    """None for a complete checkpoint. Opens `files`, and checks their sizes and, if asked to, their checksums."""
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if (found := manifest.get("format", "unknown")) not in _READABLE:
            return Fault(f"it is of format {found}, and this version reads formats up to {FORMAT}", lost=False)
        listed = {name: (manifest["files"][name]["bytes"], *_checksum_in(manifest["files"][name])) for name in FILES}
    except OSError as error:
        if not path.is_dir():
            return Fault("there is no such folder", lost=False)
        return Fault(f"{MANIFEST} cannot be read ({reason(error)})", lost=False)
    except (ValueError, KeyError, TypeError, AttributeError):
        return Fault(f"{MANIFEST} is damaged", lost=True)
    try:
        for name in files:
            size, kind, digest = listed[name]
            with open(path / name, "rb") as file:
                found = os.fstat(file.fileno()).st_size
                if found != size:
                    return Fault(f"{name} has {found} bytes instead of {size}", lost=True)
                if checksums and _digest(file, kind) != digest:
                    return Fault(f"{name} does not match its checksum", lost=True)
    except FileNotFoundError as error:
        return Fault(f"{name} cannot be read ({reason(error)})", lost=True)
    except OSError as error:
        return Fault(f"{name} cannot be read ({reason(error)})", lost=False)
    return None


def problem(path: str | Path, files: tuple[str, ...] = FILES) -> str | None:
    """What keeps `path` from being a complete checkpoint, in words, or None."""
    fault = fault_of(path, files)
    return fault and fault.why


def obvious_fault(path: Path) -> Fault | None:
    """The cheap part of `fault_of`."""
    return fault_of(path, checksums=False)


def described(path: Path) -> dict:
    """What a manifest says of a file."""
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "xxh3_128": _digest(file, "xxh3_128")}


def _digest(file, kind: str) -> str:
    return hashlib.file_digest(file, _CHECKSUMS[kind]).hexdigest()


def _checksum_in(entry: dict) -> tuple[str, str]:
    """(kind, digest). Raises KeyError where there is none that is known."""
    kind = next((kind for kind in _CHECKSUMS if kind in entry), "xxh3_128")
    return kind, entry[kind]
