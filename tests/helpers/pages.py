"""A page of the documentation as a test: its blocks of code are run in their order, as a reader would run them."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from runs import BIN, ROOT

_BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    language: str  # bash or python
    code: str
    line: int  # in the page, from 1


def blocks_of(page: Path) -> list[Block]:
    """Those marked `bash` or `python`. What is marked otherwise, or not at all, is there to be read."""
    text = page.read_text()
    return [Block(found[1], found[2], text.count("\n", 0, found.start()) + 1) for found in _BLOCK.finditer(text)]


def run_page(page: Path, folder: Path, timeout: float = 900.0) -> str:
    """Runs every block in `folder`, a checkout's root as far as doors and recipes go, and returns what they printed.
    Blocks of Python share one session as the cells of a notebook do, if there are no others; else each is a script."""
    for name in ("launch", "configs"):
        (folder / name).symlink_to(ROOT / name)
    blocks = blocks_of(page)
    if all(block.language == "python" for block in blocks):
        blocks = [Block("python", "\n".join(block.code for block in blocks), 1)]
    told = ""
    for block in blocks:
        said = run_block(block, folder, timeout)
        assert said.returncode == 0, f"{page.name}, line {block.line}:\n{block.code}\n{said.stdout[-4000:]}"
        told += said.stdout
    return told


def run_block(block: Block, folder: Path, timeout: float) -> subprocess.CompletedProcess:
    path = f"{BIN}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    command = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
    return subprocess.run(
        [*command, block.code], cwd=folder, env=env, text=True, timeout=timeout,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
