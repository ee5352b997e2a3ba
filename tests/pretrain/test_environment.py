import resource
import subprocess
import tomllib
from pathlib import Path

import numpy as np

from prelude.pretrain import environment
from prelude.pretrain.environment import describe_code, peak_memory

ROOT = Path(__file__).resolve().parents[2]


def test_peak_memory_counts_what_was_held_and_given_back():
    before = peak_memory()
    size = max(before, 2**27)
    held = np.ones(size, np.uint8)  # written, hence resident
    del held
    after = peak_memory()
    assert after >= size and after > before
    assert after <= 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1.01  # never more than the system says


def test_a_change_in_any_package_that_is_installed_is_other_code_and_nothing_else_is(tmp_path, monkeypatch):
    installed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [name.removeprefix("prelude.").replace(".", "/") for name in installed if "." in name]
    ours = [tmp_path / folder / "module.py" for folder in folders if folder != "configs"]  # recipes are no code
    others = [tmp_path / folder / "module.py" for folder in ("tests", "tests/pretrain", "benchmarks")]
    for path in (*ours, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "pretrain" / "environment.py"))
    assert tmp_path / "evaluators" / "finetuning" / "module.py" in ours
    codes = [describe_code()["prelude"]]
    for path in ours:
        path.write_text("x = 2\n")
        codes.append(describe_code()["prelude"])
    ours[-1].rename(ours[-1].with_name("renamed.py"))
    codes.append(describe_code()["prelude"])
    assert len(set(codes)) == len(ours) + 2
    for path in others:
        path.write_text("x = 2\n")
    assert describe_code()["prelude"] == codes[-1]


def test_a_project_around_an_installed_package_gives_it_no_commit(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(tmp_path), *author, "commit", "--quiet", "--allow-empty", "-m", "x"], check=True)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "site-packages" / "prelude" / "pretrain" / "x.py"))
    assert environment.describe_environment()["commit"] == ""
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "pretrain" / "x.py"))
    assert len(environment.describe_environment()["commit"]) == 40
