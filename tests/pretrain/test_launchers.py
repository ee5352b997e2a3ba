"""Who started a process, told from the environment alone; what is said by halves is refused and never waited for."""

from types import SimpleNamespace

import pytest
import torch

from prelude.data.errors import UserError
from prelude.pretrain import distributed, launchers

SLURM = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "5", "SLURM_NTASKS": "10", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
STEP = SLURM | {"SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "4(x2),2"}
ADDRESS = {"MASTER_ADDR": "node1", "MASTER_PORT": "29777"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
DEEPSPEED = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2"}


def completed(env: dict) -> tuple:
    env = dict(env)
    launchers.complete(env)
    return (
        env["RANK"],
        env["WORLD_SIZE"],
        env["LOCAL_RANK"],
        str(launchers.local_world_size(env)),
        *(env.get(name) for name in ADDRESS),
    )


ALONE = ("0", "1", "0", "1", None, None)


@pytest.mark.parametrize(
    "env",
    [
        {},
        SLURM,  # a batch script
        SLURM | ADDRESS,  # that has exported what its srun will need
        SLURM | {"SLURM_STEP_ID": str(2**32 - 5)},  # as newer versions number it
        SLURM | {"SLURM_STEPID": str(2**32 - 6)},  # the shell of salloc
        STEP | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        {"WORLD_SIZE": "4"},  # of a container
    ],
)
def test_one_process_is_a_world_of_one(env):
    assert completed(env)[:4] == ALONE[:4]


@pytest.mark.parametrize(
    "env, expected",
    [
        (TORCHRUN | ADDRESS, ("2", "4", "0", "2", "node1", "29777")),
        (DEEPSPEED | ADDRESS, ("2", "4", "0", "2", "node1", "29777")),
        (STEP | ADDRESS, ("5", "10", "1", "4", "node1", "29777")),
        (STEP | {"SLURM_NODEID": "2"} | ADDRESS, ("5", "10", "1", "2", "node1", "29777")),
        (OPEN_MPI | {"MASTER_ADDR": "node1"}, ("3", "4", "1", "2", "node1", "29500")),
        (HYDRA, ("1", "2", "1", "2", "127.0.0.1", "29500")),  # all on one host
        (TORCHRUN | ADDRESS | STEP, ("2", "4", "0", "2", "node1", "29777")),  # torchrun in a step
        ({"RANK": "0", "WORLD_SIZE": "1"}, ("0", "1", "0", "1", None, "29500")),
    ],
)
def test_a_rank_of_many_finds_its_place(env, expected):
    assert completed(env) == expected
    assert launchers.world_size(env) == int(expected[1])


@pytest.mark.parametrize("env", [TORCHRUN, DEEPSPEED, STEP, OPEN_MPI, HYDRA])
def test_how_many_ranks_a_machine_has_is_told_by_one_name_under_every_launcher(env):
    env = env | ADDRESS
    launchers.complete(env)
    assert env["LOCAL_WORLD_SIZE"] == ("4" if "SLURM_NODEID" in env else "2")


@pytest.mark.parametrize(
    "env, words",
    [
        ({"RANK": "0"}, "WORLD_SIZE is not; unset RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR is not"),
        ({"RANK": "0", "WORLD_SIZE": "2"} | ADDRESS, "LOCAL_RANK is not"),
        (TORCHRUN | ADDRESS | {"RANK": "4"}, "RANK=4 is no rank of WORLD_SIZE=4"),
        (TORCHRUN | ADDRESS | {"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is no whole number"),
        (TORCHRUN | ADDRESS | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
        (TORCHRUN | ADDRESS | {"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        (STEP, "Under srun MASTER_ADDR is not set"),
        (OPEN_MPI, "mpirun -x MASTER_ADDR=HOST"),
        (HYDRA | {"PMI_SIZE": "8"}, "mpiexec -genv MASTER_ADDR HOST"),
        (
            {"RANK": "banana"},
            r"RANK='banana' is no whole number from 0 on; launchers set it, so write `unset RANK`",
        ),
        ({"RANK": "²", "WORLD_SIZE": "4"}, "RANK='²' is no whole number"),
        ({"RANK": "9" * 5000, "WORLD_SIZE": "4"}, "is no whole number"),
        ({"RANK": "", "WORLD_SIZE": "4"}, "RANK='' is no whole number"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE='-1' is no whole number from 1 on"),  # of one process, too
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' is no whole number from 1 on"),
        ({"LOCAL_RANK": "gpu0"}, "LOCAL_RANK='gpu0' is no whole number"),
        ({"LOCAL_WORLD_SIZE": "2.0"}, "LOCAL_WORLD_SIZE='2.0' is no whole number"),
        ({"LOCAL_SIZE": "x"}, "LOCAL_SIZE='x' is no whole number"),
        (TORCHRUN | ADDRESS | {"LOCAL_RANK": "2"}, "LOCAL_RANK=2 is no rank of LOCAL_WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2"} | ADDRESS, "LOCAL_RANK=2 is no rank of WORLD_SIZE=2"),
        (STEP | {"SLURM_NTASKS": "ten"}, "SLURM_NTASKS='ten' is no whole number"),
        (STEP | {"SLURM_PROCID": "-3"}, "SLURM_PROCID='-3' is no whole number"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "x"}, "OMPI_COMM_WORLD_LOCAL_RANK='x' is no whole number"),
    ],
)
def test_what_is_said_by_halves_is_a_sentence(env, words):
    with pytest.raises(UserError, match=words):
        completed(env)


def test_a_step_that_does_not_say_how_many_tasks_share_a_node_is_no_fault():
    assert completed(SLURM | ADDRESS | {"SLURM_STEP_ID": "0"})[:4] == ("5", "10", "1", "1")


def test_every_fault_is_told_at_once():
    env = {"RANK": "banana", "WORLD_SIZE": "-1", "LOCAL_RANK": "x", "MASTER_PORT": "http", "OMP_NUM_THREADS": "all"}
    told = launchers.faults(env)
    assert [sentence.split("=")[0] for sentence in told] == list(env)
    assert launchers.faults({}) == launchers.faults(TORCHRUN | ADDRESS) == []
    assert launchers.faults({"RANK": "0"}) == [
        "RANK=0 is set and WORLD_SIZE is not; unset RANK to run as one process, or start the ranks with deepspeed, "
        "torchrun or srun."
    ]


@pytest.mark.parametrize(("text", "threads"), [(None, None), ("", None), ("4", 4), ("4,2", 4), (" 3 ", 3)])
def test_threads_are_the_first_of_a_list(text, threads):
    assert launchers.num_threads({} if text is None else {"OMP_NUM_THREADS": text}) == threads


@pytest.mark.parametrize("text", ["0", "-1", "two", "²", "4;2"])
def test_what_is_no_number_of_threads_is_a_sentence(text):
    with pytest.raises(UserError, match="is no number of threads; write one of 1 or more, or unset it"):
        launchers.num_threads({"OMP_NUM_THREADS": text})


def test_what_a_rank_starts_is_no_rank_by_any_launcher():
    for env in (TORCHRUN | ADDRESS, DEEPSPEED | ADDRESS, STEP | ADDRESS, OPEN_MPI | ADDRESS, HYDRA):
        alone = launchers.without_rank(env)
        assert completed(alone)[:4] == ALONE[:4] and launchers.world_size(dict(alone)) == 1


@pytest.mark.parametrize(
    "given, cores",
    [
        ({}, 2),  # nobody has met: all of the host's ranks are thought to have the same
        ({"cores": 8}, 2),
        ({"cores": 1}, 16),  # srun with cores for each task, deepspeed --bind_cores_to_rank
    ],
)
def test_a_rank_divides_its_cores_by_those_that_have_the_same(given, cores, monkeypatch):
    monkeypatch.setattr(distributed, "num_cores", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(distributed._Given, "sharing", given)
    assert distributed.cores_per_rank() == cores


@pytest.fixture
def gpus(monkeypatch):
    """As many as a test says; which one was taken."""
    taken = []
    monkeypatch.setattr(distributed._Given, "holds", {})
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: taken.append(number))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid="GPU-5"))

    def have(count: int, local_rank: int) -> list[int]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        monkeypatch.setenv("RANK", str(local_rank))
        distributed._choose_device()
        return taken

    return have


def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_that_it_is_shown(gpus):
    assert gpus(8, 3) == [3] and not distributed._Given.holds
    assert gpus(1, 5) == [3, 0] and distributed._Given.holds == {"GPU": "GPU-5"}
    assert distributed.local_rank() == 0  # DeepSpeed chooses by it


def test_more_ranks_than_gpus_are_a_sentence(gpus):
    with pytest.raises(UserError, match="Rank 4 is number 4 of .*, which has 4 GPUs, numbered from 0; start as many"):
        gpus(4, 4)
