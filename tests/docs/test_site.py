"""The site builds strictly from what is in the repository, fetches nothing, and fails where it should."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("material", reason="needs the extra docs: pip install 'prelude-ssl[docs]'")
pytest.importorskip("mkdocstrings", reason="needs the extra docs: pip install 'prelude-ssl[docs]'")

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ["docs", "configs", "examples", "benchmarks", "launch", "pretrain", "data", "objectives", "checkpoints",
          "evaluators", "src", "README.md", "CHANGELOG.md", "pyproject.toml", "mkdocs.yml"]  # fmt: skip


@pytest.fixture
def repository(tmp_path) -> Path:
    """A copy to build, and to break."""
    for name in NEEDED:
        source, copy = ROOT / name, tmp_path / "repository" / name
        copy.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copyfile(source, copy)
    return tmp_path / "repository"


def build(repository: Path) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(repository / "src"), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    return subprocess.run(command, cwd=repository, env=env, capture_output=True, text=True, timeout=300)


def test_the_site_is_built_whole_and_fetches_nothing(repository):
    built = build(repository)
    assert built.returncode == 0, built.stderr
    site = repository / "build" / "site"
    pages = {str(path.relative_to(site)) for path in site.rglob("*.html")}
    for path in (ROOT / "docs").rglob("*.md"):
        if path.name != "messages_introduction.md":
            assert str(path.relative_to(ROOT / "docs").with_suffix(".html")) in pages
    for name in pages:
        html = (site / name).read_text()
        assert not re.search(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(?:https?:)?//', html), name
    start = (site / "index.html").read_text()
    assert "make quickstart" in start and "survives being killed anywhere" in start  # of the README, its one home
    assert 'href="exporting.html"' in start and 'href="examples.html#finetune_timm"' in start
    python = (site / "reference" / "python.html").read_text()
    assert "What a person looks at to see what is being learned" in python  # a docstring
    assert 'id="in-weights--biases-and-mlflow"' in (site / "cluster.html").read_text()  # as on GitHub
    assert (site / "search" / "search_index.json").is_file()


def test_a_strict_build_tells_what_is_wrong(repository):
    """All at once, as a build tells all of them: a link, an anchor, a link of the changes, a page in no menu, and
    docstrings."""
    cluster, changes = repository / "docs" / "cluster.md", repository / "CHANGELOG.md"
    cluster.write_text(f"{cluster.read_text()}\n[one](nowhere.md) [two](data.md#nowhere)\n")
    changes.write_text(f"{changes.read_text()}\n[three](docs/gone.md)\n")
    (repository / "docs" / "alone.md").write_text("# Alone\n")
    python = repository / "docs" / "reference" / "python.md"
    python.write_text(re.sub(r"^::: .*\n(?:    .*\n)?", "", python.read_text(), flags=re.MULTILINE)
                      + "\n::: prelude.pretrain.monitors.Monitor\n")  # fmt: skip
    monitors = repository / "pretrain" / "monitors.py"
    text = monitors.read_text()
    assert '"""Told of each logged step."""' in text
    monitors.write_text(text.replace('"""Told of each logged step."""', "return None"))
    built = build(repository)
    assert built.returncode != 0 and "Aborted with" in built.stderr
    for wrong in ("'nowhere.md'", "#nowhere", "gone.md", "alone.md", "prelude.pretrain.monitors.Monitor.record has no"):
        assert wrong in built.stderr, built.stderr


def test_every_page_of_the_menu_has_one_place():
    text = re.sub(r"!!python\S+ .*", "x", (ROOT / "mkdocs.yml").read_text())
    menu = yaml.safe_load(text)["nav"]
    pages = [
        page
        for entry in menu
        for value in entry.values()
        for page in ([value] if isinstance(value, str) else [one for part in value for one in part.values()])
    ]
    assert len(set(pages)) == len(pages) > 15  # fmt: skip
