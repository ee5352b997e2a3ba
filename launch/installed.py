"""What is installed: versions against what this package asks for, and whether what computes can be loaded at all.

torch may be what is broken, so this process never imports it.
"""

import importlib.metadata
import json
import os
import platform
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from prelude.data.counting import size
from prelude.launch.finding import Finding, looked_at
from prelude.launch.loading import PACKAGES

DISTRIBUTION = "prelude-ssl"
PATIENCE_SECONDS = 300
_LAST_WORDS_SECONDS = 5.0
DRIVER = Path("/proc/driver/nvidia/version")
PCI = Path("/sys/bus/pci/devices")
_NVIDIA, _DISPLAYS = "0x10de", "0x03"
_OF_DEVELOPERS = ("test", "docs")  # extras that no run needs
_CHECKOUT = Path(__file__).resolve().parents[1]


def versions() -> Iterator[Finding]:
    project: dict = {}
    yield looked_at("prelude", lambda: _prelude(project))
    if project:
        yield looked_at("python", lambda: _python(project))
        yield looked_at("packages", lambda: _packages("packages", _asked(project["requires"]), needed=True))
        yield looked_at("extras", lambda: _packages("extras", _asked(project["extras"]), needed=False))
    yield looked_at("commands", _launcher)


def _prelude(project: dict) -> Finding:
    """project: filled in with what it asks for."""
    project |= _project()
    return Finding("prelude", [f"{project['version']}, in {Path(__file__).resolve().parents[1]}"])


def _asked(lines: list[str]) -> list[Requirement]:
    return [Requirement(line) for line in lines]


def _python(project: dict) -> Finding:
    python = Finding("python", [f"{platform.python_version()}, {sys.executable}", platform.platform()])
    if platform.python_version() not in SpecifierSet(project["requires-python"], prereleases=True):
        asked = f"Python {platform.python_version()} runs this, and {project['requires-python']} is asked for"
        python.wrong.append(f"{asked}; make the environment anew with one of those.")
    return python


def _project() -> dict:
    """Of this checkout, or of the package that is installed."""
    path = _CHECKOUT / "pyproject.toml"
    if path.is_file():
        found = tomllib.loads(path.read_text())["project"]
        wanted = [lines for name, lines in found["optional-dependencies"].items() if name not in _OF_DEVELOPERS]
        extras = {line for lines in wanted for line in lines}
        return {"version": found["version"], "requires-python": found["requires-python"],
                "requires": found["dependencies"], "extras": sorted(extras)}  # fmt: skip
    about = importlib.metadata.metadata(DISTRIBUTION)
    lines = importlib.metadata.requires(DISTRIBUTION) or []
    return {"version": about["Version"], "requires-python": about["Requires-Python"],
            "requires": [line for line in lines if "extra ==" not in line],
            "extras": sorted({line.partition(";")[0] for line in lines if _is_of_an_extra(line)})}  # fmt: skip


def _is_of_an_extra(line: str) -> bool:
    _, there, extra = line.partition("extra ==")
    return bool(there) and extra.strip(" \"'") not in _OF_DEVELOPERS


def _packages(title: str, asked: list[Requirement], needed: bool) -> Finding:
    found, wrong = [], []
    for one in asked:
        if one.name == DISTRIBUTION:
            continue
        try:
            version = importlib.metadata.version(one.name)
            if not version:  # what an installation that broke off leaves
                raise importlib.metadata.PackageNotFoundError(one.name)
        except (importlib.metadata.PackageNotFoundError, KeyError):
            if needed:
                wrong.append(f"{one.name} is not installed, or not whole; write `pip install '{one}'`.")
            continue
        found.append(f"{one.name} {version}")
        if not one.specifier.contains(version, prereleases=True):
            wrong.append(f"{one.name} {version} is installed, and {one} is asked for; write `pip install '{one}'`.")
    lines = [", ".join(found[first : first + 5]) for first in range(0, len(found), 5)]
    return Finding(title, lines or ["none"], wrong)


def _launcher() -> Finding:
    command, beside = shutil.which("deepspeed"), Path(sys.executable).with_name("deepspeed")
    compiler = shutil.which("cc") or shutil.which("gcc")
    finding = Finding("commands", [f"deepspeed: {command or 'not on PATH'}, C compiler: {compiler or 'none'}"])
    if not command and beside.is_file():
        finding.wrong.append(
            f"The deepspeed command of this Python is not on PATH; write `export PATH={beside.parent}:$PATH`, or "
            "activate the environment."
        )
    elif command and beside.is_file() and not os.path.samefile(command, beside):
        finding.wrong.append(
            f"The deepspeed command on PATH, {command}, is not that of this Python, {beside}; write `export "
            f"PATH={beside.parent}:$PATH`, or activate the environment."
        )
    return finding


class Loading:
    """The process that loads torch and what stands on it, from the beginning of a `with` to its end."""

    def __enter__(self) -> "Loading":
        script, self.process = Path(__file__).with_name("loading.py"), None
        self.lines: queue.SimpleQueue = queue.SimpleQueue()
        self.errors: list[str] = []
        self.not_started = ""
        try:
            # -P: the script's folder would hide packages of the same names as our files
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                errors="replace", start_new_session=True,
            )  # fmt: skip
            threading.Thread(target=self._read, daemon=True).start()
            self.listening = threading.Thread(target=lambda: self.errors.extend(self.process.stderr), daemon=True)
            self.listening.start()
        except (OSError, RuntimeError) as error:  # a limit on files, on processes, on threads
            self.not_started = str(error)
        return self

    def __exit__(self, *_) -> None:
        if self.process is None:
            return
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(json.loads(line))
        self.lines.put(None)

    def findings(self) -> Iterator[Finding]:
        """Of the devices, as soon as torch is there, and of what could not be loaded."""
        if self.not_started:
            yield Finding("devices", ["not known, as no process can be started", *_seen_without_torch()])
            why = f"No process can be started to load {', '.join(PACKAGES)} ({self.not_started})"
            raised = "raise the limits on open files and on processes (`ulimit -n`, `ulimit -u`)"
            yield Finding("loading", ["nothing was tried"], [f"{why}; {raised}."])
            return
        loaded, broken, ends = [], [], time.monotonic() + PATIENCE_SECONDS
        while len(loaded) < len(PACKAGES) and not broken:
            try:
                about = self.lines.get(timeout=max(ends - time.monotonic(), 0))
            except queue.Empty:
                about = {"error": ""}
            if about is None or "error" in about:
                broken.append(self._why(about, PACKAGES[len(loaded)]))
                break
            loaded.append(about["name"])
            if about["name"] == "torch":
                yield devices(about)
        if not loaded:
            yield Finding("devices", ["not known, as torch cannot be loaded", *_seen_without_torch()])
        yield Finding("loading", [f"{', '.join(loaded) or 'nothing'} can be loaded"], broken)

    def _why(self, about: dict | None, name: str) -> str:
        again = f"reinstall it (`pip install --force-reinstall {name}`), and compare its version with torch's"
        if about is None:
            code = self.process.wait()
            self.listening.join(_LAST_WORDS_SECONDS)  # not for good: a process that it started may hold the pipe
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            last = next((line.strip() for line in reversed(self.errors) if line.strip()), "it said nothing")
            hint = "it is built for other processors" if code == -signal.SIGILL else f"the last that it said: {last}"
            return f"{name} ends Python when it is loaded ({how}; {hint}); {again}."
        if about["error"]:
            return f"{name} cannot be loaded ({' '.join(about['error'].split())}); {again}."
        return (
            f"{name} was not loaded within {PATIENCE_SECONDS} s; see whether the file system of {sys.prefix} answers, "
            "or put the environment on a disk of this machine."
        )


def devices(about: dict) -> Finding:
    """about: what `loading` says of torch."""
    build = f"torch is built for {about['built_for'] or 'the CPU alone'}"
    found = [
        f"{number}: {one['name']}, {size(one['free'])} of {size(one['total'])} free, compute capability "
        f"{one['capability']}"
        for number, one in enumerate(about["devices"])
    ]
    finding = Finding("devices", [*(found or ["no GPU"]), build, *_seen_without_torch()])
    for number, one in enumerate(about["devices"]):
        if not one["built"]:
            finding.wrong.append(
                f"GPU {number} ({one['name']}) has compute capability {one['capability']}, for which this torch has no "
                "kernels; install one that has, by the command that pytorch.org gives."
            )
    if not about["devices"] and (sentence := _why_no_gpu(about)):
        finding.wrong.append(sentence)
    return finding


def _why_no_gpu(about: dict) -> str:
    """Where there is one, and torch has none; else ""."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1") and (DRIVER.exists() or _on_the_bus()):
        return f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} hides every GPU; unset it."
    if not DRIVER.exists():
        if not _on_the_bus():
            return ""
        return (
            "There is an NVIDIA GPU on the bus and no driver for this process; start the container with GPUs (docker "
            "run --gpus all, apptainer exec --nv), or install the driver on the host."
        )
    if not about["built_for"]:
        return (
            "There is an NVIDIA driver, and torch is built for the CPU alone; install one for CUDA, by the command "
            "that pytorch.org gives."
        )
    why = f" ({' '.join(about['told'])})" if about["told"] else ""
    return (
        f"There is an NVIDIA driver, and torch, built for {about['built_for']}, finds no GPU{why}; see what "
        "nvidia-smi says, and install a torch for the CUDA that it names, or a newer driver."
    )


def _on_the_bus() -> int:
    """How many of NVIDIA's graphics processors the kernel knows, whatever this container may use."""
    return sum(_read(path / "vendor") == _NVIDIA and _read(path / "class").startswith(_DISPLAYS)
               for path in (PCI.iterdir() if PCI.is_dir() else ()))  # fmt: skip


def _seen_without_torch() -> list[str]:
    driver = _read(DRIVER).partition("\n")[0]
    on_the_bus = f"{count} of NVIDIA's on the bus" if (count := _on_the_bus()) else ""
    return [line for line in (" ".join(driver.split()), on_the_bus) if line]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
