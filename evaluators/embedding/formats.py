"""What a file of features may be called, and whether it may be written. Needs no torch, so that a door asks first."""

import importlib.util
import json
import os
from pathlib import Path

from prelude.data.errors import UserError

SUFFIXES = (".parquet", ".npz", ".npy", ".safetensors")
DTYPES = ("float32", "float16")


def format_of(path: str | Path) -> str:
    """The suffix. Raises UserError for one that is none of `SUFFIXES`, and for Parquet without pyarrow."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path} has no ending of a file of features; write one of {', '.join(SUFFIXES)}.")
    if suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{path} needs pyarrow; pip install 'prelude-ssl[parquet]', or write a .npz or .safetensors.")
    return suffix


def refuse_anothers_list(path: str | Path, ending: str, option: str) -> None:
    """Raises UserError where the list `beside` the file to be written is that of another file of its stem, or none of
    images by shard and key, such as that of packed shards."""
    if not os.path.lexists(listed := beside(path, ending)):
        return
    others = [other for suffix in SUFFIXES if (other := Path(path).with_suffix(suffix)) != Path(path)]
    owner = next((f"belongs to {other}" for other in others if other.exists()), "")
    if owner or not _is_ours(listed):
        raise UserError(f"{listed} {owner or 'is there already'} and would be replaced; write another {option}.")


def _is_ours(listed: Path) -> bool:
    """Whether it was left by an earlier file of the same name."""
    try:
        with open(listed, encoding="utf-8") as file:
            return {"shard", "key", "reason"} == json.loads(file.readline()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def beside(path: str | Path, ending: str) -> Path:
    """`features.npy` to `features.keys.csv`."""
    return Path(path).with_name(f"{Path(path).stem}{ending}")
