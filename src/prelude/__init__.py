"""The one name under which everything here is imported: `prelude.data`, `prelude.pretrain`, …

    import prelude
    run = prelude.pretrain("mae_cifar10", shards="shards/train-*.tar", epochs=5)  # docs/notebook.md
    run = prelude.open_run("runs/mae_cifar10")

The packages lie in the folders of the repository's root. An installed wheel has them inside this one; in a checkout,
installed or not, they are found from here, and the root itself never has to be on the import path, where folders called
`data` or `configs` would stand in the way of a user's own.
"""

from pathlib import Path
from types import ModuleType

_root = Path(__file__).resolve().parents[2]
if not (Path(__file__).parent / "data").is_dir():
    __path__.append(str(_root))

from prelude import pretrain  # noqa: E402  found in the folder that is known by now


class _Pretraining(ModuleType):
    """The package of that name, which can be called: `prelude.launch.notebook.pretrain` says how."""

    def __call__(self, recipe, *, ranks=1, **settings):
        """Trains an encoder by a recipe, in processes of its own, and returns its `Run`; the same call goes on with it.

        recipe: a YAML file, or the name of a shipped recipe. ranks: processes, one for each device. settings: keys of
        the config, such as `epochs=5`. Raises `RunError`.
        """
        from prelude.launch.notebook import pretrain

        return pretrain(recipe, ranks=ranks, **settings)


pretrain.__class__ = _Pretraining


def __getattr__(name: str):
    """What is imported when it is asked for: `open_run`, `Run`, `RunError`."""
    if name in ("open_run", "Run", "RunError"):
        from prelude.launch import notebook

        return getattr(notebook, name)
    raise AttributeError(f"module 'prelude' has no attribute {name!r}")
