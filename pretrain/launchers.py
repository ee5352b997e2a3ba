"""Who started this process, and as which rank: read from the environment, and from nothing else.

- DeepSpeed's launcher and torchrun say it in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. For srun, Open
  MPI and the PMI of MPICH and Intel MPI those are filled in from their own variables. How many ranks a machine has
  DeepSpeed says in LOCAL_SIZE, and everybody here reads in LOCAL_WORLD_SIZE.
- A job's batch script has Slurm's variables too and is one process: only a step that srun started has ranks.
- What is said by halves is refused in a sentence, and never waited for.
"""

import os
import re
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

from prelude.data.errors import UserError

DEFAULT_PORT = "29500"
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
_NUMBERS = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 0, "LOCAL_SIZE": 0}  # and from where on
# What else torchrun and DeepSpeed tell their ranks
_BESIDE = ("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "CROSS_RANK", "CROSS_SIZE")
_FIRST_SPECIAL_STEP = 0xFFFFFFFA  # Slurm numbers steps from 0; from here on are interactive shells and batch scripts


@dataclass(frozen=True)
class Launcher:
    """How a launcher names a rank's place, and how an address is given through it."""

    name: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str
    give_address: str

    def started(self, env: MutableMapping[str, str]) -> bool:
        return self.rank in env and env.get(self.world_size, "1") != "1"


_SRUN = Launcher(
    "srun",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "SLURM_LOCALID",
    "",
    "export MASTER_ADDR=$(scontrol show hostnames | head -n 1) MASTER_PORT=29500 before srun",
)
_LAUNCHERS = (
    Launcher(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "write mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500, HOST being that of rank 0",
    ),
    Launcher(
        "mpiexec",
        "PMI_RANK",
        "PMI_SIZE",
        "MPI_LOCALRANKID",
        "MPI_LOCALNRANKS",
        "write mpiexec -genv MASTER_ADDR HOST -genv MASTER_PORT 29500, HOST being that of rank 0",
    ),
)


def world_size(env: MutableMapping[str, str] = os.environ) -> int:
    """How many ranks were started. Raises UserError as `complete` does."""
    return int(_completed(env)["WORLD_SIZE"])


def rank(env: MutableMapping[str, str] = os.environ) -> int:
    """Of this process. Raises UserError as `complete` does."""
    return int(_completed(env)["RANK"])


def without_rank(env: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that a rank starts and that is none: it starts ranks of its own, or is alone."""
    ours = {*_NUMBERS, *_BESIDE, "MASTER_ADDR", "MASTER_PORT", *(one.rank for one in (_SRUN, *_LAUNCHERS))}
    return {name: value for name, value in env.items() if name not in ours and not name.startswith("TORCHELASTIC_")}


def _completed(env: MutableMapping[str, str]) -> dict[str, str]:
    given = dict(env)
    complete(given)
    return given


def complete(env: MutableMapping[str, str] = os.environ) -> None:
    """Fills in RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; one process by itself is a
    world of one. Raises UserError where they are incomplete, no numbers, or at odds."""
    for name, at_least in _NUMBERS.items():
        if name in env:
            _number(env, name, at_least=at_least)
    told = next((name for name in _LOCAL_SIZES if name in env), "WORLD_SIZE")
    if "RANK" not in env:
        launcher = _srun(env) or next((one for one in _LAUNCHERS if one.started(env)), None)
        if launcher is None:
            env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
            return
        _translate(launcher, env)
    elif "WORLD_SIZE" not in env:
        raise UserError(
            f"RANK={env['RANK']} is set and WORLD_SIZE is not; unset RANK to run as one process, or start the ranks "
            "with deepspeed, torchrun or srun."
        )
    world = _number(env, "WORLD_SIZE", at_least=1)
    if not 0 <= (rank := _number(env, "RANK", at_least=0)) < world:
        raise UserError(f"RANK={rank} is no rank of WORLD_SIZE={world}; ranks are numbered from 0 to {world - 1}.")
    if world == 1:
        env.setdefault("LOCAL_RANK", "0")
    for name in ("MASTER_ADDR", "LOCAL_RANK"):
        if world > 1 and not env.get(name):
            raise UserError(
                f"RANK={rank} and WORLD_SIZE={world} are set and {name} is not; unset RANK to run as one process, or "
                "start the ranks with deepspeed, torchrun or srun, which set all of them."
            )
    env.setdefault("MASTER_PORT", DEFAULT_PORT)
    if not 0 < _number(env, "MASTER_PORT", at_least=1) < 2**16:
        raise UserError(f"MASTER_PORT={env['MASTER_PORT']} is no port; write one from 1024 to 65535.")
    if (local := _number(env, "LOCAL_RANK", at_least=0)) >= max(int(env[told]), 1):
        raise UserError(f"LOCAL_RANK={local} is no rank of {told}={env[told]}; ranks of a machine are numbered from 0.")
    if "LOCAL_SIZE" in env:
        env.setdefault("LOCAL_WORLD_SIZE", env["LOCAL_SIZE"])


def faults(env: Mapping[str, str]) -> list[str]:
    """A sentence for each variable that is no number, and for what is at odds; `complete` raises the first that a run
    of these variables would meet."""
    found = []
    for name, at_least in (_NUMBERS | {"MASTER_PORT": 1}).items():
        if name in env:
            found += _refusal(lambda name=name, least=at_least: _number(env, name, at_least=least))
    found += _refusal(lambda: num_threads(env))
    return list(dict.fromkeys(found + _refusal(lambda: complete(dict(env)))))


def _refusal(look: Callable[[], object]) -> list[str]:
    try:
        look()
    except UserError as error:
        return [str(error)]
    return []


def num_threads(env: Mapping[str, str] = os.environ) -> int | None:
    """What OMP_NUM_THREADS allows a process; of a list, which is for nested loops, the first. None where it says
    nothing. Raises UserError."""
    text = env.get("OMP_NUM_THREADS", "").strip()
    if not text:
        return None
    first, *_ = text.split(",")
    if not _is_number(first.strip()) or not int(first):
        raise UserError(f"OMP_NUM_THREADS={text!r} is no number of threads; write one of 1 or more, or unset it.")
    return int(first)


def local_world_size(env: MutableMapping[str, str] = os.environ) -> int:
    """How many ranks share this machine: torchrun and the deepspeed launcher use different names."""
    for name in _LOCAL_SIZES:
        if name in env:
            return max(_number(env, name, at_least=0), 1)
    return 1


def _srun(env: MutableMapping[str, str]) -> Launcher | None:
    step = env.get("SLURM_STEP_ID") or env.get("SLURM_STEPID") or ""
    in_a_step = _is_number(step) and int(step) < _FIRST_SPECIAL_STEP
    return _SRUN if in_a_step and _SRUN.started(env) else None


def _translate(launcher: Launcher, env: MutableMapping[str, str]) -> None:
    world = str(_number(env, launcher.world_size, at_least=1))
    for name in (launcher.rank, launcher.local_rank):
        if name in env:
            _number(env, name, at_least=0)
    if launcher is _SRUN:
        local_world = _tasks_on_this_node(env)
    else:
        local_world = env.get(launcher.local_world_size, "1")
    if local_world == world:
        env.setdefault("MASTER_ADDR", "127.0.0.1")
    if not env.get("MASTER_ADDR"):
        raise UserError(f"Under {launcher.name} MASTER_ADDR is not set; {launcher.give_address}.")
    env.update(RANK=env[launcher.rank], WORLD_SIZE=world, LOCAL_RANK=env.get(launcher.local_rank, "0"))
    env.setdefault("LOCAL_WORLD_SIZE", local_world)


def _tasks_on_this_node(env: MutableMapping[str, str]) -> str:
    """Slurm writes 4,4,4,2 as 4(x3),2."""
    counts = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [count] * int(times or 1)
    node = env.get("SLURM_NODEID", "0")
    return counts[int(node)] if _is_number(node) and int(node) < len(counts) else env.get("SLURM_NTASKS_PER_NODE", "1")


def _number(env: Mapping[str, str], name: str, *, at_least: int) -> int:
    text = env.get(name, "")
    if not _is_number(text) or int(text) < at_least:
        raise UserError(
            f"{name}={text!r} is no whole number from {at_least} on; launchers set it, so write `unset {name}`, and "
            "leave it to them."
        )
    return int(text)


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 10
