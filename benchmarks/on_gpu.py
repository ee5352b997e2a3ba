"""Everything that only a GPU can tell, in one command that loses nothing.

    python benchmarks/on_gpu.py                      (at most 25 minutes; run again, it goes on where it stopped)
    python benchmarks/on_gpu.py --smoke              (all of it on the CPU at toy size, whose figures say nothing)

Entries run one after another, the most wanted first, each with a limit; one that fails or hangs costs itself alone: the
next have another process. After each, benchmarks/results/DEVICE.json and DEVICE.md are written. What failed is tried
again by the next start. Nothing is fetched: all data are made on the spot.
"""

import argparse
import json
import os
import platform
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

import gpu_entries as entries
import gpu_runs

from prelude.data.whole_files import write_whole

RESULTS = Path(__file__).resolve().parent / "results"
_COMPILED = ("mae-b", "ijepa-b", "barlow-r50", "spark-convnext-b", "mae-l", "mae-s", "dseqjepa-b", "rotation-r50")
_LEAST_FOR_THE_RUN, _AFTER_THE_RUN = 300.0, 200.0  # seconds; the last save and the judging come after it


def plan(smoke: bool) -> dict[str, float]:
    """Each entry and its limit, seconds, the most wanted first."""
    steps = list(entries.STEPS)[: 6 if smoke else None]  # the toys of the others are the same
    eager, first = {f"step {name}": 90.0 for name in steps}, ("step mae-b", "step ijepa-b")
    compiled = {f"step {name} compiled": 180.0 for name in (_COMPILED[:2] if smoke else _COMPILED)}
    return {
        "host_waits": 120.0,
        **{name: eager.pop(name) for name in first},
        **{f"{name} compiled": compiled.pop(f"{name} compiled") for name in first},
        "fed": 160.0,
        **eager,
        "resumed": 120.0,
        "regions": 60.0,
        "photometric": 90.0,
        "save": 90.0,
        "loader": 90.0,
        **compiled,
        "predicted": 180.0,
        "run": float("inf"),  # for the time that is left
    }


def main() -> int:
    args = parse_arguments()
    if args.answers:
        serve(args)
        return 0
    for name in entries.STEPS if args.smoke else ():
        entries.check_recipe(name)
    until, path = time.monotonic() + 60 * args.minutes, args.results / f"{device_name(args.smoke)}.json"
    found = json.loads(path.read_text()) if path.is_file() else {"machine": machine(), "entries": {}}
    with Worker(args) as worker:
        for name, limit in plan(args.smoke).items():
            is_done = "failed" not in found["entries"].get(name, {"failed": ""})
            if is_done or not any(fnmatch(name, pattern) for pattern in args.entries):
                continue
            left = until - time.monotonic()
            limit = min(limit, left)
            if limit < (_LEAST_FOR_THE_RUN if name == "run" else 20):
                print(f"{name}: no time is left; run the same command again", flush=True)
                continue
            started = time.monotonic()
            result = worker.measured(name, limit)
            found["entries"][name] = {**result, "seconds": round(time.monotonic() - started, 1)}
            keep(found, path)
            print(f"{name}: {json.dumps(found['entries'][name])}", flush=True)
    failed = [name for name, result in found["entries"].items() if "failed" in result]
    print(f"written to {path}{'; failed: ' + ', '.join(failed) if failed else ''}")
    return 1 if failed else 0


class Worker:
    """A process that measures one entry after another: to start one takes longer than most entries."""

    def __init__(self, args: argparse.Namespace):
        self.options = ["--folder", str(args.folder), *(["--smoke"] if args.smoke else [])]
        self.process = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.end()

    def measured(self, name: str, limit: float) -> dict:
        """What an entry found, or why it failed."""
        try:
            if self.process is None:
                self._start()
            self.process.stdin.write(json.dumps([name, limit]) + "\n")
            self.process.stdin.flush()
            result = self._answer(time.monotonic() + limit)
        except OSError:  # it has ended since the entry before
            result = {"failed": self._last_words()}
        if "failed" in result:
            self.end()
        return result

    def _answer(self, until: float) -> dict:
        """A whole line of the pipe, which a process that this one left behind may keep open."""
        said = b""
        while time.monotonic() < until:
            is_there, _, _ = select.select([self.answers], [], [], 1.0)
            if is_there:
                more = os.read(self.answers, 2**16)
                said += more
                if said.endswith(b"\n"):
                    return json.loads(said)
            if (is_there and not more) or (not is_there and self.process.poll() is not None):
                return {"failed": self._last_words()}
        return {"failed": "no answer in time"}

    def _start(self) -> None:
        reads, writes = os.pipe()
        self.answers, self.errors = reads, tempfile.TemporaryFile("w+")
        command = [sys.executable, __file__, "--answers", str(writes), *self.options]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            text=True,
            pass_fds=[writes],
            start_new_session=True,
        )
        os.close(writes)

    def _last_words(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        self.errors.seek(0)
        return (self.errors.read().strip().splitlines() or [f"exit code {self.process.returncode}"])[-1][:300]

    def end(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            with suppress(OSError):  # what it was never told
                self.process.stdin.close()
            os.close(self.answers)
            self.errors.close()
            self.process = None


def serve(args: argparse.Namespace) -> None:
    """Answers on a pipe of its own: what an entry prints goes elsewhere."""
    import torch

    num_threads = torch.get_num_threads()
    with os.fdopen(args.answers, "w") as answers:
        for line in sys.stdin:
            name, limit = json.loads(line)
            try:
                result = measured(name, args.smoke, limit, args.folder)
                entries.tidy(num_threads)
            except Exception as error:
                result = {"failed": f"{type(error).__name__}: {error}"[:300]}
            print(json.dumps(result), file=answers, flush=True)


def measured(name: str, toy: bool, limit: float, folder: Path) -> dict:
    if name == "run":
        return gpu_runs.run(toy, limit if toy else limit - _AFTER_THE_RUN, folder)
    if name == "fed":
        return gpu_runs.fed(toy, limit if toy else limit / 2, folder)
    if name == "resumed":
        return gpu_runs.resumed(toy, folder)
    if name.startswith("step "):
        _, step, *rest = name.split()
        return entries.step(step, bool(rest), toy)
    return getattr(entries, name)(toy)


def keep(found: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, content in ((path, json.dumps(found, indent=1) + "\n"), (path.with_suffix(".md"), table(found))):
        write_whole(target, content)


def table(found: dict) -> str:
    """Steps first, MFU before times; then everything else."""
    machine = found["machine"]
    lines = [f"# {machine['device']}", "", ", ".join(f"{key} {value}" for key, value in machine.items()), ""]
    lines += [
        "| step | MFU | busy | ms | images at once | images/s | memory, GiB | predicted ÷ taken |",
        "|---|---|---|---|---|---|---|---|",
    ]
    others = []
    for name, of in found["entries"].items():
        if "failed" in of:
            others.append(f"| {name} | failed: {of['failed']} |")
        elif name.startswith("step "):
            step = name.removeprefix("step ")
            as_planned = of["images"] == entries.STEPS[step.split()[0]][2]
            predicted = found["entries"].get("predicted", {}).get(step) if as_planned else None
            ratio = f"{predicted / of['memory_gib']:.2f}" if predicted else ""
            busy = f"{of['busy']:.0%}" if "busy" in of else ""
            row = (f"{of['mfu']:.1%}", busy, f"{of['ms']:.1f}", of["images"], f"{of['images_per_second']:.0f}")
            row = (*row, f"{of['memory_gib']:.1f}", ratio)
            lines.append(f"| {' | '.join(map(str, (step, *row)))} |")
        else:
            others.append(f"| {name} | {', '.join(f'{key} {_short(value)}' for key, value in of.items())} |")
    return "\n".join([*lines, "", "| entry | |", "|---|---|", *others, ""])


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine() -> dict[str, str]:
    import torch

    from prelude.pretrain.environment import describe_environment

    found = describe_environment()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "python": platform.python_version(),
        **{name: found["packages"][name] for name in ("torch", "deepspeed", "timm")},
        "cores": str(found["cores"]),
        "commit": found["commit"],
    }


def device_name(smoke: bool) -> str:
    import torch

    if smoke or not torch.cuda.is_available():
        return "smoke" if smoke else "cpu"
    return re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name()).strip("-")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25, help="of this start (default: 25)")
    parser.add_argument("--smoke", action="store_true", help="all of it on the CPU at toy size")
    parser.add_argument("--entries", nargs="+", default=["*"], metavar="NAME", help="only these, such as 'step mae-*'")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="(default: benchmarks/results)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="of the run and its data (default: RESULTS/run)")
    parser.add_argument("--answers", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.folder = args.folder or args.results / "run"
    if not (args.smoke or args.answers):
        import torch

        if not torch.cuda.is_available():
            parser.error("there is no GPU here; --smoke tries everything on the CPU")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
