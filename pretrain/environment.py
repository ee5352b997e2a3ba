"""Where a run took place: versions, devices and the commit, for environment.json."""

import hashlib
import importlib.metadata
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch

from prelude.data.host import num_cores
from prelude.data.signed_urls import shown_in
from prelude.pretrain import distributed

_PACKAGES = ("torch", "torchvision", "deepspeed", "timm", "webdataset", "simplejpeg", "numpy")
_OURS = ("data", "pretrain", "objectives", "checkpoints", "evaluators", "launch")  # what lies beside them runs nothing


def describe_environment() -> dict:
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "device": _device_name(),
        "world_size": distributed.world_size(),
        "cores": num_cores(),
        "host": platform.node(),
        "commit": _commit(),
        "command": shown_in(sys.argv),
    }


def describe_code() -> dict[str, str]:
    """What computes: the versions of Python and of the packages, and a hash of our own source files, wherever they lie
    in our packages."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.blake2b(digest_size=8)
    sources = [path for package in _OURS for path in (root / package).rglob("*.py")]
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in sources):
        digest.update(name.encode() + path.read_bytes())
    versions = {name: _version(name) for name in _PACKAGES}
    return {"prelude": digest.hexdigest(), "python": platform.python_version(), **versions}


def peak_memory() -> int:
    """Bytes that this process has held at most: of its accelerator, or on CPU resident, loader workers not included."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")  # getrusage would count what the parent held before it started this process
    lines = status.read_text().splitlines() if status.is_file() else []
    kibibytes = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return 1024 * (int(kibibytes[0]) if kibibytes else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    """The commit of this code, marked when the tree has changes; empty where there is no git, or only that of a project
    around the place where this is installed."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
