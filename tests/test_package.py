"""One name on the package index: what a wheel installs, and that nothing is imported by a second name."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ["data", "pretrain", "objectives", "checkpoints", "evaluators", "launch"]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    junk = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in [*FOLDERS, "configs", "src"]:
        shutil.copytree(ROOT / name, folder / "sources" / name, ignore=junk)
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copyfile(ROOT / name, folder / "sources" / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", folder, folder / "sources"], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """The commands of an environment that holds the wheel and, beside it, a stranger's packages of everyday names."""
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    # what we depend on is taken from here; the development install is not, as .pth files there are not read
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    install = [sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, "--no-index", wheel], check=True)
    for name in [*FOLDERS, "configs"]:
        (site / name).mkdir()
        (site / name / "__init__.py").write_text(f"raise RuntimeError('a stranger: {name}')")
    return home / "bin"


def run(*command, cwd: Path) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_wheel_holds_one_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"prelude"}
    for folder in FOLDERS:
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}
        assert sources == {name.removeprefix("prelude/") for name in names if name.startswith(f"prelude/{folder}/")
                           and name.endswith(".py")}  # fmt: skip
    assert "prelude/configs/quickstart.yaml" in names and "prelude/evaluators/comparing/report/page.html.j2" in names


def test_an_installed_wheel_trains_probes_and_exports_beside_hostile_packages(installed, tmp_path):
    for name in FOLDERS:  # in the folder where the commands are given, too
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('a stranger: {name}')")
    shards = "from prelude.data.shapes import write_shards; write_shards('s', 'train', num_samples=60, image_size=16)"
    run(installed / "python", "-c", shards.replace("60,", "60, seed=0,"), cwd=tmp_path)
    small = ["encoder.image_size=16", "encoder.patch_size=4", "train.epochs=1", "train.global_batch=20",
             "data.shards=s/train-*.tar", "run_dir=run", "optimizer.warmup_epochs=0"]  # fmt: skip
    run(installed / "prelude", "pretrain", "--config", "quickstart", *small, cwd=tmp_path)
    labelled = ["--train", "s/train-*.tar", "--test", "s/train-*.tar"]
    run(installed / "prelude", "knn", "run", *labelled, cwd=tmp_path)
    assert list((tmp_path / "run" / "evaluations").glob("*knn*.json"))
    run(installed / "prelude", "export", "run", "--to", "encoder", cwd=tmp_path)
    assert (tmp_path / "encoder" / "model.safetensors").is_file()


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_old_names_are_refused(folder, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {folder}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr.rstrip().endswith(f"ImportError: {folder} is imported as prelude.{folder}")


def test_a_clone_runs_its_doors_without_installation(tmp_path):
    """With neither the development install nor PYTHONPATH: the door finds its own package."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("raise RuntimeError('a stranger')")
    site = sysconfig.get_path("purelib")
    for door in ("pretrain.py", "prelude.py"):
        code = (
            f"import sys, runpy; sys.path.append({site!r}); sys.path.insert(0, {str(ROOT / 'launch')!r}); "
            f"sys.argv = [{door!r}, '--help']; runpy.run_path({str(ROOT / 'launch' / door)!r}, run_name='__main__')"
        )
        assert "usage" in run(sys.executable, "-S", "-c", code, cwd=tmp_path)
