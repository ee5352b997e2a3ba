"""Code of the user's that a config names: `module:function` of an encoder, `module:Class` of an objective.

- A module is looked for on the import path, as any import is (installed packages, PYTHONPATH), and after everything
  else in the current folder. Nothing there can hide a module that is found elsewhere.
- A name is imported as it stands, and nothing else of it is run here.
- `digests` are of the module's source file and of the user's files that it imports, so that ranks can compare what they
  run, and a run can say that it changed.

Nothing here needs torch.
"""

import hashlib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from prelude.data.errors import UserError
from prelude.pretrain.code_files import KNOWN, files_behind, locate

Found = TypeVar("Found")

# What timm, torch and code that somebody else wrote raise for settings that do not suit them; the last three where a
# module is imported for it.
REFUSALS = (
    TypeError,
    ValueError,
    AssertionError,
    RuntimeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    NameError,
)
RAISED = (*REFUSALS, ImportError, SyntaxError, OSError)
_copies: dict[str, tuple[dict[str, str], Any]] = {}  # name -> its digests and what was found, see `as_it_is_now`
_LONGEST_REASON = 200  # characters
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_named(name: str) -> bool:
    """Whether a name leads to code of the user's, rather than to one of ours or of timm's."""
    return ":" in name


def load(key: str, name: str, what: str) -> Any:
    """What `module:attribute` leads to.

    key: of the config, for messages. what: the form of the name, such as `module:Class`. Raises UserError.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"{key}={name} is no name of code; write {what}, such as my_code:Mine for Mine of my_code.py.")
    module, _, path = name.partition(":")
    _look_here_too()
    try:
        found = importlib.import_module(module)
    except RAISED as error:
        raise UserError(f"{key}={name} cannot be imported: {_why(error, module)}; write {what}.") from error
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            raise UserError(
                f"{key}={name} cannot be imported: {module} ({_file_of(module) or 'built in'}) has no {path}; write "
                f"{what}."
            )
        found = getattr(found, attribute)
    return found


def _look_here_too() -> None:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def as_it_is_now(name: str, find: Callable[[str], Found]) -> Found:
    """`find(name)`, which loads the name's module: a copy of it from the files as they are now, and of the user's
    modules that it imports, which nobody else sees. For a notebook's kernel, which outlives edits and whose own modules
    and objects stay what they are; a run keeps the code that it began with. An import in a function of the copy that is
    called after `find` has returned is any import: it finds, or becomes, the kernel's own module."""
    module = name.partition(":")[0]
    if not _NAME.fullmatch(name) or not _may_be_copied(module):
        return find(name)
    _look_here_too()
    importlib.invalidate_caches()
    with _set_aside({module}), _set_aside({module, *filter(_may_be_copied, files_behind(module))}):
        now = digests(name)
        if name not in _copies or _copies[name][0] != now:
            _copies[name] = now, find(name)
        return _copies[name][1]


def _may_be_copied(module: str) -> bool:
    return module.partition(".")[0] not in {*KNOWN, "__main__"}


@contextmanager
def _set_aside(modules: set[str]) -> Iterator[None]:
    """Imports inside find no module of these top packages, and leave none. Whole packages, since a module is also an
    attribute of the package that it lies in."""
    tops = {module.partition(".")[0] for module in modules}
    kept = _taken(tops)
    try:
        yield
    finally:
        _taken(tops)
        sys.modules.update(kept)


def _taken(tops: set[str]) -> dict[str, ModuleType]:
    return {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] in tops}


def reason(error: Exception, name: str) -> str:
    """Why the code behind `name` failed, and in which line of it."""
    file = _file_of(name.partition(":")[0])
    text = " ".join(str(error).split())[:_LONGEST_REASON]
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f" in line {lines[-1]} of {Path(file).name}" if lines else ""
    return f"{type(error).__name__}{where}{': ' if text else ''}{text}"


def digests(*names: str, cls: type | None = None, layers: Iterable[type] = ()) -> dict[str, str]:
    """A short hash of the source file of each name that is code of the user's, by that name, and one of all files of
    the user's that it imports, where there are any.

    cls: what the last name led to, where that is no name of code: the entry point of an installed package. layers:
    classes that the names' code is known to use, from wherever they are.
    """
    paths = {name: name for name in filter(is_named, names)}
    if cls is not None and not is_named(names[-1]) and cls.__module__.partition(".")[0] != "prelude":
        paths[names[-1]] = cls.__module__
    also, found = {base.__module__ for layer in layers for base in layer.__mro__}, {}
    for name, path in paths.items():
        module = path.partition(":")[0]
        file = _file_of(module)
        if file and os.path.isfile(file):
            found[name] = _hashed(Path(file).read_bytes())
            if behind := files_behind(module, also=also):
                listed = [f"{each} {_hashed(behind[each].read_bytes())}" for each in sorted(behind)]
                found[_what_imports(name)] = _hashed("\n".join(listed).encode())
    return found


def _hashed(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def changes(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """A sentence for each name whose source file is not what it was, or which imports files that are gone or empty."""
    imported = then.keys() & {_what_imports(name) for name in now}
    return [
        f"the source of {name} has changed since the checkpoint was saved"
        for name in sorted((then.keys() & now.keys()) | imported)
        if then[name] != now.get(name)
    ]


def _what_imports(name: str) -> str:
    return f"what {name} imports"


def _why(error: Exception, module: str) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
        return f"there is no module {error.name} on the import path (PYTHONPATH) or in the current folder"
    return reason(error, module)


def _file_of(module: str) -> str | None:
    loaded = sys.modules.get(module)
    if loaded is not None:
        return getattr(loaded, "__file__", None)
    found = locate(module)
    return str(found) if found else None
