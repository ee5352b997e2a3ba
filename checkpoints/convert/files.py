"""What lies in a file of weights, read without running anything that it brings along.

- safetensors, and pickles with torch's `weights_only`; beyond tensors and plain values only `argparse.Namespace`, a
  bag of settings that official training files add, is let in.
- A folder of `transformers` (config.json with `model_type`) is read with what its config says.
"""

import argparse
import json
import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from prelude.data.errors import UserError, in_one_line

CONFIG = "config.json"
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")


def read_file(path: Path) -> dict:
    """The names and tensors of a file, in the nesting that it was saved with. Raises UserError."""
    try:
        if _is_safetensors(path):  # whatever it is called
            return load_file(path)
        _refuse_damage(path)
        # Opened here, since torch takes a path by its name for safetensors.
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
            tree = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is no plain file of weights ({_reason(error)}), and a pickle can run code; where you trust it, "
            "load it yourself and save its tensors with safetensors.torch.save_file."
        ) from None
    except UserError:
        raise
    except (OSError, RuntimeError, EOFError, SafetensorError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({_reason(error)}); fetch or save it again.") from None
    except Exception:  # torch takes any bytes for a pickle, whose machine then fails in any way
        raise UserError(f"{path} is no file of weights; write one that is, or a folder of a run.") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds a {type(tree).__name__} and no weights by name; write a file that does.")
    return tree


def _is_safetensors(path: Path) -> bool:
    """Eight bytes that say how long its header is, and the header."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _refuse_damage(path: Path) -> None:
    """Compares the checksums of an archive, which torch does not read. Raises UserError."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise UserError(f"{path} is damaged: {damaged} does not match its checksum; fetch or save it again.")


def read_folder(folder: Path) -> dict:
    """The tensors of a `transformers` folder, of all its shards. Raises UserError."""
    for name in _INDEXES:
        if (folder / name).is_file():
            index = read_json(folder / name)
            if not isinstance(index.get("weight_map"), dict):
                raise UserError(f"{folder / name} does not say what lies where; fetch it again.")
            shards = sorted(set(index["weight_map"].values()))
            tensors = {}
            for shard in shards:
                tensors |= read_file(folder / shard)
            return tensors
    for name in _SINGLE:
        if (folder / name).is_file():
            return read_file(folder / name)
    raise UserError(f"{folder} holds no weights; write a folder with one of {', '.join((*_SINGLE, *_INDEXES))}.")


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({_reason(error)}); fetch or save it again.") from None


def _reason(error: Exception) -> str:
    return in_one_line(error).split(". ")[0][:200]
