"""The house's own rules: who may import whom, how long a file may get, what may not be said."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SEAMS = {"data.batch", "data.errors"}  # all that pretrain and objectives may know of the data path
ALLOWED = {
    "data": set(),
    "pretrain": {"data"},
    "objectives": {"pretrain", "data"},
    "checkpoints": {"pretrain", "data"},
    "evaluators": {"checkpoints", "pretrain", "data"},
    "launch": {"data", "pretrain", "objectives", "checkpoints", "evaluators"},
}
SOURCES = [path for folder in ALLOWED for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_modules(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            # `from data import batch` names a module as much as `from data.batch import Batch` does
            found |= {node.module} if "." in node.module else {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def forbidden_imports(folder: str, source: str) -> list[str]:
    bad = []
    for module in imported_modules(source):
        floor = module.split(".")[0]
        if floor not in ALLOWED or floor == folder:
            continue
        seam_only = floor == "data" and folder in ("pretrain", "objectives", "checkpoints")
        if floor not in ALLOWED[folder] or (seam_only and ".".join(module.split(".")[:2]) not in SEAMS):
            bad.append(module)
    return bad


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards_only(path):
    assert forbidden_imports(path.relative_to(ROOT).parts[0], path.read_text()) == []


def test_the_rule_itself_sees_an_upward_import():
    assert forbidden_imports("pretrain", "from checkpoints.store import Store") == ["checkpoints.store"]
    assert forbidden_imports("pretrain", "from data import loader") == ["data.loader"]
    assert forbidden_imports("objectives", "import data.batch") == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 400
