"""What packing needs of libraries that not everybody has."""

import importlib.util

from prelude.data.errors import UserError


def needed(module: str, extra: str, what: str) -> None:
    """Raises UserError, with the extra that brings it, where a library is missing."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{what} needs the library {module}, which is missing; pip install 'prelude-ssl[{extra}]'.")
