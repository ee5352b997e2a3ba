"""What a file of features may be called, and whether it may be written. Needs no torch, so that a door asks first."""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from prelude.data.errors import UserError

SUFFIXES = (".parquet", ".npz", ".npy", ".safetensors")
DTYPES = ("float32", "float16")
KEY, SHARD, SAMPLE_ID, LABEL = "key", "shard", "sample_id", "label"  # columns beside the features
LEFT_OUT_ENDING = ".left_out.jsonl"  # of what has no features, beside a file of any format
KEYS_ENDING, ABOUT_ENDING = ".keys.csv", ".about.json"  # beside a `.npy`, which has no room for them


def format_of(path: str | Path) -> str:
    """The suffix. Raises UserError for one that is none of `SUFFIXES`, and for Parquet without pyarrow."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path} has no ending of a file of features; write one of {', '.join(SUFFIXES)}.")
    if suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{path} needs pyarrow; pip install 'prelude-ssl[parquet]', or write a .npz or .safetensors.")
    return suffix


def refuse_anothers_files(path: str | Path, option: str) -> None:
    """Raises UserError where something is in the place of what is written `beside` the file, unless an earlier file of
    this name has left it: a folder, the list of another file of its stem, or one of other kind, such as that of packed
    shards."""
    alone = {KEYS_ENDING: _holds_keys, ABOUT_ENDING: _tells_of_features} if format_of(path) == ".npy" else {}
    for ending, is_ours in {LEFT_OUT_ENDING: _lists_what_is_left_out, **alone}.items():
        if os.path.lexists(there := beside(path, ending)):
            owner = "" if ending in alone else _owner(Path(path))
            if owner or not _is(is_ours, there):
                raise UserError(f"{there} {owner or 'is there already'} and would be replaced; write another {option}.")


def _owner(path: Path) -> str:
    """Whose a list is that files of all formats have, where there is another file of this stem."""
    others = [other for suffix in SUFFIXES if (other := path.with_suffix(suffix)) != path]
    return next((f"belongs to {other}" for other in others if other.exists()), "")


def _is(ours: Callable[[TextIO], bool], path: Path) -> bool:
    if not path.is_file():  # a pipe would wait for a writer
        return False
    try:
        with open(path, encoding="utf-8") as file:
            return ours(file)
    except (OSError, ValueError, AttributeError):
        return False


def _lists_what_is_left_out(file: TextIO) -> bool:
    return {"shard", "key", "reason"} == json.loads(file.readline()).keys()


def _holds_keys(file: TextIO) -> bool:
    return file.readline().strip().split(",")[:3] == [KEY, SHARD, SAMPLE_ID]


def _tells_of_features(file: TextIO) -> bool:
    return {"encoder", "kinds", "features"} <= json.load(file).keys()


def beside(path: str | Path, ending: str) -> Path:
    """`features.npy` to `features.keys.csv`."""
    return Path(path).with_name(f"{Path(path).stem}{ending}")
