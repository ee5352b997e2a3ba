"""What the encoder is worth while it trains: k-NN and a linear head on a small labelled subset, every so many steps.

- It cannot touch the run: the engine hands over copies of the weights, and all that is computed with them is computed
  in a process of its own, niced, with few threads, on the accelerator where there is one.
- The training step waits for the copy and for nothing else. An evaluation that is due while another is under way is
  skipped, and that is told; that of the last step is waited for, up to `LAST_WAIT` seconds and not beyond a request
  to end.
- A process that dies, or that cannot read its subset, is told of once; the run goes on without.
- At ZeRO stages 0 to 2, where rank 0 holds whole weights; the config refuses stage 3.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from safetensors import SafetensorError
from torch import Tensor

import prelude
from prelude.data.class_names import plain_reader
from prelude.data.errors import UserError
from prelude.data.value_range import refuse_other_images
from prelude.data.whole_files import write_whole
from prelude.evaluators.labelled import labelled_section
from prelude.pretrain import distributed, stopping
from prelude.pretrain.config import Config
from prelude.pretrain.files import read_lines, save_file
from prelude.pretrain.monitors import Monitor, Report
from prelude.pretrain.schedules import Progress

LAST_WAIT = 300.0  # seconds; other ranks may be waiting to leave
_LOOK_UP = 0.2  # seconds between two looks at whether the run was asked to end
_PACKAGE_PATH = Path(prelude.__file__).resolve().parents[1]
_ENDED = {"ended": True}


def check(config: Config) -> None:
    """Refuses, before a run begins, labelled shards that its encoder cannot be judged on. Raises UserError."""
    section, seen = config.evaluate, config.data
    labelled = labelled_section(section, seen.range, seen.max_pixels, seen.channels)
    for key, index in zip(("train_shards", "test_shards"), labelled.opened(), strict=True):
        shards = getattr(section, key)
        if not (index.labels[:, 0] >= 0).any():
            raise UserError(
                f"evaluate.{key}={shards} has no image with a .{section.label} member; write evaluate.label, or "
                "evaluate.every_steps=0."
            )
        reader = plain_reader(index)
        if reader.shape or reader.dtype != "int64":
            raise UserError(
                f"evaluate.label={section.label} is no class number in evaluate.{key}={shards}, and a run's encoder "
                "is judged by those; write evaluate.label with their extension, or evaluate.every_steps=0."
            )
        refuse_other_images(index, seen.channels)
    labelled.indexes()  # names of classes that do not fit together


class OnlineProbe(Monitor):
    """For a config whose `evaluate` section has `every_steps`."""

    def __init__(self, config: Config):
        self.config, self.every, self.run_dir = config, config.evaluate.every_steps, Path(config.run_dir)
        self.weights_file = self.run_dir / "online-encoder.safetensors"
        self.log = self.run_dir / "online.log"
        self.answers: queue.SimpleQueue = queue.SimpleQueue()
        self.reports: list[Report] = []
        self.process: subprocess.Popen | None = None
        self.judging: int | None = None  # the step whose weights the process has
        self.next: tuple[int, dict[str, Tensor]] | None = None  # the last step's, while another's are judged
        self.step = 0

    def start(self, progress: Progress) -> None:
        self.step = self.first = progress.step
        told: list[dict] = []
        with suppress(OSError):  # that it cannot be read is told where it is written
            told = read_lines(self.run_dir / "online.jsonl")
        self.known = {record["step"] for record in told if record.get("kind") == "evaluation"}
        path = f"{_PACKAGE_PATH}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)
        threads = str(max(distributed.cores_per_rank() // 4, 1))
        try:
            write_whole(self.log, "")
            with open(self.log, "a") as log:
                self.process = subprocess.Popen(
                    # -P: nothing where the run was started hides a module that is found elsewhere.
                    [sys.executable, "-P", "-m", "prelude.evaluators.online.worker"],
                    env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": threads},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
        except OSError as error:
            self._note(f"there is no online evaluation, and the run goes on without: {error}")
            return
        with suppress(BrokenPipeError):  # the process has ended, which `_listen` tells
            print(json.dumps({"config": self.config.model_dump(mode="json")}), file=self.process.stdin, flush=True)
        threading.Thread(target=self._listen, args=(self.process.stdout,), daemon=True).start()

    def wants_encoder(self, progress: Progress) -> bool:
        self.step = progress.step
        resumed_here = progress.step == self.first and progress.step in self.known
        last = progress.step == progress.num_steps
        if self.process is None or resumed_here or (progress.step % self.every and not last):
            return False
        self._take_answers()
        if self.judging is not None and not last:
            self._note(f"the evaluation is skipped, as that of step {self.judging} is still under way")
            return False
        return self.process is not None

    def encoder(self, step: int, weights: dict[str, Tensor]) -> None:
        if self.judging is not None:
            self.next = (step, weights)
            return
        self.judging = step
        threading.Thread(target=self._hand_over, args=(self.process.stdin, step, weights), daemon=True).start()

    def found(self) -> list[Report]:
        self._take_answers()
        reports, self.reports = self.reports, []
        return reports

    def finish(self) -> None:
        until = time.monotonic() + LAST_WAIT
        while self.judging is not None and (left := until - time.monotonic()) > 0 and not stopping.wanted():
            self._take_answers(wait=min(left, _LOOK_UP))
        if self.judging is not None and stopping.wanted():
            self._note(f"the evaluation of step {self.judging} was given up, as the run was asked to end")
        elif self.judging is not None:
            self._note(f"the evaluation of step {self.judging} took more than {LAST_WAIT:.0f} s and was given up")

    def close(self) -> None:
        process, self.process = self.process, None
        if process:
            _end(process)
        with suppress(OSError):
            self.weights_file.unlink(missing_ok=True)

    # ---- what the process says

    def _take_answers(self, wait: float = 0.0) -> None:
        try:
            while True:
                self._take(self.answers.get(wait > 0, wait or None))
                wait = 0.0
        except queue.Empty:
            return

    def _take(self, answer: dict) -> None:
        if "notice" in answer:
            self._note(answer["notice"])
        elif "numbers" in answer:
            self.judging = None
            self.reports.append(Report(answer["step"], "evaluation", answer["text"], answer["numbers"]))
            if self.next:
                waiting, self.next = self.next, None
                self.encoder(*waiting)
        elif self.process is not None:  # it has ended, or is of no use any more
            process, self.process = self.process, None
            self.judging = self.next = None
            code = _end(process)
            why = answer.get("error") or f"its process ended with code {code}; see {self.log}"
            self._note(f"online evaluation has ended, and the run goes on without: {why}")

    def _note(self, text: str) -> None:
        self.reports.append(Report(self.step, "notice", text))

    # ---- in threads of their own: they wait for the disk and for the process, and compute nothing

    def _hand_over(self, stdin: IO, step: int, weights: dict[str, Tensor]) -> None:
        try:
            save_file(weights, self.weights_file)
            print(json.dumps({"step": step, "weights": str(self.weights_file.absolute())}), file=stdin, flush=True)
        except BrokenPipeError:
            return  # the process has ended, which `_listen` tells
        except (OSError, SafetensorError, ValueError) as error:
            self.answers.put({"error": f"the weights of step {step} could not be handed over ({error})"})

    def _listen(self, stdout: IO) -> None:
        for line in stdout:
            try:
                self.answers.put(json.loads(line))
            except json.JSONDecodeError:
                break  # cut off by the process's end
        self.answers.put(_ENDED)


def _end(process: subprocess.Popen) -> int:
    """Ends the process, gently where it listens. Returns its exit code."""
    try:
        process.stdin.close()  # what it ends with
    except BrokenPipeError:
        pass
    try:
        return process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
