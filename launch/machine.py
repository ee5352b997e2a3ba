"""What the machine offers a run, and what of it is too little. Imports nothing heavy; reads, and changes nothing but
for a file that it makes in a folder, to see whether it can, and removes."""

import errno
import fcntl
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from prelude.data import host
from prelude.data.counting import counted, size
from prelude.data.errors import UserError, cause_of
from prelude.data.host import ENOUGH_FILES, attainable_files, files_of_a_rank, raised
from prelude.launch.finding import Finding, looked_at
from prelude.pretrain import launchers

VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID",
    "SLURM_NNODES", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE", "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG", "GLOO_SOCKET_IFNAME", "DS_ACCELERATOR", "PRELUDE_CACHE",
    "TMPDIR",
)  # fmt: skip
INFINIBAND = Path("/sys/class/infiniband")
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")  # that torch's kernels are written for
_OF_A_WORKER = 2 * 256 * 3 * 224 * 224  # bytes of the two micro-batches that it keeps ready, of 256 images each
GIB = 2**30
_ENOUGH_SHARED = GIB  # for any number of workers: they wait for one another where more would be used
_LEAST_FREE = GIB
_LEAST_FILES = 1024
_LIBRARIES = 0.75 * GIB  # of Python, torch and DeepSpeed in a rank's memory


def speaks_for_its_host() -> bool:
    """False for all ranks of a machine but the first. What is wrong with the variables is told later."""
    env = dict(os.environ)
    try:
        launchers.complete(env)
    except UserError:
        return True
    return env.get("LOCAL_RANK", "0") == "0"


def findings() -> Iterator[Finding]:
    yield looked_at("variables", lambda: launch_variables(os.environ))
    yield looked_at("folder", current_folder)
    yield looked_at("cores", cores)
    yield looked_at("memory", memory)
    yield looked_at("shared memory", shared_memory)
    yield looked_at("limits", limits)
    yield looked_at("temporary", temporary_folder)
    yield looked_at("cache", cache_folder)


def launch_variables(env: Mapping[str, str]) -> Finding:
    there = [f"{name}={env[name]}" for name in VARIABLES if name in env]
    finding = Finding("variables", there or ["none that a launcher sets"])
    finding.wrong += launchers.faults(env)
    return finding


def current_folder() -> Finding:
    try:
        return Finding("folder", [os.getcwd()])
    except OSError as error:
        wrong = f"The folder that this was started in is gone ({cause_of(error)}), and torch cannot be loaded in none"
        return Finding("folder", ["none"], [f"{wrong}; write `cd FOLDER` of one that is there."])


def cores() -> Finding:
    usable = host.num_cores()
    names, flags = [], set()
    for line in _lines("/proc/cpuinfo"):
        name, _, value = line.partition(":")
        names += [value.strip()] if name.strip() == "model name" else []
        flags |= set(value.split()) if name.strip() in ("flags", "Features") else set()
    has = [flag for flag in _FLAGS if flag in flags]
    finding = Finding("cores", [f"{usable} of {os.cpu_count()}, {names[0] if names else 'of a kind that is not told'}"])
    finding.found.append(f"instructions: {', '.join(has) or 'none of ' + ', '.join(_FLAGS)}")
    share = _cpu_share()
    if share is not None:
        finding.found.append(f"the group of this process gets the time of {share:.3g}")
        if share < 0.9 * usable:
            finding.wrong.append(
                f"{counted(usable, 'core')} seen, and the container's limit gives the time of {share:.3g}, so that "
                f"too many "
                f"loader workers and threads share it; write data.num_workers={max(int(share), 1)} and "
                f"OMP_NUM_THREADS={max(int(share), 1)}, or give the container whole cores (--cpuset-cpus)."
            )
    return finding


def _cpu_share() -> float | None:
    """Cores whose time the container may use; None: no limit."""
    quota, period, *_ = [*_words(host.CGROUP / "cpu.max"), "", ""]
    if not quota:  # the older version of cgroups
        quota, period = (" ".join(_words(host.CGROUP / "cpu" / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def memory() -> Finding:
    told = {line.partition(":")[0]: line.split()[1] for line in _lines("/proc/meminfo") if len(line.split()) > 1}
    if not {"MemTotal", "MemAvailable"} <= told.keys():
        return Finding("memory", ["not told by this system"])
    total, free = (1024 * int(told[name]) if told[name].isdecimal() else 0 for name in ("MemTotal", "MemAvailable"))
    finding = Finding("memory", [f"{size(free)} of {size(total)} free"])
    limit = host.memory_limit()
    if limit is not None and limit < total:
        free = min(free, limit)
        finding.found.append(f"the group of this process may hold {size(limit)}")
    if free < _LIBRARIES:
        finding.wrong.append(
            f"{size(free)} of memory are free, and a rank holds {size(_LIBRARIES)} before its first image; give the "
            "job more, or end what else runs here."
        )
    return finding


def shared_memory() -> Finding:
    """Where loader workers put batches."""
    place = host.SHARED_MEMORY
    try:
        status = os.statvfs(place)
    except OSError:
        wrong = f"{place} does not exist, and loader workers hand batches over there; mount a tmpfs on it, or write "
        return Finding("shared memory", [f"{place} does not exist"], [f"{wrong}data.num_workers=0."])
    total, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    finding = Finding("shared memory", [f"{size(free)} of {size(total)} free in {place}"])
    least = min(host.num_cores() * _OF_A_WORKER, _ENOUGH_SHARED)
    need = (
        f"each loader worker keeps two micro-batches there ({size(_OF_A_WORKER)} for 256 images of 224 pixels) and "
        "waits where there is no room"
    )
    if total < least:
        finding.wrong.append(
            f"{place} is too small: it has {size(total)}, and {need}; make it {size(8 * GIB)} (docker run "
            "--shm-size=8g; Kubernetes: an emptyDir of medium Memory mounted there), or write a smaller "
            "data.num_workers or train.micro_batch."
        )
    elif free < least:
        finding.wrong.append(
            f"{place} is full: {size(free)} of {size(total)} are free, and {need}; remove what killed processes have "
            f"left there (`ls -l {place}`)."
        )
    return finding


def limits() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, hard_locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = [f"open files {_limit(soft)} (at most {_limit(hard)}), locked memory {_limit(locked, size)}"]
    finding = Finding("limits", found)
    least, attainable = max(_LEAST_FILES, files_of_a_rank(_num_ranks())), attainable_files()
    if attainable < min(least, ENOUGH_FILES):  # a run raises its soft limit
        finding.wrong.append(
            f"A process may open {attainable} files, and a rank and its workers open shards, batches and connections, "
            f"up to {least}; {raised('-n', hard, least, ENOUGH_FILES, 'nofile')}."
        )
    if _has_infiniband() and locked != resource.RLIM_INFINITY:
        finding.wrong.append(
            f"There is InfiniBand here, for which NCCL locks memory, and a process may lock {_limit(locked, size)}; "
            f"{raised('-l', hard_locked, resource.RLIM_INFINITY, resource.RLIM_INFINITY, 'memlock')}."
        )
    return finding


def _num_ranks() -> int:
    """As the variables have it; what is wrong with them is told of itself."""
    try:
        return launchers.world_size()
    except UserError:
        return 1


def _has_infiniband() -> bool:
    try:
        return any(INFINIBAND.iterdir())
    except OSError:
        return False


def _limit(value: int, words=str) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else words(value)


def temporary_folder() -> Finding:
    asked = os.environ.get("TMPDIR")
    try:
        place = tempfile.gettempdir()
    except FileNotFoundError:
        sentence = "No folder for temporary files can be written into; write `export TMPDIR=FOLDER` of one that can."
        return Finding("temporary", ["nowhere"], [sentence])
    finding = _folder("temporary", Path(place), "export TMPDIR=FOLDER")
    if asked and os.path.realpath(asked) != os.path.realpath(place):
        finding.wrong.append(
            f"TMPDIR={asked} cannot be written into, and {place} is used instead; make that folder, or unset TMPDIR."
        )
    return finding


def cache_folder() -> Finding:
    """Of indexes, features and remote shards."""
    return _folder("cache", host.cache_folder(), "export PRELUDE_CACHE=FOLDER", needs_locks=True)


def _folder(title: str, place: Path, remedy: str, needs_locks: bool = False) -> Finding:
    """A folder that is there is written into; of one that is not, the nearest above it is looked at."""
    there = place
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        wrong = f"{place} cannot be looked at ({cause_of(error)}); write `{remedy}` of another one."
        return Finding(title, [str(place)], [wrong])
    finding = Finding(title, [f"{place}, {size(free)} free" + (", not made yet" if there != place else "")])
    elsewhere = f"write `{remedy}` of another one"
    try:
        _try(there, write=there == place, needs_locks=needs_locks)
    except OSError as error:
        what = "cannot be written into"
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            what = "takes no locks, which the processes of a node need there"
        finding.wrong.append(f"{place} {what} ({cause_of(error)}); {elsewhere}.")
    if free < _LEAST_FREE:
        finding.wrong.append(f"{place} has {size(free)} free; make room there, or {elsewhere}.")
    return finding


def _try(folder: Path, write: bool, needs_locks: bool) -> None:
    """Raises OSError."""
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if not write:
        return
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".prelude-doctor-") as file:
        file.write(b"\0")
        file.flush()
        if needs_locks:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []
