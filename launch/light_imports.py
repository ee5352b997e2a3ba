"""Keeps timm and DeepSpeed from importing Weights & Biases and MLflow: a third of the time in which a run starts.

Both do that wherever these are installed, for features that no door uses: records go to them from a process beside the
run (`pretrain/trackers`). What else imports them in a door, such as a user's own objective, has them as ever.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_IMPORTERS = ("timm", "deepspeed")
_NOT_USED = ("wandb", "mlflow")


class _Lighter(MetaPathFinder):
    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in _IMPORTERS else None
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def without(module: ModuleType) -> None:
                with _hidden():
                    execute(module)

            spec.loader.exec_module = without
        return spec


@contextmanager
def _hidden() -> Iterator[None]:
    """Whoever imports one of them meanwhile is told that it is not installed."""
    hidden = [name for name in _NOT_USED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)


sys.meta_path.insert(0, _Lighter())
