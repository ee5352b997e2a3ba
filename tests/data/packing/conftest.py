"""Pictures to be packed, and the packing of them."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prelude.data.packing.pack import Packing, pack
from prelude.data.packing.source import SourceOptions


@pytest.fixture
def picture():
    """picture(number, format, size) -> bytes of a small image that only this number has."""

    def make(number: int, format: str = "PNG", height: int = 12, width: int = 16, **settings) -> bytes:
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, format, **settings)
        return out.getvalue()

    return make


@pytest.fixture
def write_files(tmp_path):
    """write_files(folder, {name: content}) -> the folder."""

    def write(folder: str, files: dict[str, bytes]) -> Path:
        for name, content in files.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return tmp_path / folder

    return write


@pytest.fixture
def packed(tmp_path):
    """packed(source, packing options and, after `options=`, those of the source) -> (folder, summary)."""

    def run(source, to: str = "shards", options: dict | None = None, **settings):
        packing = Packing(to=str(tmp_path / to), **settings)
        summary, _ = pack(str(source), SourceOptions(**(options or {})), packing)
        return tmp_path / to, summary

    return run
