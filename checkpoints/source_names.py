"""How sources are spelled, and which path and words a spelling names. Needs no torch, so that doors ask first."""

import os
from pathlib import Path

RANDOM = "random:"  # before a source: the same architecture, with weights drawn from a seed
START = "start:"  # before a run, or what was kept of it: its encoder before the first step, from `encoder.weights`
TIMM, HUB, FOLDER = "timm:", "hf-hub:", "local-dir:"  # before what timm itself fetches or opens


def has_folder(source: str) -> bool:
    """Whether a source is a path on this machine, rather than a name of timm's or of the Hugging Face hub's."""
    return not bare(source).startswith((TIMM, HUB))


def bare(source: str) -> str:
    """Without the words before it."""
    return source.removeprefix(RANDOM).removeprefix(START)


def expanded(source: str) -> str:
    """With its `~` as the home folder, behind `random:` and its like too."""
    place = bare(source).removeprefix(FOLDER)
    return source.removesuffix(place) + os.path.expanduser(place)


def split(source: str) -> tuple[Path, str]:
    """The folder or file that a source lies in (see `has_folder`), and the words after its `#`, however the path is
    spelled: `./runs/ijepa/#student` is runs/ijepa and `student`. What is there with a `#` in its name has no words."""
    text = bare(source).removeprefix(FOLDER)
    path, _, words = (text, "", "") if Path(text).exists() else text.partition("#")
    return Path(path), words


def path_of(source: str) -> Path:
    return split(source)[0]


def run_of(source: str) -> Path | None:
    """The folder of the run that a source belongs to: itself, or where its checkpoint or export lies."""
    if not has_folder(source):
        return None
    folder = path_of(source).absolute()
    for candidate in (folder, *folder.parents[:2]):
        checkpoints = candidate / "checkpoints"
        if checkpoints.is_dir() and ((candidate / "config.yaml").is_file() or any(checkpoints.glob("step-*"))):
            return candidate
    return None
