"""Small data sets in tar shards; every image is 10 x 12 pixels of noise that its number decides."""

import errno
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from runs import LAUNCHED

from prelude.data import open_files, waiting


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test reads an index that another one, or the user, has left behind."""
    monkeypatch.setenv("PRELUDE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def failing_reads(monkeypatch):
    """Called, so many reads of samples fail from now on, and those after them do not."""
    left = []

    def pread(*of) -> bytes:
        if left:
            raise left.pop()
        return os.pread(*of)

    monkeypatch.setattr(open_files, "os", SimpleNamespace(**vars(os) | {"pread": pread}))
    return lambda count: left.extend([OSError(errno.EIO, "Input/output error")] * count)


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """What a test sets for its process holds for that test alone."""
    for name, value in vars(waiting.Patience(timeout_seconds=60)).items():
        monkeypatch.setattr(waiting.patience, name, value)
    return waiting.patience


@pytest.fixture(scope="session")
def image():
    """image(number) -> bytes of a PPM file."""

    def make(number: int, height: int = 10, width: int = 12) -> bytes:
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        return f"P6 {width} {height} 255\n".encode() + pixels.tobytes()

    return make


@pytest.fixture(scope="session")
def write_tar():
    """write_tar(path, [(name, content), ...], format): members as given, in order."""

    def write(path: Path, members, format=tarfile.USTAR_FORMAT) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=format) as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path

    return write


@pytest.fixture
def write_shards(tmp_path, write_tar, image):
    """write_shards(counts, bad=numbers, folder=name) -> paths. Samples are numbered throughout; label = number."""

    def write(counts, bad=(), folder="shards") -> list[str]:
        paths, number = [], 0
        for shard, count in enumerate(counts):
            members = []
            for n in range(number, number + count):
                members += [(f"{n:06}.ppm", b"garbage" if n in bad else image(n)), (f"{n:06}.cls", str(n).encode())]
            number += count
            paths.append(str(write_tar(tmp_path / folder / f"{shard:03}.tar", members)))
        return paths

    return write


@pytest.fixture
def run_python(cache):
    """run_python(code, *arguments) -> a started process that sees the project and this test's cache."""
    started = []

    def run(code: str, *arguments, **environment) -> subprocess.Popen:
        variables = os.environ | LAUNCHED | environment
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()
