"""One way to start, whoever starts us: the `deepspeed` launcher, torchrun, Slurm's srun, or plain python.

- The place of a process is read from the environment only; a bare process is a world of one.
- On CPU no C++ extension is compiled at start, and no rank takes more threads than its share of cores.
- Collectives that decide something (stop, resume from where) give every rank the same answer.
"""

import ctypes
import logging
import os
import socket
import sys
import warnings
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from prelude.data.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """How many ranks share this machine: torchrun and the deepspeed launcher use different names."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if name in os.environ:
            return max(int(os.environ[name]), 1)
    return 1


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def launched_world_size() -> int:
    """The world size that the environment announces, before any process group exists."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1) if _launched() else 1


def start() -> torch.device:
    """Joins the process group of this job and returns this rank's device."""
    _complete_environment()
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _keep_freed_memory()
        # One core is left to the loader: threads that wait for each other on a busy core take many times longer.
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or max(cores_per_rank() - 1, 1)))
    else:
        torch.cuda.set_device(local_rank())
    with nothing_printed():
        import deepspeed

        logging.getLogger("DeepSpeed").handlers[:] = [logging.NullHandler()]
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        if on_cpu:
            # Compiled at every start on CPU for one collective that is not used here; it needs a compiler and
            # takes half a minute.
            import deepspeed.ops

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not dist.is_initialized():
            deepspeed.init_distributed(dist_backend="gloo" if on_cpu else "nccl", verbose=False)
    return device()


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Ends a process whose work is done and written, without the destructors of C++ libraries.

    Those of torch's communication now and then abort a rank that has already finished, and the launcher then reports
    a failed run.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os._exit(code)


def cores_per_rank() -> int:
    return max(len(os.sched_getaffinity(0)) // local_world_size(), 1)


def default_num_workers() -> int:
    """Loader workers of a rank: its share of the cores beside a GPU; one where the cores do the training."""
    return cores_per_rank() if torch.cuda.is_available() else 1


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def from_main(value):
    """Rank 0's value (any picklable object), on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value) -> list:
    """Every rank's value (any picklable object), in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def total(*values: float) -> list[float]:
    """The sum over ranks of each value, in float64."""
    sums = torch.tensor(values, dtype=torch.float64, device=device())
    if world_size() > 1:
        dist.all_reduce(sums)
    return sums.tolist()


def deepspeed_messages_to(log: Path) -> None:
    """From now on DeepSpeed's log lines go to this file and nowhere else."""
    logger = logging.getLogger("DeepSpeed")
    logger.handlers[:] = [logging.FileHandler(log, delay=True)]
    logger.setLevel(logging.INFO)


@contextmanager
def nothing_printed():
    """Swallows what libraries print while they start, and only what they print: errors still rise."""
    with open(os.devnull, "w") as sink, redirect_stdout(sink), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _launched() -> bool:
    return "RANK" in os.environ or "SLURM_PROCID" in os.environ


def _complete_environment() -> None:
    env = os.environ
    if "RANK" not in env and "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        if "MASTER_ADDR" not in env:
            raise UserError(
                "Under srun MASTER_ADDR is not set; export MASTER_ADDR=$(scontrol show hostnames | head -n 1) and "
                "MASTER_PORT=29500 before srun."
            )
        env.update(RANK=env["SLURM_PROCID"], WORLD_SIZE=env["SLURM_NTASKS"], LOCAL_RANK=env.get("SLURM_LOCALID", "0"))
        env.setdefault("LOCAL_WORLD_SIZE", env.get("SLURM_NTASKS_PER_NODE", "1"))
        env.setdefault("MASTER_PORT", "29500")
    if "RANK" not in env:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))


def _keep_freed_memory() -> None:
    """glibc gives blocks above 128 kB back to the system when they are freed. Those are the activations, asked for
    again in the next step: 4 to 15 % of the time of a small ResNet went into page faults."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            libc.mallopt(parameter, 2**30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
