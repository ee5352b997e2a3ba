"""The source files that code of the user's is made of: those that its own file imports, and so on.

- They are found by reading `import` statements; nothing is imported for it. A module whose name is made up while the
  code runs is not seen.
- Followed are modules of the same top package, wherever it lies, and all others that are not installed: neither
  site-packages nor the standard library, torch, timm or Prelude.
- At most `MOST` files, nearest first, so that a package of thousands costs no start a minute.
"""

import ast
import importlib.util
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

MOST = 300
_INSTALLED = {"site-packages", "dist-packages"}
KNOWN = {"torch", "timm", "prelude", *sys.stdlib_module_names}


def files_behind(module: str, *, also: Iterable[str] = ()) -> dict[str, Path]:
    """The files that `module` imports, by module name, without its own and empty ones.

    also: modules that are known to belong to it, whether or not an import says so.
    """
    own = module.partition(".")[0]
    named = [name for name in sorted(also) if name.partition(".")[0] not in KNOWN]
    found, waiting = {}, deque([module, *_with_packages(module), *named])
    while waiting and len(found) <= MOST:
        name = waiting.popleft()
        file = None if name in found else locate(name)
        if file is None or (name.partition(".")[0] != own and not _INSTALLED.isdisjoint(file.parts)):
            continue
        found[name] = file
        waiting.extend(_imported(name, file))
    itself = found.pop(module, None)
    return {name: file for name, file in found.items() if file != itself and file.stat().st_size}


def _imported(name: str, file: Path) -> Iterator[str]:
    """Names that may be modules of the user's, each after the packages that it lies in."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    try:
        statements = _statements(file.read_bytes())
    except OSError:
        return
    for level, base, names in statements:
        if level:
            above = package.split(".")[: len(package.split(".")) - level + 1]
            base = ".".join([*filter(None, above), *filter(None, [base])])
        if not base or base.partition(".")[0] in KNOWN:
            continue
        yield from _with_packages(base)
        yield from (f"{base}.{each}" for each in names)


def _with_packages(name: str) -> list[str]:
    """Whose code an import of `name` runs: the packages that it lies in, and its own."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


@lru_cache(maxsize=2 * MOST)
def _statements(source: bytes) -> tuple[tuple[int, str, tuple[str, ...]], ...]:
    """(dots, module, names) of every import, in functions too; none of what is no Python."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, each.name, ()) for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", tuple(each.name for each in node.names)))
    return tuple(found)


def locate(name: str) -> Path | None:
    """The Python file of a module, as an import would find it; None where there is none."""
    top, *parts = name.split(".")
    file, folders = _top(top)
    for part in parts:
        for folder in map(Path, folders):
            if (folder / part / "__init__.py").is_file():
                file, folders = folder / part / "__init__.py", [folder / part]
                break
            if (folder / f"{part}.py").is_file():
                file, folders = folder / f"{part}.py", []
                break
            if (folder / part).is_dir():
                file, folders = None, [folder / part]
                break
        else:
            return None
    return file


def _top(name: str) -> tuple[Path | None, list[str]]:
    """The file of a module or package that lies in no other, and where a package's modules lie."""
    loaded = sys.modules.get(name)
    if loaded is not None:
        file, folders = getattr(loaded, "__file__", None), getattr(loaded, "__path__", ())
    else:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError, AttributeError):
            spec = None
        file, folders = (spec.origin, spec.submodule_search_locations or ()) if spec else (None, ())
    found = Path(file) if file and file.endswith(".py") and Path(file).is_file() else None
    return found, list(folders)
