"""`prelude doctor` names what is wrong with a machine: machines that are made wrong on purpose, and broken torch."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from runs import BIN, ROOT

from prelude.data import host
from prelude.launch import doctor, installed, machine
from prelude.launch.finding import Finding, looked_at
from prelude.launch.loading import has_kernels
from prelude.pretrain import devices

SOUND = {
    "torch": "class version: cuda = None; hip = None\nclass cuda:\n    def is_available(): return False\n",
    "torchvision": "",
    "deepspeed": "print('a line of its own')",
}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Writes packages that stand before those that are installed; what is not given is sound."""

    def write(**broken: str) -> dict[str, str]:
        folder = tmp_path / "packages"
        for name, text in (SOUND | broken).items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / "__init__.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT / 'src'}")
        return dict(os.environ)

    return write


def wrong_of_loading() -> list[str]:
    with installed.Loading() as loading:
        return [sentence for finding in loading.findings() for sentence in finding.wrong]


def in_a_namespace(*command: str) -> list[str]:
    return ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs -o size=1m none /dev/shm && {' '.join(command)}"]


def test_a_machine_with_little_shared_memory_and_more_that_is_wrong(packages, tmp_path):
    if shutil.which("unshare") is None or subprocess.run(in_a_namespace("true"), capture_output=True).returncode:
        pytest.skip("needs a mount namespace of its own, which root has on Linux")
    file = tmp_path / "a_file"
    file.write_text("")
    variables = {"RANK": "3", "PRELUDE_CACHE": f"{file}/cache", "TMPDIR": "/nowhere", "PATH": f"{BIN}:/usr/bin:/bin"}
    command = in_a_namespace("ulimit -n 200 &&", sys.executable, "-m", "prelude.launch.doctor")
    env = packages(torchvision="raise RuntimeError('operator torchvision::nms does not exist')") | variables
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    sentences = done.stdout.partition("things are wrong:\n")[2].splitlines()
    for expected in (
        "/dev/shm is too small: it has 1 MiB",
        "RANK=3 is set and WORLD_SIZE is not",
        "may open 200 files",
        "TMPDIR=/nowhere cannot be written into",
        f"{file}/cache cannot be written into",
        "torchvision cannot be loaded (RuntimeError: operator torchvision::nms does not exist)",
    ):
        (said,) = [sentence for sentence in sentences if expected in sentence]
        assert said.endswith(".") and any(how in said for how in ("write", "reinstall", "unset", "can raise: `*"))
    assert "--shm-size=8g" in done.stdout


def told_by_doctor(before: str, packages, **variables: str) -> subprocess.CompletedProcess:
    """In a process of its own, after what a shell does to the machine."""
    script = f"{before}\nexec {sys.executable} -m prelude.launch.doctor"
    env = packages() | {"PATH": f"{BIN}:/usr/bin:/bin"} | variables
    return subprocess.run(["sh", "-c", script], env=env, capture_output=True, text=True, timeout=120)


def ill(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 1 and done.stderr == "", done.stdout + done.stderr
    return done.stdout.partition("wrong:\n")[2].splitlines()


def test_a_machine_that_allows_hardly_a_file_is_told_as_that_and_who_can_raise_it(packages):
    sentences = ill(told_by_doctor("ulimit -n 8", packages))
    files, started = (next(one for one in sentences if what in one) for what in ("open 8 files", "No process can be"))
    assert "the hard limit is 8, which only an administrator can raise: `* - nofile 65536`" in files
    assert "write `ulimit" not in files and "Too many open files" in started


def test_a_folder_that_is_gone_is_told(packages, tmp_path):
    (tmp_path / "gone").mkdir()
    sentences = ill(told_by_doctor(f"cd {tmp_path}/gone && rmdir {tmp_path}/gone", packages))
    assert any("is gone" in one and "write `cd FOLDER`" in one for one in sentences)


def test_variables_that_are_no_numbers_and_no_text_are_all_told(packages):
    bad = {
        "RANK": "banana",
        "WORLD_SIZE": "-1",
        "LOCAL_RANK": "x",
        "OMP_NUM_THREADS": "all",
        "MASTER_PORT": "tcp://a:1",
    }
    done = told_by_doctor("", packages, **bad, SLURM_JOB_ID=os.fsdecode(b"7\xff"), PYTHONIOENCODING="ascii")
    sentences = ill(done)
    for name, value in bad.items():
        assert any(f"{name}={value!r} is no" in one and "unset" in one for one in sentences), name
    assert "SLURM_JOB_ID=7" in done.stdout


@pytest.mark.parametrize("hidden", ["/proc", "/sys"])
def test_what_the_kernel_does_not_tell_ends_nothing(hidden, packages):
    if shutil.which("unshare") is None or subprocess.run(in_a_namespace("true"), capture_output=True).returncode:
        pytest.skip("needs a mount namespace of its own, which root has on Linux")
    script = f"mount -t tmpfs none {hidden} && exec {sys.executable} -m prelude.launch.doctor"
    env, command = packages() | {"PATH": f"{BIN}:/usr/bin:/bin"}, ["unshare", "--mount", "sh", "-c", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.stderr == "" and "memory" in done.stdout and "can be loaded" in done.stdout


def test_a_finding_that_fails_is_one_that_is_wrong():
    def broken():
        raise PermissionError(13, "Permission denied")

    found = looked_at("limits", broken)
    assert found.found == ["not known"] and "Permission denied" in found.wrong[0]


def test_a_user_without_a_home_has_a_cache_among_temporary_files(monkeypatch, tmp_path):
    def nowhere(cls):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("PRELUDE_CACHE", raising=False)
    monkeypatch.setattr(host.Path, "home", classmethod(nowhere))
    monkeypatch.setattr(host.tempfile, "tempdir", str(tmp_path))
    assert host.cache_folder() == tmp_path / f"prelude-{os.getuid()}" and machine.cache_folder().wrong == []


INFINITY = machine.resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "wrong"),
    [
        (200, INFINITY, False),
        (200, 65536, False),
        (200, 4096, False),
        (200, 1023, True),
        (1023, 1023, True),
        (1024, 1024, False),
    ],
)
def test_a_hard_limit_below_what_is_needed_is_wrong_and_a_soft_one_that_a_run_raises_is_not(
    soft, hard, wrong, monkeypatch
):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(machine, "INFINIBAND", Path("/nowhere"))
    said = machine.limits().wrong
    assert len(said) == wrong
    if wrong:
        assert "may open 1023 files" in said[0]
        assert "the hard limit is 1023, which only an administrator can raise" in said[0]


@pytest.mark.parametrize(
    ("hard", "said"),
    [
        (INFINITY, "write `ulimit -n 65536` before the command"),
        (65536, "write `ulimit -n 65536` before the command"),
        (4096, "write `ulimit -n 4096` before the command, the most that the hard limit allows"),
        (1023, "the hard limit is 1023, which only an administrator can raise"),
    ],
)
def test_a_soft_limit_is_to_be_raised_as_far_as_the_hard_one_allows(hard, said):
    assert host.raised("-n", hard, 1024, host.ENOUGH_FILES, "nofile").startswith(said)


BROKEN = {
    "torch is not there": ({"torch": "raise ModuleNotFoundError('No module named torch')"}, "torch cannot be loaded"),
    "a library of torch is missing": (
        {"torch": "raise ImportError('libcudart.so.13: cannot open shared object file')"},
        "torch cannot be loaded (ImportError: libcudart.so.13",
    ),
    "torch for another processor": (
        {"torch": "import os, signal; os.kill(os.getpid(), signal.SIGILL)"},
        "torch ends Python when it is loaded (SIGILL; it is built for other processors)",
    ),
    "deepspeed leaves": (
        {"deepspeed": "import sys; print('no CUDA_HOME', file=sys.stderr, flush=True); sys.exit(5)"},
        "deepspeed ends Python when it is loaded (exit code 5; the last that it said: no CUDA_HOME)",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_what_cannot_be_loaded_is_named(how, packages):
    broken, expected = BROKEN[how]
    packages(**broken)
    (sentence,) = wrong_of_loading()
    assert sentence.startswith(expected) and "--force-reinstall" in sentence


def test_what_can_be_loaded_is_no_fault_and_torch_stays_out_of_this_process(packages, monkeypatch):
    packages()
    assert wrong_of_loading() == []
    loads = "import sys, prelude.launch.doctor as it; print([n for n in ('torch', 'deepspeed') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", loads], capture_output=True, text=True).stdout == "[]\n"


def test_a_package_that_hangs_is_waited_for_with_an_end(packages, monkeypatch):
    packages(torch="import time; time.sleep(600)")
    monkeypatch.setattr(installed, "PATIENCE_SECONDS", 0.2)
    (sentence,) = wrong_of_loading()
    assert sentence.startswith("torch was not loaded within 0.2 s")


def test_versions_that_nobody_asked_for(monkeypatch):
    asked = {
        "version": "1",
        "requires-python": ">=99",
        "requires": ["numpy>=99", "no-such-package"],
        "extras": ["rich<1"],
    }
    monkeypatch.setattr(installed, "_project", lambda: asked)
    wrong = [sentence for finding in installed.versions() for sentence in finding.wrong if "deepspeed" not in sentence]
    assert len(wrong) == 4 and ">=99 is asked for" in wrong[0]
    assert "pip install 'numpy>=99'" in wrong[1] and "no-such-package is not installed" in wrong[2]
    assert "rich<1 is asked for" in wrong[3]


def test_what_an_installed_package_asks_for(tmp_path, monkeypatch):
    """It has no pyproject.toml beside it, and its extras are marked."""
    about = tmp_path / "prelude_ssl-7.dist-info"
    about.mkdir()
    lines = ["Metadata-Version: 2.4", "Name: prelude-ssl", "Version: 7", "Requires-Python: >=3.11"]
    lines += [f"Requires-Dist: {line}" for line in (
        "rich>=13.9", 'zarr>=2.16; extra == "zarr"', 'zarr>=2.16; extra == "test"', 'pytest>=8; extra == "test"',
    )]  # fmt: skip
    (about / "METADATA").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(installed, "_CHECKOUT", Path("/nowhere"))
    wanted = {"version": "7", "requires-python": ">=3.11", "requires": ["rich>=13.9"], "extras": ["zarr>=2.16"]}
    assert installed._project() == wanted


Space = namedtuple("Space", "f_frsize f_blocks f_bavail")


@pytest.mark.parametrize(
    "blocks, free, said",
    [(64, 64, "too small: it has 64 MiB"), (8192, 1, "is full: 1 MiB of 8.0 GiB"), (8192, 8192, "")],
)
def test_shared_memory(blocks, free, said, monkeypatch):
    monkeypatch.setattr(machine.os, "statvfs", lambda path: Space(2**20, blocks, free))
    wrong = machine.shared_memory().wrong
    assert said in wrong[0] if said else wrong == []


def test_no_shared_memory(monkeypatch):
    monkeypatch.setattr(host, "SHARED_MEMORY", "/nowhere/shm")
    (sentence,) = machine.shared_memory().wrong
    assert "/nowhere/shm does not exist" in sentence and "data.num_workers=0" in sentence


def test_limits_of_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    monkeypatch.setattr(host, "num_cores", lambda: 64)
    assert machine.cores().wrong == []
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.cores().wrong == []
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    (sentence,) = machine.cores().wrong
    assert "gives the time of 2.5" in sentence and "OMP_NUM_THREADS=2" in sentence
    (tmp_path / "memory.max").write_text(f"{2**29}\n")
    (sentence,) = machine.memory().wrong
    assert sentence.startswith("512 MiB of memory are free")


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_doctor_and_preview_know_the_memory_of_a_container_of_either_version(tmp_path, monkeypatch, name):
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    without = devices.host_memory()
    (tmp_path / "memory").mkdir()
    (tmp_path / name).write_text(f"{2**29}\n")
    assert devices.host_memory() == 2**29 < without
    assert "the group of this process may hold 512 MiB" in machine.memory().found


def test_locked_memory_matters_where_there_is_infiniband(tmp_path, monkeypatch):
    limit = machine.resource.getrlimit
    locked = {machine.resource.RLIMIT_MEMLOCK: (65536, INFINITY), machine.resource.RLIMIT_NOFILE: (4096, 4096)}
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: locked.get(which) or limit(which))
    monkeypatch.setattr(machine, "INFINIBAND", tmp_path)
    assert machine.limits().wrong == []
    (tmp_path / "mlx5_0").mkdir()
    assert "write `ulimit -l unlimited`" in machine.limits().wrong[0]
    locked[machine.resource.RLIMIT_MEMLOCK] = (65536, 65536)
    assert "only an administrator can raise: `* - memlock unlimited`" in machine.limits().wrong[0]


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A GPU of NVIDIA's on the bus, with a driver where it is asked for."""
    monkeypatch.setattr(installed, "PCI", tmp_path / "pci")
    monkeypatch.setattr(installed, "DRIVER", tmp_path / "version")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    device = tmp_path / "pci" / "0000:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x030200\n")
    return lambda driver: (tmp_path / "version").write_text("NVRM version: 580.65.06") if driver else None


NONE = {"name": "torch", "built_for": "CUDA 13.0", "devices": [], "told": []}


@pytest.mark.parametrize(
    "driver, about, hidden, said",
    [
        (False, {}, None, "--gpus all"),
        (True, {"built_for": None}, None, "built for the CPU alone"),
        (
            True,
            {"told": ["The NVIDIA driver on your system is too old."]},
            None,
            "(The NVIDIA driver on your system is",
        ),
        (True, {}, "", "CUDA_VISIBLE_DEVICES='' hides every GPU"),
    ],
)
def test_a_gpu_that_torch_does_not_find(driver, about, hidden, said, gpu, monkeypatch):
    gpu(driver)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    (sentence,) = installed.devices(NONE | about).wrong
    assert said in sentence


def test_a_gpu_that_torch_was_not_built_for():
    card = {"name": "B200", "free": 2**30, "total": 2**31, "capability": "10.0", "built": False}
    finding = installed.devices(NONE | {"devices": [card]})
    assert "GPU 0 (B200) has compute capability 10.0" in finding.wrong[0] and "1.0 GiB of 2.0 GiB" in finding.found[0]
    built = ["sm_80", "sm_86", "sm_90a", "sm_100"]
    assert [has_kernels(*of, built) for of in ((8, 0), (8, 9), (9, 0), (10, 3), (12, 0), (7, 5))] == [True] * 4 + [
        False
    ] * 2
    assert has_kernels(12, 0, [*built, "compute_100"])


def test_one_rank_of_a_machine_speaks(monkeypatch, capsys):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "here"}.items():
        monkeypatch.setenv(name, value)
    assert doctor.main([]) == 0 and capsys.readouterr().out == ""


def test_the_exit_code_is_that_of_what_was_found(capsys):
    sound, ill = Finding("a", ["one", "two"]), Finding("b", ["three"], ["It is broken; mend it."])
    assert doctor.tell([sound]) == 0 and "Nothing is wrong." in capsys.readouterr().out
    assert doctor.tell([sound, ill]) == 1 and "1 thing is wrong:\n1. It is broken" in capsys.readouterr().out
    assert doctor.tell_as_json([sound, ill]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["findings"][1] == {"title": "b", "found": ["three"], "wrong": ["It is broken; mend it."]}
    assert doctor.tell_as_json([sound]) == 0
