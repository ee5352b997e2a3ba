"""A trace of a few steps, operation by operation, where TensorBoard's profiler plugin finds it."""

import os
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from prelude.data.whole_files import write_whole
from prelude.pretrain import distributed
from prelude.pretrain.files import Tolerant, make_folder

_FIRST_STEPS = 3  # which are not typical: memory is asked for, kernels are chosen


class StepProfile:
    """A context around each step of a process; some of them are recorded.

    The trace of `num_steps` steps after the first three goes into tensorboard/, one .pt.trace.json.gz a start; a run
    that ends among them writes what there is. Nothing is recorded for 0, and a disk that does not take it is told once.
    """

    def __init__(self, run_dir: Path, num_steps: int):
        self.folder = run_dir / "tensorboard"
        self.tolerant = Tolerant(self.folder)
        self.begun, self.last = 0, _FIRST_STEPS + num_steps
        self.profiler = None
        if num_steps:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            steps = schedule(wait=_FIRST_STEPS - 1, warmup=1, active=num_steps, repeat=1)
            self.profiler = profile(
                activities=activities,
                schedule=steps,
                on_trace_ready=self._write,
                record_shapes=True,
                profile_memory=True,
            )

    def __enter__(self) -> None:
        if self.profiler is None:
            return
        if self.begun:
            self.profiler.step()
        else:
            self.profiler.start()
        self.begun += 1

    def __exit__(self, kind, *_) -> None:
        if kind is not None or self.begun == self.last:
            self.close()

    def close(self) -> None:
        if self.profiler is not None:
            self.profiler.stop()
            self.profiler = None

    def _write(self, profiler: profile) -> None:
        with tempfile.TemporaryDirectory() as folder, self.tolerant:
            draft = Path(folder) / "trace.json.gz"
            profiler.export_chrome_trace(str(draft))
            make_folder(self.folder)
            name = f"{distributed.host()}-{os.getpid()}.{time.time_ns()}.pt.trace.json.gz"
            write_whole(self.folder / name, draft.read_bytes())
