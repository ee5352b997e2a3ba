"""The house's own rules: who may import whom, how long a file may get, what may not be said."""

import ast
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# all of it that those above may know
SEAMS = {"data.batch", "data.errors", "data.counting", "data.host", "data.signed_urls", "data.whole_files"}
ALLOWED = {
    "data": set(),
    "pretrain": {"data"},
    "objectives": {"pretrain", "data"},
    "checkpoints": {"pretrain", "data"},
    "evaluators": {"checkpoints", "pretrain", "data"},
    "launch": {"data", "pretrain", "objectives", "checkpoints", "evaluators"},
}
# of the evaluators, from the ground up: a room knows nothing of those after it
ROOMS = [
    "table_text",
    "defaults",
    "results",
    "features",
    "kept_fits",
    "labelled",
    "recorded_sections",
    "judging",
    "frozen",
    "embedding",
    "dense",
    "protocols",
    "finetuning",
    "online",
    "comparing",
]
SOURCES = {path: path.read_text() for folder in ALLOWED for path in sorted((ROOT / folder).rglob("*.py"))}


def offenders(rule: Callable[[Path, str], object]) -> dict[str, object]:
    """What a rule has to say of each source, (path from the root, text), where it says anything."""
    told = {path.relative_to(ROOT): rule(path.relative_to(ROOT), text) for path, text in SOURCES.items()}
    return {str(path): found for path, found in told.items() if found}


def imported_modules(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            # `from prelude.data import batch` names a module as much as `from prelude.data.batch import Batch` does
            short = node.module.removeprefix("prelude").count(".") < 2
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if short else {node.module}
    return found


def forbidden_imports(folder: str, source: str) -> list[str]:
    return [name for name in sorted(imported_modules(source)) if not allowed(folder, name)]


def allowed(folder: str, name: str) -> bool:
    first, floor, *rest = [*name.split("."), ""]
    if first != "prelude":
        return first not in ALLOWED  # by that name one of ours would be a second module
    if floor == folder or floor not in ALLOWED:
        return True
    seam_only = floor == "data" and folder in ("pretrain", "objectives", "checkpoints")
    return floor in ALLOWED[folder] and (not seam_only or f"{floor}.{rest[0]}" in SEAMS)


def test_imports_go_downwards_only():
    assert not offenders(lambda path, text: forbidden_imports(path.parts[0], text))


def test_the_rule_itself_sees_an_upward_import():
    upwards = "prelude.checkpoints.store"
    assert forbidden_imports("pretrain", f"from {upwards} import Store") == [upwards]
    assert forbidden_imports("pretrain", "from prelude.data import loader") == ["prelude.data.loader"]
    assert forbidden_imports("pretrain", "from prelude import checkpoints") == ["prelude.checkpoints"]
    assert forbidden_imports("objectives", "import prelude.data.batch") == []
    assert forbidden_imports("launch", "import data.batch") == ["data.batch"]


def rooms_above(room: str, source: str) -> list[str]:
    names = [name.split(".") for name in sorted(imported_modules(source)) if name.startswith("prelude.evaluators.")]
    return [".".join(name) for name in names if ROOMS.index(name[2]) > ROOMS.index(room)]


def test_rooms_of_the_evaluators_are_on_floors():
    def rule(path: Path, text: str) -> list[str]:
        folder, room, *_ = [*path.parts, ""]
        room = room.removesuffix(".py")
        return rooms_above(room, text) if folder == "evaluators" and room != "__init__" else []

    assert not offenders(rule)


def test_the_rule_of_the_rooms_sees_an_upward_import():
    upwards = "prelude.evaluators.comparing.headline"
    assert rooms_above("frozen", f"from {upwards} import best") == [upwards]
    assert rooms_above("comparing", "from prelude.evaluators.frozen.knn import knn") == []


def test_files_stay_short():
    assert not offenders(lambda path, text: len(text.splitlines()) > 400)


def test_things_are_counted_in_one_place():
    """By `data/counting.py`, which knows one from many."""
    assert not offenders(lambda path, text: re.search(r"'s' \* \(|\"s\" \* \(|['\"]s['\"] if ", text))


def test_why_the_system_refuses_is_told_in_one_place():
    """By `data/errors.py`, which knows that an OSError may have no words of the system's."""
    home = Path("data/errors.py")
    assert not offenders(lambda path, text: path != home and re.search(r"\.strerror\b(?!\()", text))
