"""One way to start, whoever starts us: the `deepspeed` launcher, torchrun, Slurm's srun, or plain python.

- The place of a process is read from the environment only (`launchers`); a bare process is a world of one.
- From the first meeting to `stop`, a rank that the others wait for is named (`attendance`).
- On CPU no C++ extension is compiled at start, and no rank takes more threads than its share of cores.
- Collectives that decide something (stop, resume from where) give every rank the same answer.
"""

import ctypes
import logging
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import timedelta
from functools import cache
from typing import NoReturn

import torch
import torch.distributed as dist

from prelude.data.errors import UserError
from prelude.data.host import num_cores, raise_files, refuse_few_files
from prelude.pretrain import attendance, launchers, stopping
from prelude.pretrain.meeting import meet

RANK_TIMEOUT = 600.0  # seconds, where no config says otherwise
_WARN_AFTER = 60.0
_LEAVING = 60.0  # more than a thread takes that ends this process
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def host() -> str:
    return socket.gethostname()


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def launched_world_size() -> int:
    """The world size that the environment announces, before any process group exists. Raises UserError."""
    return launchers.world_size()


def launched_rank() -> int:
    """This process' rank as the environment announces it. Raises UserError."""
    return launchers.rank()


def start(rank_timeout: float = RANK_TIMEOUT) -> torch.device:
    """Joins the process group of this job and returns this rank's device.

    rank_timeout: seconds that ranks wait for one another, now and later. Raises UserError for a launch that cannot
    work, RunStopped when ranks do not come.
    """
    launchers.complete()
    raise_files()
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _keep_freed_memory()
    else:
        _choose_device()
    if not dist.is_initialized():
        _join("gloo" if on_cpu else "nccl", rank_timeout)
    if on_cpu:
        # One core is left to the loader: threads that wait for each other on a busy core take many times longer.
        torch.set_num_threads(launchers.num_threads() or max(cores_per_rank() - 1, 1))
    with nothing_printed():
        import deepspeed

        logging.getLogger("DeepSpeed").handlers[:] = [logging.NullHandler()]
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        if on_cpu:
            # Compiled at every start on CPU for one collective that is not used here; it needs a compiler and
            # takes half a minute.
            import deepspeed.ops

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo" if on_cpu else "nccl", verbose=False)
    return device()


def _choose_device() -> None:
    """Slurm may show each rank the one GPU that is its own, as number 0; other launchers show all to all."""
    mine, seen = local_rank(), torch.cuda.device_count()
    if mine >= seen > 1:
        raise UserError(
            f"Rank {os.environ['RANK']} is number {mine} of {host()}, which has {seen} GPUs, numbered from 0; start as "
            "many ranks a host as it has GPUs."
        )
    if seen == 1:
        _Given.holds["GPU"] = str(torch.cuda.get_device_properties(0).uuid)
        os.environ["LOCAL_RANK"] = "0"  # by which DeepSpeed chooses, too
    torch.cuda.set_device(local_rank())


def _join(backend: str, rank_timeout: float) -> None:
    """Forms the process group. Here and not in DeepSpeed, whose start has no name for a rank that does not come."""
    mine, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    refuse_few_files(world, mine)
    warn_after = min(_WARN_AFTER, rank_timeout / 2)
    meeting = meet(mine, world, limit=rank_timeout, warn_after=warn_after, holds={"cores": _cores(), **_Given.holds})
    _Given.sharing = meeting.sharing
    _Watching.watch = attendance.Watch(meeting, rank_timeout, warn_after)
    stopping.before_leaving(left)
    if (sharing := meeting.sharing.get("GPU", 1)) > 1:
        raise UserError(
            f"{sharing} ranks of {host()} have one and the same GPU; start as many ranks a host as it has GPUs."
        )
    # torch's own limit comes later: it knows no rank's name.
    timeout = timedelta(seconds=2 * rank_timeout + 60)
    group = dist.PrefixStore("group", meeting.store)
    with explained():
        dist.init_process_group(backend, store=group, rank=mine, world_size=world, timeout=timeout, **_binding(backend))


def _binding(backend: str) -> dict:
    """NCCL is told its device, as DeepSpeed would, but for the versions of torch that hang then."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:3] if part.isdigit())
    if backend != "nccl" or (2, 6, 0) < version < (2, 7, 1):
        return {}
    return {"device_id": device()}


class _Given:
    """To this rank, of its host."""

    holds: dict[str, str] = {}
    sharing: Mapping[str, int] = {}  # with how many ranks


class _Watching:
    watch: attendance.Watch | None = None
    ended_by_a_thread = False  # which tells the others so first
    gathered = 0  # times


def stop() -> None:
    left(0)
    if dist.is_initialized():
        _hosts.cache_clear()
        import deepspeed.comm

        # Through DeepSpeed, which else keeps groups that are no more and hands them to the next run of this process.
        deepspeed.comm.destroy_process_group()


def left(code: int, why: str = "") -> None:
    """Tells the other ranks that this one ends, and how; what they wait for from now on they need not wait for."""
    _Watching.ended_by_a_thread = threading.current_thread() is not threading.main_thread()
    watch, _Watching.watch = _Watching.watch, None
    if watch:
        watch.leave(code, why)


@contextmanager
def explained() -> Iterator[None]:
    """Raises RunStopped with the rank that is missing where a collective fails for want of it."""
    try:
        yield
    except RuntimeError as error:
        if _Watching.ended_by_a_thread:
            time.sleep(_LEAVING)  # who heard that this rank leaves may close connections before it has left
        stopped = _Watching.watch and _Watching.watch.explain(error)
        if not stopped:
            raise
        raise stopped from None


def leave(code: int) -> NoReturn:
    """Ends a process whose work is done and written, without the destructors of C++ libraries.

    Those of torch's communication now and then abort a rank that has already finished, and the launcher then reports
    a failed run.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a log that nobody reads, or that a full disk holds, makes no failure of a run
            stream.flush()
    logging.shutdown()
    os._exit(code)


def cores_per_rank() -> int:
    """Its share of those that it may use: a launcher may have given each rank its own already."""
    return max(num_cores() // _Given.sharing.get("cores", launchers.local_world_size()), 1)


def _cores() -> str:
    return ",".join(map(str, sorted(os.sched_getaffinity(0)))) if hasattr(os, "sched_getaffinity") else "all"


def default_num_workers() -> int:
    """Loader workers of a rank: its share of the cores beside a GPU; one where the cores do the training."""
    return cores_per_rank() if torch.cuda.is_available() else 1


def gather() -> None:
    """Returns once all ranks have come, however long one takes whose data keep coming: a collective has torch's own
    limit, after which nobody is named."""
    if _Watching.watch is None:
        return
    _Watching.gathered += 1
    with explained(), attendance.collective(gathers=True):
        _Watching.watch.meeting.gather(_Watching.gathered)


def barrier() -> None:
    if world_size() > 1:
        with attendance.collective():
            dist.barrier()


def from_main(value):
    """Rank 0's value (any picklable object), on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    with attendance.collective():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def total(*values: float) -> list[float]:
    """The sum over ranks of each value, in float64. Between the hosts: no device is waited for."""
    if world_size() == 1:
        return [float(value) for value in values]
    sums = torch.tensor(values, dtype=torch.float64)
    with attendance.collective():
        dist.all_reduce(sums, group=_hosts())
    return sums.numpy().tolist()


@cache
def _hosts() -> dist.ProcessGroup:
    """All ranks, by a backend for tensors in host memory. Collective when first called."""
    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


class Aside:
    """The ranks among themselves, for a thread: what it says meets nothing of what the main threads say meanwhile.

    Collective when it is made. Raises RuntimeError where a rank is lost.
    """

    def __init__(self):
        self.rank, self.world_size = rank(), world_size()
        # A disk may take its time; who is gone is found out by `attendance`.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=1))

    def told_to_first(self, value) -> list | None:
        """Each rank's value (any picklable object), on rank 0; None elsewhere."""
        values = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values


def of_all(value) -> list:
    """Each rank's value (any picklable object), on every rank."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    with attendance.collective():
        dist.all_gather_object(values, value)
    return values


def deepspeed_messages_to(handler: logging.Handler) -> None:
    """From now on DeepSpeed's log lines go to this handler and nowhere else."""
    logger = logging.getLogger("DeepSpeed")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)


@contextmanager
def nothing_printed():
    """Swallows what libraries print while they start, and only what they print: errors still rise."""
    with open(os.devnull, "w") as sink, redirect_stdout(sink), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _keep_freed_memory() -> None:
    """glibc gives blocks above 128 kB back to the system when they are freed. Those are the activations, asked for
    again in the next step: 4 to 15 % of the time of a small ResNet went into page faults."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            libc.mallopt(parameter, 2**30)
