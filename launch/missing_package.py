"""A package that is not installed, told in a sentence: where a door meets it, and where a door's own module does."""

import sys

from prelude.data.errors import UserError

# What pyproject.toml asks for, by the names under which it is imported.
NEEDED = frozenset(
    "torch torchvision deepspeed timm webdataset braceexpand einops simplejpeg safetensors xxhash pydantic yaml rich "
    "jinja2 markupsafe tensorboard numpy scipy PIL fsspec packaging shtab".split()
)


def refusal(error: ModuleNotFoundError, own_code: bool = True) -> UserError | None:
    """What to tell of it; None where it is no matter of this installation. own_code: whether code of the user's may
    have asked for the package, which then is one of any name."""
    missing = (error.name or "").partition(".")[0]
    if missing in ("", "prelude") or (own_code and missing not in NEEDED):
        return None
    return UserError(
        f"The package {missing} is missing, without which this command cannot do its work; reinstall prelude-ssl with "
        "what it needs (`pip install --force-reinstall prelude-ssl`, or `make install` in a checkout)."
    )


def tell_while_imported() -> None:
    """For a door that is started as a script or a module: what it imports comes before it can tell anything itself."""
    usual = sys.excepthook

    def hook(kind, error, traceback) -> None:
        told = refusal(error) if issubclass(kind, ModuleNotFoundError) else None
        if told is None:
            usual(kind, error, traceback)
            return
        print(f"error: {told}", file=sys.stderr, flush=True)
        raise SystemExit(told.exit_code)

    sys.excepthook = hook
